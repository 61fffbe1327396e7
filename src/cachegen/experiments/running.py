"""Do an experiment, unless its outcome is there already."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from pathlib import Path

from cachegen.errors import InputError
from cachegen.experiments.bench import Bench
from cachegen.experiments.outcome import OUTCOME_SUFFIX, Outcome, read_outcome, write_outcome
from cachegen.experiments.registry import EXPERIMENTS
from cachegen.versions import collect_versions

# Outcomes are made anew when this changes: with any experiment.
EXPERIMENTS_VERSION = 1


def find_done(folder: str | os.PathLike[str], name: str, bench: Bench) -> Outcome | None:
    """Return an experiment's outcome if it is there, whole, and of the same model, texts and profile."""
    try:
        outcome = read_outcome(Path(folder) / f"{name}{OUTCOME_SUFFIX}")
    except InputError:
        return None
    return outcome if outcome.key == _key(name, bench) else None


def run_experiment(folder: str | os.PathLike[str], name: str, bench: Bench, command: str) -> Outcome:
    """Do an experiment and write its outcome.

    Args:
        command: that a reader would give to do the same.

    Raises:
        CacheGenError: it cannot be done here, or not written.
    """
    outcome = EXPERIMENTS[name](bench)
    setting = {
        "model": Path(bench.loaded.model_id).name,
        "device": str(bench.loaded.device),
        "processor": _name_processor(),
        "threads": bench.num_threads,
        "contexts": ", ".join(f"{data_set}: {len(found)}" for data_set, found in bench.data_sets.items()),
        "profile": "none" if bench.profile is None else bench.profile.profile_hash[:12],
        "versions": ", ".join(f"{package} {version}" for package, version in collect_versions().items()),
        "command": command,
        **outcome.setting,
    }
    outcome = dataclasses.replace(outcome, setting=setting, key=_key(name, bench))
    write_outcome(folder, outcome)
    return outcome


def _key(name: str, bench: Bench) -> str:
    digest = hashlib.sha256(repr((EXPERIMENTS_VERSION, name, bench.identity, bench.prices)).encode())
    for path in sorted(bench.config.glob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _name_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
