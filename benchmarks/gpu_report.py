#!/usr/bin/env python3
"""Everything that a GPU has to show, in one command and under ten minutes: bytes first, then times.

Builds torchac_cuda if need be, proves that its bytes and values are the CPU's, runs the CUDA tests where pytest is,
measures prefill and every method at an 8B shape, and runs a short proof under compute-sanitizer. A step that fails or
takes too long is noted, and the others go on. Writes one JSON file and a page. --dry_run does the same on the CPU,
small, so that a mistake in here does not wait for a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import method_throughput
import torch
from nvcomp_ans import describe_ans, find_nvcomp

from cachegen.files import write_file
from cachegen.versions import collect_versions

ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 570
NOTHING_TO_RUN = "not run: nothing to run"
SANITIZER_TOOLS = ("memcheck", "racecheck")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        command: its arguments, behind the interpreter's.
        limit_seconds: after which it is stopped.
        result: the JSON file that it writes; None where its exit code says all.
    """

    name: str
    command: Sequence[str]
    limit_seconds: float
    result: Path | None = None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_path", type=Path, default=ROOT / "build/gpu", help="folder of the JSON and the page")
    parser.add_argument("--dry_run", action="store_true", help="on the CPU, small")
    parser.add_argument("--num_tokens", type=int, default=32768)
    parser.add_argument("--steps", nargs="+", help="run only these; None: all")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu_report: torch sees no CUDA GPU; --dry_run does the same on the CPU", file=sys.stderr)
        return 1
    args.output_path.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    record: dict[str, Any] = {"is_dry_run": args.dry_run, "machine": describe_machine(args.dry_run), "steps": {}}
    steps = list_steps(args, record["steps"])
    unknown = sorted(set(args.steps or ()) - {name for name, _ in steps})
    if unknown:
        known = ", ".join(name for name, _ in steps)
        print(f"gpu_report: --steps: there is no {unknown[0]} (known: {known})", file=sys.stderr)
        return 2
    for name, make in steps:
        if args.steps is not None and name not in args.steps:
            continue
        step = make()
        left = BUDGET_SECONDS - (time.perf_counter() - start)
        print(f"gpu_report: {name}", flush=True)
        record["steps"][name] = {"state": NOTHING_TO_RUN} if step is None else run_step(step, left)
        print(f"gpu_report: {name}: {record['steps'][name]['state']}", flush=True)
        write_file(args.output_path / "gpu.json", (json.dumps(record, indent=1) + "\n").encode())
    page = format_page(record)
    write_file(args.output_path / "gpu.md", page.encode())
    print(page)
    return 0 if all(step["state"] in ("passed", NOTHING_TO_RUN) for step in record["steps"].values()) else 1


def list_steps(args: argparse.Namespace, done: dict[str, Any]) -> list[tuple[str, Callable[[], Step | None]]]:
    """Return what makes each step, None where there is nothing to run it, in the order of running.

    Args:
        done: what has come of the steps before, by their names; a step is made when its turn has come.
    """
    output, device = args.output_path, "cpu" if args.dry_run else "cuda"
    shape = ["--layers", "4", "--kv_heads", "2"] if args.dry_run else []
    num_tokens = ["--num_tokens", "768" if args.dry_run else str(args.num_tokens)]
    model = ["--hidden_size", "256", "--heads", "4", "--intermediate_size", "512", "--vocab_size", "1024"]

    def build() -> Step | None:
        if args.dry_run or _has_module():
            return None
        return Step("build", ["setup.py", "build_ext", "--inplace"], 300)

    def prove() -> Step:
        # Without a GPU the kernels' own lines run on the CPU.
        flags = ["--emulated", "--short"] if args.dry_run else []
        return Step("prove", ["-m", "tests.prove_gpu", *flags], 120)

    def test() -> Step | None:
        if args.dry_run or importlib.util.find_spec("pytest") is None:
            return None
        # Not what the proof has shown.
        flags = ["-q", "-p", "no:cacheprovider", "-m", "cuda", "-k", "not test_a_gpu_does_what_the_cpu_does"]
        return Step("test", ["-m", "pytest", *flags], 180)

    def sanitize(tool: str) -> Callable[[], Step | None]:
        def make() -> Step | None:
            if args.dry_run or shutil.which("compute-sanitizer") is None:
                return None
            return Step(tool, ["-m", "tests.prove_gpu", "--short"], 90)

        return make

    def prefill_step() -> Step:
        path = output / "prefill.json"
        sizes = [*shape, *model, "--block_size", "256"] if args.dry_run else []
        command = ["benchmarks/prefill_throughput.py", "--device", device, *num_tokens, *sizes, "--json", str(path)]
        return Step("prefill", command, 120, path)

    def methods() -> Step:
        path = output / "methods.json"
        sizes = [*shape, "--components", "64"] if args.dry_run else ["--components", "1024"]
        prefill = done.get("prefill", {}).get("figures")
        text = [] if prefill is None else ["--prefill_seconds", str(prefill["prefill_seconds"])]
        command = ["benchmarks/method_throughput.py", "--device", device, *num_tokens, *sizes, *text]
        return Step("methods", [*command, "--rounds", "2", "--json", str(path)], 300, path)

    def nvcomp() -> Step | None:
        if args.dry_run or find_nvcomp() is None:
            return None
        path = output / "nvcomp.json"
        return Step("nvcomp", ["benchmarks/nvcomp_ans.py", "--json", str(path)], 60, path)

    return [
        ("build", build),
        ("prove", prove),
        ("test", test),
        ("prefill", prefill_step),
        ("methods", methods),
        ("nvcomp", nvcomp),
        *((tool, sanitize(tool)) for tool in SANITIZER_TOOLS),
    ]


def run_step(step: Step, left_seconds: float) -> dict[str, Any]:
    """Run a step; also returns what it printed last."""
    if left_seconds < 10:
        return {"state": "not run: no time was left"}
    command = [sys.executable, *step.command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    if step.name in SANITIZER_TOOLS:
        command = ["compute-sanitizer", "--tool", step.name, "--error-exitcode", "1", *command]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else it sees the caching allocator's blocks only
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=min(step.limit_seconds, left_seconds),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"state": "stopped: it took too long", "seconds": time.perf_counter() - start}
    found: dict[str, Any] = {
        "state": "passed" if done.returncode == 0 else "failed",
        "seconds": time.perf_counter() - start,
        "last_lines": done.stdout.splitlines()[-15:],
    }
    if done.returncode:
        print("\n".join(found["last_lines"]), file=sys.stderr)
    elif step.result is not None:
        found["figures"] = json.loads(step.result.read_text())
    return found


def _has_module() -> bool:
    command = [sys.executable, "-c", "import cachegen, torchac_cuda"]
    path = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, env=path, capture_output=True, check=False).returncode == 0


def describe_machine(is_dry_run: bool) -> dict[str, Any]:
    """Return versions, and the GPU's name and memory."""
    machine: dict[str, Any] = {"versions": collect_versions(), "processors": os.cpu_count()}
    if not is_dry_run:
        machine |= {
            "gpu": torch.cuda.get_device_name(),
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
            "cuda": torch.version.cuda,
        }
    return machine


def format_page(record: dict[str, Any]) -> str:
    """Return the page: what ran, on what, and the figures."""
    machine, steps = record["machine"], record["steps"]
    if record["is_dry_run"]:
        head = [
            "**This is a dry run on a CPU**, of a tiny shape: it shows that the command works, and no figure of a GPU."
            " No GPU has run it so far."
        ]
    else:
        head = [f"{machine['gpu']}, {machine['memory_bytes'] / 1e9:.0f} GB, CUDA {machine['cuda']}."]
    lines = [
        "# On a GPU",
        "",
        "Written by `make gpu` (`benchmarks/gpu_report.py`).",
        "",
        *head,
        "",
        "| step | | seconds | |",
        "|---|---|---:|---|",
    ]
    for name, step in steps.items():
        seconds = f"{step['seconds']:.0f}" if "seconds" in step else ""
        summary = step.get("last_lines", [""])[-1] if name in ("prove", "test", *SANITIZER_TOOLS) else ""
        lines.append(f"| {name} | {step['state']} | {seconds} | {summary.strip('= ')} |")
    figures = steps.get("prefill", {}).get("figures")
    if figures is not None:
        lines += [
            "",
            f"Prefill of {figures['num_tokens']:,} tokens by a model of {figures['num_parameters'] / 1e9:.2f} billion "
            f"random weights: {figures['prefill_seconds']:.2f} s, {figures['tokens_per_second']:,.0f} tokens per "
            "second.",
        ]
    figures = steps.get("methods", {}).get("figures")
    if figures is not None:
        lines += [
            "",
            "Files are read whole and decoded into a cache on the device; encoding starts from a cache in main memory.",
            "",
        ]
        lines.append(method_throughput.format_table(figures))
    if not record["is_dry_run"] and "nvcomp" in steps:
        lines += ["", describe_ans(steps["nvcomp"].get("figures"))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
