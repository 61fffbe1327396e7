"""What the coder should reach, and what a run of coder_throughput.py found of it."""

from __future__ import annotations

from collections.abc import Iterator

SMALL, LARGE = "4 planes x 256 tokens, 32 bins", "64 planes x 256 tokens, 32 bins"
COMPONENTS = "4 groups, 512 tokens"
FP16_BYTES = 2
MISTRAL = "Mistral-7B, 9000 tokens, 32 bins"


def find_row(rows: list[dict], case: str, coder: str, path: str | None, threads: int = 1) -> dict | None:
    """Return a row of the results; None where the run had none such. A path of "*" is any."""
    for row in rows:
        if (row["case"], row["coder"], row["threads"]) == (case, coder, threads) and path in ("*", row["path"]):
            return row
    return None


def list_goals(rows: list[dict]) -> Iterator[tuple[str, float | None, float, float, bool]]:
    """Yield per goal: what, what was found (None: nothing, here), floor, goal, and whether less is better."""

    def of(row: dict | None, field: str) -> float | None:
        return None if row is None else row[field]

    def quotient(above: float | None, below: float | None) -> float | None:
        return above / below if above and below else None

    for path, floor, goal in (("avx512", 70, 100), ("avx2", 30, 45), ("portable", 6, 9)):
        found = of(find_row(rows, SMALL, "rans", path), "decode_over_torchac_o3")
        yield f"{path} decode over torchac -O3", found, floor, goal, False
    found = of(find_row(rows, SMALL, "rans", "avx512"), "encode_over_constriction")
    yield "avx512 encode over constriction", found, 12, 18, False
    for path, floor, goal in (("avx512", 4, 8), ("avx2", 3, 5)):
        case = next((row["case"] for row in rows if row["case"].startswith(COMPONENTS)), "")
        found = of(find_row(rows, case, "components", path), "decode_over_portable")
        yield f"{path} decode of components over portable", found, floor, goal, False
    gpu = find_row(rows, MISTRAL, "rans", "cuda", threads=0)
    for operation, verb, floor, goal in (("decode", "written", 0.3, 0.7), ("encode", "read", 0.2, 0.5)):
        rate = of(gpu, f"{operation}_msym_s")
        terabytes = None if rate is None else rate * FP16_BYTES / 1e6
        yield f"GPU {operation}, TB/s of fp16 {verb} (H100)", terabytes, floor, goal, False
    one = find_row(rows, LARGE, "rans", "*")
    two = next((row for row in rows if (row["case"], row["coder"], row["threads"]) == (LARGE, "rans", 2)), None)
    for operation in ("decode", "encode"):
        field = f"{operation}_msym_s"
        yield f"{operation} on two threads over one", quotient(of(two, field), of(one, field)), 1.7, 1.9, False
    mistral = find_row(rows, MISTRAL, "rans", "*")
    overhead = of(mistral, "bits_over_table_ideal")
    yield "% over the 12-bit tables' ideal, Mistral", None if overhead is None else 100 * overhead, 1, 0.5, True
    documents, measured = find_row(rows, MISTRAL, "documents", "*"), find_row(rows, MISTRAL, "measure", "*")
    found = quotient(of(mistral, "decode_msym_s"), of(documents, "decode_msym_s"))
    yield "decoding a document over its kernels", found, 1.5, 1.5, True
    rates = of(mistral, "encode_msym_s"), of(measured, "encode_msym_s"), of(documents, "encode_msym_s")
    found = None if None in rates else (1 / rates[2]) / (1 / rates[0] + 1 / rates[1])
    yield "encoding a document over its kernels", found, 1.5, 1.5, True


def print_goals(rows: list[dict]) -> None:
    """Print a line per goal: what was found, and whether it reaches the goal, the floor, or neither."""
    print("\ngoals, one thread and 32 bins where nothing else is said")
    for what, found, floor, goal, less_is_better in list_goals(rows):
        if found is None:
            print(f"  {what:<44}       -   goal {goal:g}: not measured here")
            continue
        sign = -1 if less_is_better else 1
        verdict = "met" if sign * found >= sign * goal else "floor met" if sign * found >= sign * floor else "MISSED"
        print(f"  {what:<44} {found:7.2f}   goal {goal:g}, floor {floor:g}: {verdict}")
