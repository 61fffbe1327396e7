"""Files that are larger than they look, or no files: refused in one line, soon, and in little memory."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cachegen.format.files import TABLES_NAME, chunk_name
from cachegen.methods.profile_files import PROFILE_NAME
from cachegen.methods.transform.profile_storage import SYNTHESIS_NAME
from tests.fixtures.fault_documents import Documents, copy

pytestmark = pytest.mark.faults

SPARSE_BYTES = 3 << 30
SECONDS = 10
# Beyond what a script has at its start; what it imports late, and the model where it is loaded first, are part of it.
MAX_BYTES = 160 << 20


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def make_sparse(path: Path) -> None:
    """Whatever was there, with 3 GB of nothing behind it."""
    with open(path, "ab") as stream:
        stream.truncate(SPARSE_BYTES)


def announce_sparse(path: Path) -> None:
    """A chunk or tables file whose header says that the 3 GB belong to it; its checksum no longer matches."""
    make_sparse(path)
    with open(path, "r+b") as stream:
        stream.seek(16)
        stream.write(struct.pack("<Q", SPARSE_BYTES))


def make_nested(path: Path) -> None:
    path.write_bytes(b"[" * 200_000 + b"]" * 200_000)


def write_archive(path: Path, members: dict[str, bytes], **options: int) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:  # type: ignore[arg-type]
        for name, content in members.items():
            archive.writestr(name, content)


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def deflate(path: Path) -> None:
    """A gigabyte of zeros in a megabyte."""
    members = members_of(path)
    name = next(name for name in members if name.endswith("/1"))
    write_archive(path, {**members, name: bytes(1 << 30)}, compression=zipfile.ZIP_DEFLATED)


def put_bytearray(path: Path) -> None:
    """A pickle that asks for a terabyte in thirty bytes."""
    bomb = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R."
    write_archive(path, {n: bomb if n.endswith("data.pkl") else c for n, c in members_of(path).items()})


def share_storages(path: Path) -> None:
    """Thousands of planes, all of them views of one."""
    content = torch.load(path, weights_only=True)
    plane = torch.zeros(len(content["token_ids"]), 2, 64, dtype=torch.bfloat16)
    planes = [plane.view_as(plane) for _ in range(4_000)]
    torch.save({**content, "keys": planes, "values": [plane.view_as(plane) for plane in planes]}, path)


def add_members(path: Path) -> None:
    """A directory of 100,000 empty members."""
    path.write_bytes(path.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(100_000):
            archive.writestr(f"archive/{number:030}", b"")


@dataclass(frozen=True)
class Target:
    """A kind of file, and the script that reads it.

    Attributes:
        prepare: copies what the script reads below a folder, and returns the file to be made hostile and the flags.
    """

    script: str
    prepare: Callable[[Documents, Path], tuple[Path, Sequence[object]]]
    hostilities: tuple[Callable[[Path], None], ...]


ANY = (make_pipe, make_device, make_sparse)


def prepare_kv(documents: Documents, folder: Path) -> tuple[Path, Sequence[object]]:
    path = copy(documents.kv_path, folder / "kv.pkl")
    return path, [*documents.encode_flags("rans", folder / "out"), "--path_to_kv", path]


def prepare_encoded(name: str) -> Callable[[Documents, Path], tuple[Path, Sequence[object]]]:
    def prepare(documents: Documents, folder: Path) -> tuple[Path, Sequence[object]]:
        encoded = copy(documents.encoded("rans"), folder / "encoded")
        return encoded / name, documents.decode_flags(encoded)

    return prepare


def prepare_profile(name: str) -> Callable[[Documents, Path], tuple[Path, Sequence[object]]]:
    def prepare(documents: Documents, folder: Path) -> tuple[Path, Sequence[object]]:
        profile = copy(Path("models/tiny-mistral/profile"), folder / "profile")
        flags = [*documents.decode_flags(documents.encoded("transform")), "--profile", profile]
        return profile / name, flags

    return prepare


def prepare_config(documents: Documents, folder: Path) -> tuple[Path, Sequence[object]]:
    path = copy(Path("config/quantization_tiny.json"), folder / "config.json")
    return path, [*documents.encode_flags("rans", folder / "out"), "--quantization_config", path]


def prepare_context(documents: Documents, folder: Path) -> tuple[Path, Sequence[object]]:
    path = copy(documents.context, folder / "0.txt")
    return path, ["--path_to_context", path, "--save_dir", folder / "out"]


def prepare_stored(pattern: str) -> Callable[[Documents, Path], tuple[Path, Sequence[object]]]:
    def prepare(documents: Documents, folder: Path) -> tuple[Path, Sequence[object]]:
        store = copy(documents.folder / "store", folder / "store")
        # The pointer that is read first, and the rest: all of a kind, whichever it is.
        (first, *others) = sorted(store.glob(pattern))
        for other in others:
            other.unlink()
            other.symlink_to(first)
        return first, documents.remote_flags(store)

    return prepare


TARGETS = {
    "KV file": Target("run_encoding", prepare_kv, (*ANY, deflate, put_bytearray, share_storages, add_members)),
    "chunk": Target("run_decoding_disk", prepare_encoded(chunk_name(0)), (*ANY, announce_sparse)),
    "tables": Target("run_decoding_disk", prepare_encoded(TABLES_NAME), (*ANY, announce_sparse)),
    "profile": Target("run_decoding_disk", prepare_profile(PROFILE_NAME), (*ANY, make_nested)),
    "profile's tensors": Target("run_decoding_disk", prepare_profile(SYNTHESIS_NAME), ANY),
    "config": Target("run_encoding", prepare_config, (*ANY, make_nested)),
    "context": Target("main", prepare_context, (make_device, make_sparse)),
    "store.json": Target("run_decoding_remote", prepare_stored("store.json"), (*ANY, make_nested)),
    "pointer": Target("run_decoding_remote", prepare_stored("prefixes/*/*"), (*ANY, make_nested)),
    "manifest": Target("run_decoding_remote", prepare_stored("documents/*/*/*"), (*ANY, make_nested)),
}
CASES = [(name, hostility) for name, target in TARGETS.items() for hostility in target.hostilities]


@pytest.mark.parametrize(("name", "hostility"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_hostile_file_is_refused_in_little_memory(documents, tmp_path, name, hostility, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    target = TARGETS[name]
    path, argv = target.prepare(documents, tmp_path)
    hostility(path)
    file_bytes = path.stat().st_blocks * 512 if path.is_file() else 0
    outcome = documents.server.start(target.script, argv).wait(60)
    print(
        f"| {name} | {hostility.__name__} | {file_bytes:,} | {outcome.peak_bytes / 1e6:.0f} | {outcome.seconds:.2f} |"
    )
    assert outcome.seconds < SECONDS
    assert outcome.peak_bytes < MAX_BYTES + 4 * file_bytes, outcome
    if target.script == "run_decoding_remote" and outcome.exit_code == 0:
        return  # the text answered
    assert outcome.exit_code in (2, 3, 4, 5) and outcome.error_line, outcome
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
