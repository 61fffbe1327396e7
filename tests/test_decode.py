"""From a folder to a cache: exactly what was quantized, or an error that names file and field."""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachegen.errors import BitstreamError, ConfigError, InputError, MismatchError, UnsupportedVersionError
from cachegen.format import Coder
from cachegen.kv_cache import KVCache, hash_rotary_embeddings
from cachegen.methods import load_config, parse_chunk
from cachegen.methods.absmax.codec import AbsmaxDocument, AbsmaxEncoder
from cachegen.pipeline import document_files, prefill
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from cachegen.pipeline.model_cache import allocate_cache
from tests.fixtures import read_folder
from tests.fixtures.absmax import decode_folder, make_encoder, quantize_and_dequantize, write_config
from tests.fixtures.caches import allocate_like, are_equal, make_cache, make_metadata
from tests.fixtures.models import make_layout

CACHE, METADATA = make_cache(60), make_metadata(60)


@pytest.fixture
def folder(tmp_path, config_path) -> Path:
    """An encoding of CACHE in three chunks of 20 tokens."""
    path = tmp_path / "encoded"
    encode_document(make_encoder(CACHE, METADATA, config_path, (20, 20, 20)), path)
    return path


@pytest.fixture
def tiny_files(tmp_path, config_path, monkeypatch) -> dict[str, bytes]:
    """One chunk of a very small cache; decoding reads this dictionary rather than the disk."""
    cache, metadata = make_cache(5, num_layers=1, head_dim=2), make_metadata(5)
    encode_document(make_encoder(cache, metadata, config_path, (5,)), tmp_path / "tiny")
    files = read_folder(tmp_path / "tiny")
    monkeypatch.setattr(document_files, "read_whole", lambda path: files[Path(path).name])
    return files


def decode_tiny() -> KVCache:
    return decode_folder(Path("tiny"), make_cache(5, num_layers=1, head_dim=2), make_metadata(5).token_ids)


def expected_cache(config_path: Path) -> KVCache:
    return quantize_and_dequantize(CACHE, load_config(config_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("coder", Coder)
@pytest.mark.parametrize("fields", [{}, {"key_first_bins": 256, "value_first_bins": 4, "value_second_bins": 38}, None])
def test_a_decoded_cache_is_the_quantized_one_bit_for_bit(tmp_path, dtype, coder, fields):
    path = tmp_path / "config.json"
    if fields is None:
        path.write_text('{"method": "uniform", "bits": 8}')
    else:
        write_config(path, **fields)
    cache = make_cache(70, num_layers=3, num_kv_heads=2, head_dim=16, dtype=dtype)
    cache.values = [value[:, :1, :10].contiguous() for value in cache.values]  # of another shape than the keys
    config = load_config(path)
    metadata = make_metadata(70)
    encode_document(AbsmaxEncoder(cache, metadata, config, (33, 36, 1), coder), tmp_path / "encoded")
    decoded = decode_folder(tmp_path / "encoded", cache, metadata.token_ids)
    assert are_equal(decoded, quantize_and_dequantize(cache, config))


@pytest.mark.parametrize("chunk_size", [1, 2, 31, 32, 33, 59, 60])
def test_chunk_sizes_do_not_change_what_is_decoded(tmp_path, config_path, chunk_size):
    chunks = tuple(min(chunk_size, 60 - start) for start in range(0, 60, chunk_size))
    encode_document(make_encoder(CACHE, METADATA, config_path, chunks), tmp_path / "encoded")
    assert are_equal(decode_folder(tmp_path / "encoded", CACHE, METADATA.token_ids), expected_cache(config_path))


def test_the_first_chunks_decode_without_the_others(folder, config_path):
    (folder / "chunk_00002.L1.cgc").unlink()
    decoded = decode_folder(folder, CACHE, METADATA.token_ids, num_chunks=2)
    assert are_equal(decoded.slice(0, 40), expected_cache(config_path).slice(0, 40))
    assert all(torch.isnan(plane[40:]).all() for plane in decoded.planes)


def test_more_chunks_than_there_are_are_refused(folder):
    encoded = EncodedFolder(folder, 1)
    assert encoded.select_chunks(None) == (20, 20, 20) and encoded.select_chunks(1) == (20,)
    with pytest.raises(ConfigError, match="`num_chunks` 4 asked for, 3 are there"):
        encoded.select_chunks(4)


def test_tokens_that_are_all_zero_come_back_as_zeros(tmp_path, config_path):
    cache = make_cache(60)
    for plane in cache.planes:
        plane[[0, 7, 59]] = 0
    encode_document(make_encoder(cache, METADATA, config_path, (60,)), tmp_path / "encoded")
    decoded = decode_folder(tmp_path / "encoded", cache, METADATA.token_ids)
    assert are_equal(decoded, quantize_and_dequantize(cache, load_config(config_path)))
    assert all((plane[[0, 7, 59]] == 0).all() for plane in decoded.planes)


def test_the_output_may_be_strided_as_a_models_cache_is(folder, config_path):
    buffers = [torch.full((1, 100, 8), torch.nan, dtype=torch.float16) for _ in CACHE.planes]
    views = [buffer.permute(1, 0, 2)[:60] for buffer in buffers]
    encoded = EncodedFolder(folder, 2)
    encoded.decode_into(KVCache(views[0::2], views[1::2]), METADATA.token_ids, encoded.select_chunks(None))
    assert are_equal(KVCache(views[0::2], views[1::2]), expected_cache(config_path))
    assert all(torch.isnan(buffer[:, 60:]).all() for buffer in buffers)


def test_the_result_counts_tokens_and_the_bytes_that_were_read(folder):
    encoded, progress = EncodedFolder(folder, 1), []
    result = encoded.decode_into(allocate_like(CACHE), METADATA.token_ids, encoded.select_chunks(2), progress.append)
    files = read_folder(folder)
    assert result.num_tokens == 40 and progress == [20, 20]
    assert result.encoded_bytes == sum(len(files[name]) for name in files if name != "chunk_00002.L1.cgc")


def test_the_next_chunk_is_read_while_one_decodes(folder, monkeypatch):
    reading = {f"chunk_0000{index}.L1.cgc": threading.Event() for index in range(3)}
    read, start_decoding, num_decoded = document_files.read_whole, AbsmaxDocument.start_decoding, [0]

    def note_and_read(path):
        if path.name in reading:
            reading[path.name].set()
        return read(path)

    def wait_for_the_next(*args, **kwargs):
        next_name = f"chunk_0000{num_decoded[0] + 1}.L1.cgc"
        assert num_decoded[0] == 2 or reading[next_name].wait(timeout=30)
        num_decoded[0] += 1
        return start_decoding(*args, **kwargs)

    monkeypatch.setattr(document_files, "read_whole", note_and_read)
    monkeypatch.setattr(AbsmaxDocument, "start_decoding", wait_for_the_next)
    decode_folder(folder, CACHE, METADATA.token_ids)
    assert num_decoded == [3]


def test_a_truncated_file_is_refused_at_every_length(tiny_files):
    decode_tiny()
    for name, content in list(tiny_files.items()):
        for length in range(len(content)):
            tiny_files[name] = content[:length]
            with pytest.raises(BitstreamError, match=re.escape(name)):
                decode_tiny()
        tiny_files[name] = content


@pytest.mark.parametrize("tail", [b"\0", bytes(16), b"KVC"])
def test_a_file_with_something_after_it_is_refused(tiny_files, tail):
    for name, content in list(tiny_files.items()):
        tiny_files[name] = content + tail
        with pytest.raises(BitstreamError, match="the file is not whole"):
            decode_tiny()
        tiny_files[name] = content


def test_every_flipped_bit_of_every_file_is_detected(tiny_files):
    for name, content in list(tiny_files.items()):
        for position in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[position // 8] ^= 1 << position % 8
            tiny_files[name] = bytes(damaged)
            with pytest.raises((BitstreamError, MismatchError)):
                decode_tiny()
        tiny_files[name] = content
    decode_tiny()


@pytest.mark.parametrize("name", ["tables.cgt", "chunk_00000.L1.cgc", "chunk_00001.L1.cgc", "chunk_00002.L1.cgc"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"encoded/{name}: no such file \(encode the document again"):
        decode_folder(folder, CACHE, METADATA.token_ids)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/tables.cgt: no such file"):
        EncodedFolder(tmp_path / "nowhere", 1)


def encode_otherwise(tmp_path: Path, what: str) -> Path:
    """Encode a document that differs from that of `folder` in one thing."""
    cache, config_path, chunks, changes = CACHE, write_config(tmp_path / "other.json"), (20, 20, 20), {}
    if what in ("model_fingerprint", "rope_hash", "token_hash"):
        rotary = dataclasses.replace(METADATA.rotary_embeddings[0], inv_freq=(1.0, 0.5))
        changes = {
            "model_fingerprint": {"model_fingerprint": "cd" * 32},
            "rope_hash": {"rotary_embeddings": (rotary,)},
            "token_hash": {"token_ids": METADATA.token_ids.flip(0)},
        }[what]
    if what == "tables_hash":
        cache = make_cache(60, seed=1)
    if what == "dtype":
        cache = make_cache(60, dtype=torch.bfloat16)
    if what == "planes: bins":
        write_config(config_path, value_second_bins=14)
    if what == "planes: layers":
        cache = make_cache(60, num_layers=3)
    if what == "planes: shape":
        cache = make_cache(60, num_kv_heads=2)
    if what == "method":
        config_path.write_text('{"method": "uniform", "bits": 5, "coder": "rans"}')
    if what == "first_token":
        chunks = (30, 20, 10)
    if what == "num_tokens":
        chunks = (20, 30, 10)
    metadata = dataclasses.replace(METADATA, **changes)
    encode_document(make_encoder(cache, metadata, config_path, chunks), tmp_path / "other")
    return tmp_path / "other"


DIFFERENCES = [
    "model_fingerprint",
    "rope_hash",
    "token_hash",
    "tables_hash",
    "dtype",
    "planes: bins",
    "planes: layers",
    "planes: shape",
    "method",
    "first_token",
    "num_tokens",
]


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_chunk_of_elsewhere_is_refused_by_field(tmp_path, folder, what):
    shutil.copy(encode_otherwise(tmp_path, what) / "chunk_00001.L1.cgc", folder)
    field = "num_layers" if what == "planes: layers" else what.partition(":")[0]
    with pytest.raises(
        MismatchError, match=rf"encoded/chunk_00001.L1.cgc: {field} is .*the chunk is of another document"
    ):
        decode_folder(folder, CACHE, METADATA.token_ids)


def test_a_tables_file_of_elsewhere_is_refused(tmp_path, folder):
    shutil.copy(encode_otherwise(tmp_path, "tables_hash") / "tables.cgt", folder)
    encoded = EncodedFolder(folder, 1)
    shapes = encoded.plane_shapes
    planes = [torch.zeros(60, *shape, dtype=encoded.dtype) for shape in shapes]
    with pytest.raises(MismatchError, match=r"encoded/chunk_00000.L1.cgc: tables_hash is "):
        encoded.decode_into(
            KVCache(planes[0::2], planes[1::2]), METADATA.token_ids, encoded.document.header.chunk_tokens
        )


def test_chunks_in_another_order_are_refused(folder):
    (folder / "chunk_00000.L1.cgc").rename(folder / "x")
    (folder / "chunk_00001.L1.cgc").rename(folder / "chunk_00000.L1.cgc")
    (folder / "x").rename(folder / "chunk_00001.L1.cgc")
    with pytest.raises(MismatchError, match=r"chunk_00000.L1.cgc: first_token is 20, but .* say 0"):
        decode_folder(folder, CACHE, METADATA.token_ids)


def test_a_chunk_that_names_another_profile_is_refused(folder):
    path = folder / "chunk_00001.L1.cgc"
    content = path.read_bytes()
    header = parse_chunk(content).header
    changed = dataclasses.replace(header, profile_hash=b"p" * 32).pack()
    path.write_bytes(changed + content[header.header_bytes :])
    with pytest.raises(MismatchError, match="profile_hash is 7070"):
        decode_folder(folder, CACHE, METADATA.token_ids)


@pytest.mark.parametrize("name", ["tables.cgt", "chunk_00001.L1.cgc"])
@pytest.mark.parametrize("version", [0, 2, 65535])
def test_another_format_version_is_refused_by_number(folder, name, version):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[8:10] = version.to_bytes(2, "little")
    path.write_bytes(content)
    message = rf"{name}, byte 8, field version: {version} is not supported, this release reads 1"
    with pytest.raises(UnsupportedVersionError, match=message):
        decode_folder(folder, CACHE, METADATA.token_ids)


def test_a_chunk_under_the_tables_name_is_refused(folder):
    shutil.copy(folder / "chunk_00000.L1.cgc", folder / "tables.cgt")
    with pytest.raises(BitstreamError, match=r"tables.cgt, byte 0, field magic: not a tables file of cachegen"):
        EncodedFolder(folder, 1)


@pytest.mark.parametrize("position", [0, 19, 20, 39])
def test_another_context_is_refused_by_the_chunk_in_which_it_begins_to_differ(folder, position):
    token_ids = METADATA.token_ids.clone()
    token_ids[position] += 1
    with pytest.raises(MismatchError, match=rf"chunk_0000{position // 20}.L1.cgc: token_hash is "):
        decode_folder(folder, CACHE, token_ids)


class TestCheckContext:
    """check_context, before anything is decoded."""

    def test_the_context_itself_and_one_with_more_text_pass(self, folder):
        for num_more in (1, 2, 500):
            token_ids = torch.cat([METADATA.token_ids, torch.arange(num_more, dtype=torch.int32)])
            EncodedFolder(folder, 1).check_context(token_ids, 60, "text")

    @pytest.mark.parametrize("num_tokens", [1, 40, 59, 60])
    def test_a_context_that_ends_within_the_cache_is_refused(self, folder, num_tokens):
        message = rf"text: the context has {num_tokens} tokens, but .*encoded caches 60 and one more must follow"
        with pytest.raises(MismatchError, match=message):
            EncodedFolder(folder, 1).check_context(METADATA.token_ids[:num_tokens], 60, "text")

    def test_a_shorter_context_passes_where_fewer_chunks_are_decoded(self, folder):
        EncodedFolder(folder, 1).check_context(METADATA.token_ids[:41], 40, "text")
        with pytest.raises(MismatchError, match="caches 40"):
            EncodedFolder(folder, 1).check_context(METADATA.token_ids[:40], 40, "text")

    @pytest.mark.parametrize("position", [0, 59])
    def test_another_context_is_refused(self, folder, position):
        token_ids = torch.cat([METADATA.token_ids, torch.zeros(5, dtype=torch.int32)])
        token_ids[position] += 1
        with pytest.raises(MismatchError, match=r"text: token_hash is .*the files are of another context"):
            EncodedFolder(folder, 1).check_context(token_ids, 60, "text")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, None),
        ({"fingerprint": "cd" * 32}, "model_fingerprint"),
        ({"rotary_embeddings": ()}, "rope_hash"),
        ({"shapes": [(1, 8)] * 6}, "planes: 2 layers are there, the cache has 3 with some/model"),
        ({"shapes": [(4, 4), (1, 8)] * 2}, "planes: the keys of layer 0 are 1 x 8, the cache's 4 x 4 with some/model"),
        ({"shapes": [(1, 8)] * 3 + [(8, 1)]}, "planes: the values of layer 1 are 1 x 8, the cache's 8 x 1"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_another_model_is_refused_by_field(folder, changes, field, monkeypatch):
    loaded: Any = SimpleNamespace(
        model_id="some/model",
        fingerprint=METADATA.model_fingerprint,
        rotary_embeddings=METADATA.rotary_embeddings,
        dtype=torch.float16,
        shapes=[(1, 8)] * 4,
    )
    monkeypatch.setattr(
        prefill,
        "measure_cache",
        lambda loaded: allocate_cache(make_layout(len(loaded.shapes) // 2), loaded.shapes, 1, torch.float16),
    )
    assert hash_rotary_embeddings(loaded.rotary_embeddings) == METADATA.rope_hash
    for name, value in changes.items():
        setattr(loaded, name, value)
    if field is None:
        EncodedFolder(folder, 1).check_model(loaded)
    else:
        message = field if "planes" in field else f"{field} is .*, but some/model has"
        with pytest.raises(MismatchError, match=f"tables.cgt: {message}"):
            EncodedFolder(folder, 1).check_model(loaded)
