"""Ask two engines that share a store the same, and show that the second one loads what the first has computed."""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "9k_prompts/0.txt"
BLOCK_TOKENS = 256
PREFIX = "vllm:cachegen_"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs=2, metavar="URL")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--characters", type=int, default=6000, help="of the document")
    parser.add_argument("--wait_seconds", type=float, default=300.0, help="for an engine to start, and to store")
    args = parser.parse_args()
    prompt = args.document.read_text("utf-8")[: args.characters] + "\nIn one sentence:"
    answers = []
    for number, url in enumerate(args.engines):
        wait_until(partial(fetch, f"{url}/v1/models"), args.wait_seconds, f"{url} to answer")
        before = read_counts(url)
        start = time.perf_counter()
        answer, num_tokens = ask(url, prompt)
        seconds = time.perf_counter() - start
        answers.append(answer)
        after = read_counts(url)
        names = ("prompt_tokens_total:loaded", "prompt_tokens_total:computed")
        loaded, computed = (int(after.get(name, 0) - before.get(name, 0)) for name in names)
        print(f"{url}: {num_tokens} tokens in {seconds:.2f} s, {loaded} loaded, {computed} computed: {answer!r}")
        if number == 0:
            num_blocks = num_tokens // BLOCK_TOKENS
            wait_until(partial(is_stored, url, num_blocks), args.wait_seconds, "its blocks to be stored")
    if answers[0] != answers[1]:
        print("the answers differ")
        return 1
    return 0 if loaded == num_blocks * BLOCK_TOKENS else 1


def is_stored(url: str, num_blocks: int) -> bool:
    """Tell whether an engine has stored, or found, so many blocks; which its next step tells."""
    ask(url, "Hello", 1)
    counts = read_counts(url)
    return sum(counts.get(name, 0) for name in ("encoded_blocks_total", "found_blocks_total")) >= num_blocks


def ask(url: str, prompt: str, num_tokens: int = 12) -> tuple[str, int]:
    """Return an answer and the number of the prompt's tokens."""
    model = json.loads(fetch(f"{url}/v1/models") or "")["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
    found = json.loads(fetch(f"{url}/v1/completions", body) or "")
    return found["choices"][0]["text"], found["usage"]["prompt_tokens"]


def read_counts(url: str) -> dict[str, float]:
    """Return the connector's counts."""
    counts: dict[str, float] = {}
    for line in (fetch(f"{url}/metrics") or "").splitlines():
        if line.startswith(PREFIX):
            name, _, value = line.rpartition(" ")
            name, _, labels = name.removeprefix(PREFIX).partition("{")
            pairs = [pair.split("=", 1) for pair in labels.rstrip("}").split(",")]
            own = [value.strip('"') for key, value in pairs if key in ("source", "reason", "decision", "stage")]
            counts[":".join([name, *own])] = float(value)
    return counts


def fetch(url: str, body: dict | None = None) -> str | None:
    """Return what a server answers; None where there is none yet."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, ConnectionError):
        if body is None:
            return None
        raise


def wait_until(is_so: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise SystemExit(f"ask_both.py: waited {seconds:.0f} s for {what}")
        time.sleep(1)


if __name__ == "__main__":
    raise SystemExit(main())
