"""Download and unpack the Debian packages that the prompts and the bundled model are made from.

    python tools/fetch_packages.py prompts FOLDER
    python tools/fetch_packages.py model FOLDER

Nothing is installed: `apt-get download` fetches from the archive that the machine is set up for
(Debian 12, after `apt-get update`), and `dpkg -x` unpacks each package into FOLDER/<package>.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

PROMPT_PACKAGES = {
    "apache2-doc": "2.4.71-1~deb12u1",
    "bible-kjv-text": "4.38",
    "postgresql-doc-15": "15.20-0+deb12u1",
    "python3.11-doc": "3.11.2-6+deb12u9",
}
"""Packages of 9k_prompts with the versions that its files were made from."""

MODEL_PACKAGES = (
    "apache2-doc",
    "bible-kjv-text",
    "debian-handbook",
    "debian-policy",
    "debian-reference-en",
    "developers-reference",
    "fortunes",
    "fortunes-min",
    "gimp-help-en",
    "git-doc",
    "gnumeric-doc",
    "installation-guide-amd64",
    "maint-guide",
    "perl-doc",
    "postgresql-doc-15",
    "python3.11-doc",
)
"""Packages of the bundled model's training text, in whatever version the archive has."""


def unpacked_version(folder: Path, package: str) -> str:
    """Read an unpacked package's version from its changelog.

    Raises:
        FileNotFoundError: `folder` does not hold the package.
    """
    documents = folder / package / "usr/share/doc" / package
    for name in ("changelog.Debian.gz", "changelog.gz"):
        if (documents / name).is_file():
            with gzip.open(documents / name, "rt", encoding="utf-8") as changelog:
                match = re.match(r"\S+ \((?:\d+:)?([^)]+)\)", changelog.readline())
            if match:
                return match[1]
    raise FileNotFoundError(f"{documents} has no Debian changelog: is {package} unpacked there?")


def fetch(packages: Sequence[str], folder: Path) -> None:
    """Download `packages` (names, or name=version) and unpack each into `folder`/<name>."""
    with tempfile.TemporaryDirectory() as downloads:
        subprocess.run(["apt-get", "download", *packages], cwd=downloads, check=True)
        for archive in sorted(Path(downloads).glob("*.deb")):
            target = folder / archive.name.split("_")[0]
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Download and unpack Debian packages.")
    parser.add_argument("purpose", choices=("prompts", "model"))
    parser.add_argument("folder", type=Path, help="where to unpack, one folder per package")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = build_parser().parse_args(argv)
    if args.purpose == "prompts":
        packages = [f"{name}={version}" for name, version in PROMPT_PACKAGES.items()]
    else:
        packages = list(MODEL_PACKAGES)
    fetch(packages, args.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
