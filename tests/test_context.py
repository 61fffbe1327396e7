"""Where a context's text may come from: files, and pipes until they end; nothing that never does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from cachegen.errors import InputError
from cachegen.pipeline import context
from cachegen.pipeline.context import read_context
from tests.fixtures import REPOSITORY


def test_a_context_is_read_as_it_is(tmp_path):
    (tmp_path / "0.txt").write_bytes("Zeile\r\nnoch eine: ü\n".encode())
    assert read_context(tmp_path / "0.txt") == "Zeile\r\nnoch eine: ü\n"


def test_a_pipe_is_read_until_its_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    text = "many words, more than a pipe holds. " * 10_000
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
    writer.start()
    assert read_context(tmp_path / "pipe") == text
    writer.join()


def test_a_context_may_come_from_standard_input():
    program = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'src')!r})\n"
        "from pathlib import Path; from cachegen.pipeline.context import read_context\n"
        "print(read_context(Path('/dev/stdin')))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=b"from a pipe", stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"from a pipe\n"


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/urandom"])
def test_a_device_is_refused_at_once(tmp_path, device):
    (tmp_path / "link.txt").symlink_to(device)
    for path in (tmp_path / "link.txt", tmp_path):
        with pytest.raises(InputError, match=f"{path}: cannot be read: is a (device|folder)"):
            read_context(path)


def test_a_context_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "MAX_CONTEXT_BYTES", 100)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "0.txt").write_text("x" * 101)
    (tmp_path / "1.txt").write_text("x" * 100)
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("x" * 101,))
    writer.start()
    with pytest.raises(InputError, match="pipe: sends more than the 100 bytes"):
        read_context(tmp_path / "pipe")
    writer.join()
    with pytest.raises(InputError, match=r"0.txt: has 101 bytes, more than the 100"):
        read_context(tmp_path / "0.txt")
    assert len(read_context(tmp_path / "1.txt")) == 100


def test_a_sparse_file_of_3_gb_is_refused_unread(tmp_path):
    with open(tmp_path / "0.txt", "wb") as stream:
        stream.truncate(3 << 30)
    with pytest.raises(InputError, match="more than the"):
        read_context(tmp_path / "0.txt")


@pytest.mark.parametrize(("content", "reason"), [(b"", "is empty"), (b"abc\xff", r"is not UTF-8 text \(byte 3\)")])
def test_what_is_no_text_is_refused(tmp_path, content, reason):
    (tmp_path / "0.txt").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_context(tmp_path / "0.txt")
