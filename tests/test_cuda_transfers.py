"""Copies to a GPU that overlap with decoding: right on a device that does everything as late as events allow."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cachegen.coder import cpu, cuda_transfers
from cachegen.coder.cpu_kernels import CPU
from cachegen.errors import BitstreamError, InputError, MismatchError
from cachegen.format import Coder
from cachegen.format.files import chunk_name
from cachegen.kv_cache import KVCache
from cachegen.methods import load_config, parse_chunk
from cachegen.methods.absmax.codec import AbsmaxEncoder, build_chunk, read_scales
from cachegen.methods.absmax.headers import AbsmaxChunkHeader
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from tests import emulation
from tests.cuda_checks import Encoded
from tests.cuda_component_checks import decode_transform_document, make_transform_document
from tests.fixtures.caches import allocate_like, are_equal, make_metadata, make_shaped_cache
from tests.late_device import SCHEDULES, LateDevice, check_chunks, late_kernels, make_chunks

HOST = torch.device("cpu")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return emulation.load(emulation.build())


@pytest.fixture(scope="module")
def chunks() -> list[Encoded]:
    return make_chunks()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_chunks_in_flight_do_not_touch_each_other(module, chunks, schedule: str) -> None:
    check_chunks(late_kernels(module, LateDevice(schedule)), chunks)
    check_chunks(late_kernels(module, LateDevice(schedule)), chunks[::-1])


@pytest.mark.parametrize("num_levels", [1, 3])
def test_components_of_all_levels_are_there_when_a_chunk_is_finished(module, num_levels: int) -> None:
    _, encoder, files = make_transform_document(CPU)
    kernels = late_kernels(module, LateDevice("late copies"))  # the matrix products are not the module's to delay
    kernels.synthesis = None  # as on the CPU, to the last bit
    found = decode_transform_document(kernels, encoder, files, num_levels)
    assert are_equal(found, decode_transform_document(CPU, encoder, files, num_levels))


def test_what_is_abandoned_takes_its_buffers_with_it(module, chunks) -> None:
    kernels = late_kernels(module, LateDevice("all late"))
    transfers = kernels._transfers_of[HOST]
    for _ in range(3):
        abandoned = transfers.reserve([64])
        transfers.start(abandoned)  # and then Ctrl-C: nobody says when its readers have ended
    check_chunks(kernels, chunks)


MUTATIONS = {
    "kernels do not wait for the copy": ("self.operations.wait(buffers.copied)", "pass"),
    "pinned memory is filled while it is copied": ("self.operations.synchronize(buffers.copied)", "pass"),
    "a copy does not wait for the kernels that read": (
        "start_upload(source, target, buffers.used)",
        "start_upload(source, target, buffers.copied)",
    ),
    "nobody says when the kernels have read": ("upload.buffers.used = self.operations.record()", "pass"),
    "statuses are read before they are there": ("self._operations.synchronize(self._copied)", "pass"),
    "statuses are copied before the kernels": ("self.operations.start_download(values, host)", "host.copy_(values)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_missing_wait_is_noticed(tmp_path: Path, name: str) -> None:
    source, (line, mutated) = Path(cuda_transfers.__file__).read_text("utf-8"), MUTATIONS[name]
    assert source.count(line) == 1, "the transfers have changed: adapt the mutation"
    (tmp_path / "mutated.py").write_text(source.replace(line, mutated), "utf-8")
    # In a process of its own: kernels may crash on what they find.
    command = [sys.executable, "-m", "tests.late_device", str(emulation.build()), str(tmp_path / "mutated.py")]
    result = subprocess.run(
        command, cwd=emulation.ROOT, env={"PYTHONPATH": "src"}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode < 0 or result.stdout.startswith("differs: "), result.stdout + result.stderr


# --- the disk pipeline ------------------------------------------------------------------------------------------------

CACHE, METADATA = make_shaped_cache([(2, 16)] * 4, 90, torch.float16), make_metadata(90)


@pytest.fixture
def folder(tmp_path: Path, config_path: Path) -> Path:
    """Four chunks."""
    config = load_config(config_path)
    encode_document(AbsmaxEncoder(CACHE, METADATA, config, (33, 20, 32, 5), Coder.RANS), tmp_path / "encoded")
    return tmp_path / "encoded"


def decode(folder: Path, kernels, progress: Callable[[int], object] | None = None) -> KVCache:
    encoded, output = EncodedFolder(folder, 1, kernels), allocate_like(CACHE, 90)
    encoded.decode_into(output, METADATA.token_ids, encoded.select_chunks(None), progress)
    return output


def corrupt_states(path: Path) -> None:
    """Change a chunk's first stream in a way that only its decoder can notice."""
    chunk = parse_chunk(path.read_bytes())
    assert isinstance(chunk.header, AbsmaxChunkHeader)
    payload = bytearray(chunk.payload)
    payload[0] ^= 1
    streams = [*chunk.header.streams]
    streams[0] = streams[0]._replace(crc=cpu.crc32c(bytes(payload[: streams[0].num_bytes])))
    header = dataclasses.replace(chunk.header, stream_index=b"")
    path.write_bytes(b"".join(build_chunk(header, read_scales(chunk), streams, [bytes(payload)])))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_folder_decodes_while_the_next_chunk_is_copied(module, folder: Path, schedule: str) -> None:
    device, progress = LateDevice(schedule), []
    assert are_equal(decode(folder, late_kernels(module, device), progress.append), decode(folder, CPU))
    assert progress == [33, 20, 32, 5]
    waits = [event for event in device.log if event != "synchronize copy"]
    assert waits == ["upload", "upload", "synchronize compute"] + ["upload", "synchronize compute"] * 2 + [
        "synchronize compute"
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("later", ["whole", "corrupt", "missing", "cut", "another's"])
def test_an_error_names_the_first_chunk_that_is_corrupt(module, folder: Path, schedule: str, later: str) -> None:
    paths = [folder / chunk_name(index) for index in range(4)]
    corrupt_states(paths[1])
    if later == "corrupt":
        corrupt_states(paths[2])
    elif later == "missing":
        paths[2].unlink()
    elif later == "cut":
        paths[2].write_bytes(paths[2].read_bytes()[:-1])
    elif later == "another's":
        paths[2].write_bytes(paths[3].read_bytes())
    progress: list[int] = []
    with pytest.raises(BitstreamError) as found:
        decode(folder, late_kernels(module, LateDevice(schedule)), progress.append)
    assert paths[1].name in str(found.value) and "stream 0" in str(found.value)
    assert progress == [33]


def test_an_error_of_a_later_chunk_comes_after_the_whole_ones(module, folder: Path) -> None:
    path, progress = folder / chunk_name(2), []
    path.write_bytes((folder / chunk_name(3)).read_bytes())
    with pytest.raises(MismatchError, match=path.name):
        decode(folder, late_kernels(module, LateDevice("all late")), progress.append)
    assert progress == [33, 20]
    path.unlink()
    with pytest.raises(InputError, match=path.name):
        decode(folder, late_kernels(module, LateDevice("all late")))
