"""The versions that results depend on."""

from __future__ import annotations

import importlib.metadata
import platform

import cachegen


def collect_versions() -> dict[str, str | None]:
    """Return the versions that results depend on; None for a package that is not installed."""
    versions: dict[str, str | None] = {"cachegen": cachegen.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
