"""What is refused before torch opens a KV file: zips of another make, pickles of more than plain values."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cachegen.errors import BitstreamError, InputError
from cachegen.kv_archive import check_archive, is_damaged_kv_file
from cachegen.kv_cache import load_kv_cache
from tests.fixtures.caches import save_cache


def members_of(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def write_archive(path: Path, members: list[tuple[str, bytes]], **options: Any) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **options) as archive:
        warnings.simplefilter("ignore")  # on names that stand there twice
        for name, content in members:
            member = zipfile.ZipInfo(name)
            member.compress_type = options.get("compression", zipfile.ZIP_STORED)
            num_padding = -(path.stat().st_size + 34 + len(name)) % 64  # as torch.save does
            member.extra = struct.pack("<HH", 0xCAFE, num_padding) + bytes(num_padding)
            archive.writestr(member, content)
            archive.fp.flush()


def replace_pickle(path: Path, content: bytes) -> None:
    """Put another pickle into a KV file; zipfile makes its checksum right."""
    write_archive(path, [(name, content if name.endswith("data.pkl") else old) for name, old in members_of(path)])


def pickle_code() -> dict[str, bytes]:
    return {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}


CODE = pickle_code()


@pytest.fixture
def path(tmp_path) -> Path:
    return save_cache(tmp_path / "kv.pkl", 8)


def test_what_save_kv_cache_writes_passes(path):
    with check_archive(path):
        write_archive(path, members_of(path))
    with check_archive(path):
        pass


def test_a_name_that_stands_there_twice_is_refused(path):
    members = members_of(path)
    write_archive(path, [*members, members[-1]])
    with pytest.raises(BitstreamError, match="a member of the zip stands there twice"):
        load_kv_cache(path)


def test_a_compressed_member_is_refused(path):
    members = [(name, bytes(1 << 22) if name.endswith("/0") else content) for name, content in members_of(path)]
    write_archive(path, members, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(BitstreamError, match="a member of the zip is compressed"):
        load_kv_cache(path)


def test_a_comment_and_bytes_before_the_zip_are_refused(path):
    content = path.read_bytes()
    path.write_bytes(b"#!/bin/sh\n" + content)
    with pytest.raises(BitstreamError, match="does not begin as one"):
        load_kv_cache(path)
    path.write_bytes(content[:-2] + struct.pack("<H", 4) + b"more")
    with pytest.raises(BitstreamError, match="has a comment"):
        load_kv_cache(path)


def test_members_of_several_folders_are_refused(path):
    write_archive(path, [*members_of(path), ("other/data.pkl", b"")])
    with pytest.raises(BitstreamError, match="members of several folders"):
        load_kv_cache(path)


def test_members_that_share_their_bytes_are_no_more_than_the_file(path):
    """Two directory entries for one span: `zipfile` writes none, so the size of one is raised by hand."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
    struct.pack_into("<II", content, entry + 20, 1 << 30, 1 << 30)
    path.write_bytes(content)
    with pytest.raises(BitstreamError, match="larger than the file"):
        load_kv_cache(path)


def test_a_huge_directory_is_refused_unread(path):
    write_archive(path, [*members_of(path), *((f"archive/{'x' * 60_000}{i}", b"") for i in range(80))])
    with pytest.raises(BitstreamError, match="its directory is too large"):
        load_kv_cache(path)


def test_a_huge_pickle_is_refused_unread(path):
    replace_pickle(path, bytes(3 << 20))
    with pytest.raises(BitstreamError, match="its pickle is larger than"):
        load_kv_cache(path)


def test_a_flipped_bit_of_the_pickle_is_found_by_the_zips_checksum(path):
    content = bytearray(path.read_bytes())
    at = content.index(b"block_size")
    content[at + 14] ^= 4
    path.write_bytes(content)
    with pytest.raises(BitstreamError, match="Bad CRC-32"):
        load_kv_cache(path)


@pytest.mark.parametrize(
    "value",
    [
        bytearray(5),
        complex(1, 2),
        {1, 2},
        collections.Counter("a"),
        torch.float16,
        torch.Size([3]),
        torch.nn.Linear(2, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_torch_would_load_and_no_kv_file_holds_is_refused(tmp_path, value):
    torch.save({"format": "cachegen-kv", "keys": value}, tmp_path / "kv.pkl")
    with pytest.raises(BitstreamError, match="nothing of it was run"):
        load_kv_cache(tmp_path / "kv.pkl")


def test_thirty_bytes_that_would_take_a_terabyte_are_refused(path):
    bomb = b"\x80\x02c__builtin__\nbytearray\n" + CODE["LONG1"] + b"\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R."
    replace_pickle(path, bomb)
    with pytest.raises(BitstreamError, match="GLOBAL __builtin__ bytearray"):
        load_kv_cache(path)


def test_tuples_of_tuples_that_are_hashed_without_end_are_refused(path):
    """t1 = (t0, t0), t2 = (t1, t1), ...: a hundred small steps, and the hash of the last takes 2^100."""
    steps = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + CODE["TUPLE2"] + b"q" + bytes([i + 1]) for i in range(100))
    replace_pickle(path, b"\x80\x02}(K\x01K\x02" + CODE["TUPLE2"] + b"q\x00" + steps + b"K\x01u.")
    with pytest.raises(BitstreamError, match="stands in two places"):
        load_kv_cache(path)


def test_bytes_after_the_pickle_are_refused(path):
    replace_pickle(path, pickle.dumps({"format": "cachegen-kv"}, 2) + b"more")
    with pytest.raises(BitstreamError, match="bytes after its pickle"):
        load_kv_cache(path)


def test_planes_of_one_storage_make_no_more_of_a_file_than_it_is(path):
    content = torch.load(path, weights_only=True)
    planes = [torch.zeros(8, 1, 8).half()] * 200
    torch.save({**content, "keys": planes, "values": planes[:]}, path)
    with pytest.raises(BitstreamError, match="the tensors are larger than the file"):
        load_kv_cache(path)


def test_storages_of_one_span_of_bytes_make_no_more_of_a_file_than_it_is(path):
    """The pickle names a storage's member; here, all planes name the first, as storages of their own."""
    content = torch.load(path, weights_only=True)
    planes = [torch.zeros(8, 1, 256).half() + i for i in range(20)]
    torch.save({**content, "keys": planes, "values": planes[:]}, path)
    members = dict(members_of(path))
    name = next(name for name in members if name.endswith("data.pkl"))
    folder = name.split("/")[0]
    text = members[name]
    for key in range(20, 1, -1):
        old, new = (CODE["BINUNICODE"] + struct.pack("<I", len(k)) + k for k in (str(key).encode(), b"1"))
        assert old in text
        text = text.replace(old, new)
        del members[f"{folder}/data/{key}"]
    write_archive(path, [(n, text if n == name else c) for n, c in members.items()])
    with pytest.raises(BitstreamError, match="larger than the file"):
        load_kv_cache(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "kv.pkl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as stream:
            stream.truncate(3 << 30)
    with pytest.raises((InputError, BitstreamError)) as caught:
        load_kv_cache(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_damaged_kv_file_is_known_by_its_beginning(path, tmp_path):
    content = path.read_bytes()
    damaged = [content[:length] for length in (0, 40, 1000, len(content) - 1)]
    damaged += [content[:20] + b"\xff" * 40 + content[60:], bytes(64) + content[64:], content[:-30] + bytes(30)]
    for number, changed in enumerate(damaged):
        path.write_bytes(changed)
        assert is_damaged_kv_file(path) is (number != 1 or b"data.pkl" in changed), number


def test_what_is_whole_and_something_else_is_no_damaged_kv_file(tmp_path):
    path = tmp_path / "kv.pkl"
    torch.save({"weights": torch.zeros(3)}, path)
    assert not is_damaged_kv_file(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert is_damaged_kv_file(path)  # no one can tell what it was, but that torch did not finish it
    path.write_bytes(pickle.dumps({"keys": [1, 2]}))
    assert not is_damaged_kv_file(path)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr("word/document.xml", "a letter")
    for content in (archive.getvalue(), archive.getvalue()[:-10], b"a letter", b"PK\3\4"):
        path.write_bytes(content)
        assert not is_damaged_kv_file(path)
