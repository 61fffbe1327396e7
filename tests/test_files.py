"""Whole files or none: atomic writes, and what is left after they fail."""

from __future__ import annotations

import errno
import os
import resource
import secrets

import pytest

from cachegen.errors import OutputError
from cachegen.files import atomic_write, is_temporary, remove_stale_temporaries, write_file


def test_a_file_appears_whole_and_only_at_the_end(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as stream:
        stream.write(b"one")
        stream.flush()
        assert not path.exists()
        stream.write(b"two")
    assert path.read_bytes() == b"onetwo"
    assert os.listdir(tmp_path) == ["file"]


def test_missing_folders_are_made(tmp_path):
    write_file(tmp_path / "a" / "b" / "file", b"x")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"


@pytest.mark.parametrize("exception", [ValueError("bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failed_block_leaves_the_old_file_and_nothing_else(tmp_path, exception):
    path = tmp_path / "file"
    write_file(path, b"old")
    with pytest.raises((type(exception), OutputError)), atomic_write(path) as stream:
        stream.write(b"half of the n")
        raise exception
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_beyond_the_size_limit_is_an_output_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OutputError, match=r"file: cannot be written: File too large"):
            write_file(tmp_path / "file", bytes(60_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_an_output_error(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match="cannot be written"):
        write_file(tmp_path / "file" / "below", b"y")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_folder_in_the_way_is_an_output_error_and_leaves_no_temporary(tmp_path):
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be written"):
        write_file(tmp_path / "file", b"y")
    assert os.listdir(tmp_path) == ["file"]


def test_stale_temporaries_are_swept_and_nothing_of_others(tmp_path, monkeypatch):
    with atomic_write(tmp_path / "file") as stream:
        (stale,) = tmp_path.iterdir()
        assert is_temporary(stale)
        monkeypatch.setattr(os, "replace", lambda source, target: None)
        stream.write(b"x")
    stale.write_bytes(b"a killed process left this")
    foreign = [".tmp-notes", ".tmp-", ".tmp-plan-of-2024", "tmp-file-0123456789ab", f"x.tmp-y-{secrets.token_hex(6)}"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"someone's")
        assert not is_temporary(tmp_path / name)
    remove_stale_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(foreign)


def test_what_is_not_a_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OutputError, match=f"{name}: cannot be written: is not a file"):
            write_file(tmp_path / name, b"x")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()
