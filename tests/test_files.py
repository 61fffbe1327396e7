"""Whole files or none: atomic writes, and what is left after they fail."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import secrets
import signal
import subprocess
import sys
import time

import pytest

from cachegen.errors import InputError, OutputError, OutputExistsError
from cachegen.files import atomic_write, is_temporary, lock_folder, read_file, remove_stale_temporaries, write_file


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


WRITER = """
import sys, time
from cachegen.files import atomic_write
with atomic_write(sys.argv[1]) as stream:
    stream.write(b"half")
    stream.flush()
    print("writing", flush=True)
    sys.stdin.read(1)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process, half through the writing of `file`; a byte into its stdin lets it finish."""
    arguments = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        yield process
        process.kill()


def test_a_sweep_leaves_what_a_living_process_is_writing(tmp_path, writer):
    remove_stale_temporaries(tmp_path)
    assert len(os.listdir(tmp_path)) == 1
    writer.communicate(b"\n")
    assert writer.returncode == 0
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"half"


def test_a_sweep_removes_what_a_killed_process_was_writing(tmp_path, writer):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    remove_stale_temporaries(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_writer_whose_file_was_swept_before_its_lock_makes_another(tmp_path, monkeypatch):
    lock, num_swept = fcntl.flock, 0

    def sweep_first(descriptor: int, operation: int) -> None:
        nonlocal num_swept
        if operation == fcntl.LOCK_EX and num_swept < 3:
            num_swept += 1
            for path in tmp_path.iterdir():
                path.unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    write_file(tmp_path / "file", b"x")
    assert num_swept == 3
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"x"


def refuse_to_lock(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@pytest.mark.parametrize(("age_seconds", "is_left"), [(60, True), (-3600, True), (2 * 24 * 3600, False)])
def test_where_nothing_can_be_locked_a_sweep_removes_what_is_a_day_old(tmp_path, monkeypatch, age_seconds, is_left):
    monkeypatch.setattr(fcntl, "flock", refuse_to_lock)
    write_file(tmp_path / "file", b"x")
    stale = tmp_path / f".tmp-file-{secrets.token_hex(6)}"
    stale.write_bytes(b"x")
    os.utime(stale, (time.time() - age_seconds,) * 2)
    remove_stale_temporaries(tmp_path)
    assert stale.exists() is is_left


def test_a_sweep_follows_no_link_and_waits_at_no_pipe(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / ".tmp-link-0123456789ab").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / ".tmp-pipe-0123456789ab")
    remove_stale_temporaries(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_file_that_may_not_be_replaced_stays(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"mine", replace=False)
    with (
        pytest.raises(OutputExistsError, match="late: is there already"),
        atomic_write(tmp_path / "late", replace=False) as stream,
    ):
        stream.write(b"y")
        write_file(tmp_path / "late", b"another process was faster")
    with pytest.raises(OutputExistsError):
        write_file(path, b"theirs", replace=False)
    assert path.read_bytes() == b"mine"
    assert (tmp_path / "late").read_bytes() == b"another process was faster"
    assert sorted(os.listdir(tmp_path)) == ["file", "late"]


def test_a_file_system_without_hard_links_replaces_nothing_either(tmp_path, monkeypatch):
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    write_file(tmp_path / "file", b"mine", replace=False)
    with pytest.raises(OutputExistsError):
        write_file(tmp_path / "file", b"theirs", replace=False)
    assert (tmp_path / "file").read_bytes() == b"mine" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "a b\nc", os.fsdecode(b"latin-\xe9")])
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path, name):
    with atomic_write(tmp_path / name) as stream:
        stream.write(b"x")
        (temporary,) = tmp_path.iterdir()
        assert is_temporary(temporary)
    assert os.listdir(tmp_path) == [name]


HOLDER = """
import sys
from cachegen.files import lock_folder
with lock_folder(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read(1)
"""


def test_a_locked_folder_is_refused_in_one_line_until_its_holder_has_died(tmp_path):
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        expected = pytest.raises(OutputError, match="another process is writing into this folder")
        with expected as caught, lock_folder(tmp_path):
            pass
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
        holder.kill()
        holder.wait()
        with lock_folder(tmp_path):
            assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_locked_is_worked_in_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse_to_lock)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass


def test_only_a_folder_can_be_locked(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for name in ("file", "missing"):
        with pytest.raises(OutputError, match=f"{name}: cannot be opened"), lock_folder(tmp_path / name):
            pass


def test_a_file_is_read_whole_up_to_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"\0\r\n")
    assert read_file(tmp_path / "file", 3) == b"\0\r\n"
    with pytest.raises(InputError, match="file: has 3 bytes, more than the 2 that a file may have"):
        read_file(tmp_path / "file", 2)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", r"no such file \(make one\)"),
        ("below", "no such file"),
        ("folder", "is a folder, where a file is needed"),
        ("pipe", "is a pipe, where a file is needed"),
        ("device", "is a device or a socket, where a file is needed"),
        ("sparse", "more than the 1048576 that"),
        ("loop", "Too many levels of symbolic links"),
    ],
)
def test_what_cannot_be_read_whole_is_refused_at_once(tmp_path, kind, reason):
    path = tmp_path / "file"
    if kind == "below":
        path.write_bytes(b"")
        path = path / "file"
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with open(path, "wb") as stream:
            stream.truncate(3 << 30)
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(InputError, match=f"file: .*{reason}"):
        read_file(path, 1 << 20, hint="make one")
