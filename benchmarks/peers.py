"""The environment of the peers and the processes that run in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

# Pinned: the ratios we publish are against these.
PACKAGES = ["constriction==0.5.0", "zstandard==0.25.0", "ninja==1.13.2", "setuptools==84.2.1", "numpy==2.4.6"]
TORCH = "torch==2.13.0"
TORCHAC = "torchac==0.9.3"
VERSIONS = {name.split("==")[0]: name.split("==")[1] for name in [*PACKAGES, TORCH, TORCHAC]}

_REPOSITORY = Path(__file__).resolve().parent.parent


def make_environment(folder: Path) -> Path:
    """Install the peers into a virtual environment, once; returns its Python."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"installing the peers into {folder} (the first time takes minutes: torch is large)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        constraints = ["-c", str(_REPOSITORY / "tools/constraints.txt")]
        subprocess.run([*pip, *constraints, TORCH, *PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", TORCHAC], check=True)
        # torchac compiles itself at import. This compiler's own -O3 comes last, so it wins.
        compiler = folder / "o3" / "g++"
        compiler.parent.mkdir()
        compiler.write_text('#!/bin/sh\nexec g++ "$@" -O3\n'.replace("exec g++", f"exec {_find_compiler()}"))
        compiler.chmod(0o755)
        for name in ("torchac", "torchac-O3"):
            print(f"building {name} (a minute)", file=sys.stderr)
            subprocess.run([str(python), "-c", "import torchac"], check=True, env=_environment(name, folder))
        (folder / ".installed").touch()
    return python


def _environment(name: str, folder: Path) -> dict[str, str]:
    """What a peer's process finds: its own interpreter first, and where and with what torchac compiles itself."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", TORCH_EXTENSIONS_DIR=str(folder / f"extensions-{name}"))
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    environment.pop("PYTHONPATH", None)
    if name == "torchac-O3":
        environment["CXX"] = str(folder / "o3" / "g++")
    return environment


def _find_compiler() -> str:
    found = subprocess.run(["sh", "-c", "command -v g++"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


class Peer:
    """One peer's process, pinned to a processor.

    Attributes:
        num_bytes: of its encoding of the symbols.
    """

    def __init__(self, name: str, folder: Path, symbols: Path, frequencies: Path, processor: int) -> None:
        python = make_environment(folder)
        script = Path(__file__).with_name("peer_coders.py")
        self.name = name
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [str(python), str(script), name, str(symbols), str(frequencies)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env=_environment(name, folder),
            preexec_fn=lambda: os.sched_setaffinity(0, {processor}),
        )
        line = self._process.stdout.readline()
        if not line:
            self._messages.seek(0)
            sys.stderr.write(self._messages.read().decode(errors="replace"))
            raise RuntimeError(f"{name} did not start, or its round trip is wrong: its messages stand above")
        self.num_bytes = int(line)

    def seconds(self, operation: str) -> float:
        """Let it `encode` or `decode` once."""
        self._process.stdin.write(operation + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._messages.close()


def save_inputs(folder: Path, symbols: np.ndarray, frequencies: np.ndarray) -> tuple[Path, Path]:
    """Write what the peers read; returns the paths."""
    paths = folder / "symbols.npy", folder / "frequencies.npy"
    np.save(paths[0], symbols)
    np.save(paths[1], frequencies)
    return paths
