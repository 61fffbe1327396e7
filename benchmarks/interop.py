#!/usr/bin/env python3
"""Exchange codes of coder `ac` with torchac and with LMCache's CPU kernels, both ways, and count the differences.

The peers are installed from PyPI into an environment of their own and run there as a process of their own, over
symbols and codes in plain arrays; nothing of them is part of CacheGen. Exits with 1 where a byte or a symbol differs.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "src"))

import numpy as np  # noqa: E402
from interop_cases import Case, list_cases, make_tables_like  # noqa: E402

from cachegen import _native  # noqa: E402

TORCHAC = "torchac==0.9.3"
LMCACHE = "lmcache==0.5.6"
# What the two import, LMCache's kernels being loaded by path; torch and numpy are those of tools/constraints.txt. ninja
# compiles torchac's C++ when it is first imported.
REQUIREMENTS = [TORCHAC, "numba==0.68.1", "ninja==1.13.2", "numpy", "torch", "setuptools"]
KERNELS = "lmcache/v1/platform/torch_ops/cachegen_kernels.py"
ENCODERS = ["torchac", "lmcache"]
DECODERS = ["torchac", "lmcache", "lmcache_prefsum"]
NAMES = {
    "torchac": f"torchac {TORCHAC.split('==')[1]}",
    "lmcache": f"LMCache {LMCACHE.split('==')[1]}",
    "lmcache_prefsum": f"LMCache {LMCACHE.split('==')[1]}, decode_fast_prefsum",
}


@dataclass
class Tally:
    """What became of the codes of one case and peer.

    Attributes:
        bytes_equal, ours_read, theirs_read: numbers of codes; None where the peer has no encoder of its own.
    """

    num_codes: int = 0
    num_symbols: int = 0
    bytes_equal: int | None = None
    ours_read: int = 0
    theirs_read: int | None = None

    @property
    def num_mismatches(self) -> int:
        counts = [self.bytes_equal, self.ours_read, self.theirs_read]
        return sum(self.num_codes - count for count in counts if count is not None)


@dataclass
class Batch:
    """Codes of one case that have as many tokens and as many symbols.

    Attributes:
        symbols: uint8 `[num_codes, num_tokens]`; absent symbols are left out of the numbering.
        frequencies: `[num_codes, num_symbols]`, all positive.
        codes: ours.
    """

    case: Case
    symbols: np.ndarray
    frequencies: np.ndarray
    codes: list[bytes]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--peers_folder", type=Path, default=ROOT / "build" / "interop", help="where the peers are installed")
    add("--model_id", default=ROOT / "models" / "tiny-mistral", help="model whose cache is exchanged")
    add("--path_to_context", type=Path, default=ROOT / "9k_prompts" / "0.txt", help="the text it reads")
    add("--num_tokens", type=int, default=1000, help="tokens of the text")
    add("--skip_model", action="store_true", help="exchange random symbols only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    python, kernels = install_peers(args.peers_folder)

    def ask_peers(request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run_peers(python, kernels, args.peers_folder, request)

    cases = list_cases(None if args.skip_model else args.model_id, args.path_to_context, args.num_tokens)
    cases += make_tables_like(
        "LMCache's calculate_cdf, rounded to 12 bits", lambda *case: ask_for_cdf(ask_peers, *case)
    )
    batches = [batch for case in cases for batch in split_case(case)]
    answer = ask_peers(make_request(batches))
    tallies = {(case.name, peer): Tally() for case in cases for peer in DECODERS}
    for index, batch in enumerate(batches):
        for peer in DECODERS:
            add_to_tally(tallies[batch.case.name, peer], batch, answer, f"{index}_{peer}", peer in ENCODERS)
    print_table(tallies)
    num_mismatches = sum(tally.num_mismatches for tally in tallies.values())
    print(f"\n{num_mismatches} mismatches; Python {platform.python_version()}, {platform.machine()}")
    return 1 if num_mismatches else 0


# --- the peers --------------------------------------------------------------------------------------------------------


def install_peers(folder: Path) -> tuple[Path, Path]:
    """Install the peers, unless they are; returns their Python and the path of LMCache's kernels."""
    python, kernels = folder / "venv" / "bin" / "python", folder / KERNELS
    done = folder / "installed.txt"
    wanted = "\n".join([*REQUIREMENTS, LMCACHE]) + "\n"
    if done.exists() and done.read_text("utf-8") == wanted:
        return python, kernels
    print(f"interop.py: installing the peers into {folder} (the first time takes minutes: torch is large)")
    folder.mkdir(parents=True, exist_ok=True)
    venv.create(folder / "venv", with_pip=True, clear=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-qq", "-c", ROOT / "tools/constraints.txt", *REQUIREMENTS], check=True)
    # Its dependencies are those of a server with a GPU; one file of it is used.
    subprocess.run([*pip, "download", "-qq", "--no-deps", "--only-binary", ":all:", "-d", folder, LMCACHE], check=True)
    with zipfile.ZipFile(next(folder.glob("lmcache-*.whl"))) as wheel:
        wheel.extract(KERNELS, folder)
    done.write_text(wanted, "utf-8")
    return python, kernels


def run_peers(python: Path, kernels: Path, folder: Path, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run interop_peers.py on a request; returns its answer."""
    request_path, answer_path = folder / "request.npz", folder / "answer.npz"
    np.savez(request_path, **request)
    answer_path.unlink(missing_ok=True)
    environment = os.environ | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }
    command = [python, ROOT / "benchmarks" / "interop_peers.py", request_path, answer_path, kernels]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise SystemExit(f"interop.py: the peers failed:\n{result.stdout}")
    with np.load(answer_path) as answer:
        return dict(answer)


# --- the exchange -----------------------------------------------------------------------------------------------------


def split_case(case: Case) -> Iterator[Batch]:
    """Encode a case's streams, and sort their codes into batches.

    torchac asks for strictly increasing tables. Symbols without a frequency are left out of table and numbering, which
    changes no code: their part of the interval is empty.
    """
    groups: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray, bytes]]] = {}
    for symbols, frequencies in case.streams:
        for of_channel, table, code in zip(symbols, frequencies, encode(symbols, frequencies), strict=True):
            present = np.flatnonzero(table)
            ranks = np.searchsorted(present, of_channel)
            groups.setdefault((len(of_channel), len(present)), []).append((ranks, table[present], code))
    for members in groups.values():
        symbols, tables, codes = zip(*members, strict=True)
        yield Batch(case, np.stack(symbols).astype(np.uint8), np.stack(tables), list(codes))


def encode(symbols: np.ndarray, frequencies: np.ndarray) -> list[bytes]:
    """Encode one stream with our coder and take it apart into the codes of its channels."""
    tables = _native.TableSet.from_frequencies(frequencies.astype(np.uint16))
    content, _, status = _native.encode_symbols(symbols.astype(np.uint16), tables, 0, is_arithmetic=True)
    if _native.Status(status) != _native.Status.OK:
        raise SystemExit(f"interop.py: our encoder says {_native.Status(status).name}")
    lengths = np.frombuffer(content, "<u2", len(symbols)).astype(np.int64)
    codes_at = len(content) - lengths.sum()
    ends = codes_at + np.cumsum(lengths)
    return [content[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def decode(codes: Sequence[bytes], frequencies: np.ndarray, num_tokens: int) -> np.ndarray | None:
    """Decode codes with our decoder; None where it refuses them."""
    padded = np.zeros((len(codes), 32), dtype=np.uint16)
    padded[:, : frequencies.shape[1]] = frequencies
    lengths = np.array([len(code) for code in codes], dtype="<u2").tobytes()
    content = lengths.ljust(-(-len(lengths) // 4) * 4, b"\0") + b"".join(codes)
    symbols, status = _native.decode_symbols(
        np.frombuffer(content, np.uint8),
        0,
        num_tokens,
        len(codes),
        _native.TableSet.from_frequencies(padded),
        0,
        is_arithmetic=True,
    )
    return symbols if _native.Status(status) == _native.Status.OK else None


def to_cdf(frequencies: np.ndarray) -> np.ndarray:
    """Our tables as the peers take them: 16-bit cumulative frequencies, ours times 16, the last one wrapped to 0."""
    starts = np.cumsum(frequencies, axis=1, dtype=np.int64) << 4
    return (np.pad(starts, ((0, 0), (1, 0))) & 0xFFFF).astype(np.uint16)


def make_request(batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """Write batches as interop_peers.py reads them."""
    request = {"num_batches": np.array(len(batches))}
    for index, batch in enumerate(batches):
        request |= {
            f"{index}_symbols": batch.symbols,
            f"{index}_cdf": to_cdf(batch.frequencies),
            f"{index}_lengths": np.array([len(code) for code in batch.codes], dtype=np.uint32),
            f"{index}_codes": np.frombuffer(b"".join(batch.codes), np.uint8),
        }
    return request


def ask_for_cdf(ask_peers, symbols: np.ndarray, num_symbols: int) -> np.ndarray:
    """Return LMCache's own tables, `[num_codes, num_symbols + 1]` with 0x10000 at the end."""
    request = {"num_batches": np.array(1), "0_symbols": symbols, "0_num_symbols": np.array(num_symbols)}
    cdf = ask_peers(request)["0_cdf"].astype(np.int64)
    cdf[:, -1] = 0x10000
    return cdf


def add_to_tally(tally: Tally, batch: Batch, answer: dict[str, np.ndarray], prefix: str, has_encoder: bool) -> None:
    """Compare one peer's answer for a batch with what it must be."""
    num_codes, num_tokens = batch.symbols.shape
    tally.num_codes += num_codes
    tally.num_symbols += batch.symbols.size
    tally.ours_read += int((answer[f"{prefix}_decoded"] == batch.symbols).all(axis=1).sum())
    if not has_encoder:
        return
    lengths = answer[f"{prefix}_lengths"].astype(np.int64)
    content, ends = answer[f"{prefix}_codes"].tobytes(), np.cumsum(lengths)
    codes = [content[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    tally.bytes_equal = (tally.bytes_equal or 0) + sum(a == b for a, b in zip(codes, batch.codes, strict=True))
    decoded = decode(codes, batch.frequencies, num_tokens)
    num_read = 0 if decoded is None else int((decoded == batch.symbols).all(axis=1).sum())
    tally.theirs_read = (tally.theirs_read or 0) + num_read


def print_table(tallies: dict[tuple[str, str], Tally]) -> None:
    """Print what was exchanged, as docs/coder.md shows it."""
    print(
        "| symbols | peer | codes | symbols coded | same bytes | ours read by peer | peer's read by us | mismatches |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (case, peer), tally in tallies.items():
        counts = [tally.bytes_equal, tally.ours_read, tally.theirs_read]
        cells = [case, NAMES[peer], f"{tally.num_codes:,}", f"{tally.num_symbols:,}"]
        cells += ["" if count is None else f"{count:,}" for count in counts]
        print(f"| {' | '.join(cells)} | {tally.num_mismatches} |")


if __name__ == "__main__":
    sys.exit(main())
