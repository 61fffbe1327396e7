"""From a cache to a folder: what is written, what is kept, what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from cachegen.errors import ConfigError, InputError, OutputError
from cachegen.files import lock_folder
from cachegen.format import Coder
from cachegen.kv_cache import from_planes
from cachegen.methods import load_config, parse_chunk, parse_document
from cachegen.methods.absmax.codec import AbsmaxEncoder
from cachegen.pipeline.encode import encode_document
from tests.fixtures import read_folder
from tests.fixtures.absmax import make_encoder, write_config
from tests.fixtures.caches import make_cache, make_metadata

CHUNKS = (25, 25, 10)
NAMES = ["chunk_00000.L1.cgc", "chunk_00001.L1.cgc", "chunk_00002.L1.cgc", "tables.cgt"]


@pytest.fixture
def encoder(config_path) -> AbsmaxEncoder:
    return make_encoder(make_cache(60), make_metadata(60), config_path, CHUNKS)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "encoded"


@pytest.fixture
def encoded(encoder, folder) -> dict[str, bytes]:
    """The files of a finished encoding in `folder`."""
    encode_document(encoder, folder)
    return read_folder(folder)


def test_a_folder_holds_the_tables_and_the_chunks_and_every_byte_is_counted(encoder, folder):
    progress = []
    result = encode_document(encoder, folder, progress=progress.append)
    files = read_folder(folder)
    assert list(files) == NAMES
    assert result.num_reused_chunks == 0 and progress == list(CHUNKS)
    assert result.sizes.total == sum(map(len, files.values()))
    chunks = [parse_chunk(files[name]) for name in NAMES[:3]]
    header = parse_document(files["tables.cgt"])
    assert header == result.header and header.chunk_tokens == CHUNKS
    assert result.sizes.tables == header.tables_bytes
    assert result.sizes.scales == sum(2 * 4 * num_tokens for num_tokens in CHUNKS)
    assert result.sizes.payload == sum(len(chunk.payload) for chunk in chunks)
    assert [chunk.header.first_token for chunk in chunks] == [0, 25, 50]


def test_a_second_run_writes_nothing_and_counts_the_same(encoder, folder):
    first = encode_document(encoder, folder)
    before = {path.name: path.stat() for path in folder.iterdir()}
    second = encode_document(encoder, folder)
    assert {path.name: path.stat() for path in folder.iterdir()} == before
    assert second.num_reused_chunks == 3 and second.sizes == first.sizes


@pytest.mark.parametrize("missing", [NAMES[:1], NAMES[1:2], NAMES[1:3], NAMES[:3]])
def test_an_interrupted_encoding_resumes(encoder, folder, encoded, missing):
    for name in missing:
        (folder / name).unlink()
    assert encode_document(encoder, folder).num_reused_chunks == 3 - len(missing)
    assert read_folder(folder) == encoded


@pytest.mark.parametrize("damage", ["flipped", "truncated", "extended", "empty", "foreign", "zeros"])
def test_a_damaged_chunk_is_encoded_again(encoder, folder, encoded, damage):
    path, content = folder / NAMES[1], encoded[NAMES[1]]
    path.write_bytes(
        {
            "flipped": content[:-5] + bytes([content[-5] ^ 4]) + content[-4:],
            "truncated": content[:-1],
            "extended": content + b"\0",
            "empty": b"",
            "foreign": b"someone's file",
            "zeros": bytes(len(content)),
        }[damage]
    )
    result = encode_document(encoder, folder)
    assert (result.num_reused_chunks, result.repaired) == (2, (NAMES[1],))
    assert read_folder(folder) == encoded


def test_a_chunk_under_another_ones_name_is_encoded_again(encoder, folder, encoded):
    (folder / NAMES[1]).write_bytes(encoded[NAMES[0]])
    assert encode_document(encoder, folder).repaired == (NAMES[1],)
    assert read_folder(folder) == encoded


@pytest.mark.parametrize("tables", ["whole", "missing", "damaged"])
def test_a_whole_chunk_of_another_document_is_refused_before_anything_is_written(
    encoder, folder, encoded, config_path, tables
):
    other = make_other("values", config_path)
    (folder / NAMES[1]).unlink()
    (folder / NAMES[2]).write_bytes(b"".join(other.encode_chunk(2)))
    if tables == "missing":
        (folder / "tables.cgt").unlink()
    if tables == "damaged":
        (folder / "tables.cgt").write_bytes(encoded["tables.cgt"][:-1])
    before = read_folder(folder)
    with pytest.raises(OutputError, match=r"chunk_00002.L1.cgc: is a chunk of another cache or configuration"):
        encode_document(encoder, folder)
    assert read_folder(folder) == before
    encode_document(encoder, folder, overwrite=True)
    assert read_folder(folder) == encoded


def test_a_folder_is_written_by_one_process_at_a_time(encoder, folder, encoded):
    with lock_folder(folder), pytest.raises(OutputError, match="another process is writing into this folder"):
        encode_document(encoder, folder)
    assert encode_document(encoder, folder).num_reused_chunks == 3


def test_an_error_beyond_the_bound_is_refused_and_leaves_nothing(encoder, folder):
    bound = encode_document(encoder, folder).errors[1].largest
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"decodes .* from the cache's, more than `max_error`"):
        encode_document(encoder, folder, max_error=0.99 * bound)
    assert read_folder(folder) == {}
    assert encode_document(encoder, folder, max_error=bound).errors[1].largest == bound


def test_stale_temporaries_are_swept_when_an_encoding_resumes(encoder, folder, encoded):
    (folder / ".tmp-chunk_00001.L1.cgc-0123456789ab").write_bytes(b"half a chunk")
    encode_document(encoder, folder)
    assert read_folder(folder) == encoded


def test_a_folder_of_foreign_files_is_refused_and_left_as_it_was(encoder, folder):
    folder.mkdir()
    files = {
        ".tmp-letter-0123456789ab": b"one",
        ".tmp-notes": b"two",
        "thesis.tex": b"three",
        "z/chunk_00000.L1.cgc": b"4",
    }
    (folder / "z").mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(OutputError, match=r"is not empty and holds no tables.cgt"):
        encode_document(encoder, folder)
    assert read_folder(folder) == files


def make_other(what: str, config_path: Path) -> AbsmaxEncoder:
    """An encoder that differs from the fixture in one thing."""
    cache, metadata = make_cache(60), make_metadata(60)
    if what == "values":
        cache = make_cache(60, seed=1)
    if what == "twice the values":  # the same symbols, and other scales
        cache = from_planes([2 * plane for plane in cache.planes])
    if what == "one value":
        cache.values[1][-1] *= 2
    if what == "dtype":  # values that fp16 and bf16 have in common
        cache = from_planes([plane.bfloat16() for plane in cache.planes])
    if what == "tokens":
        metadata = make_metadata(60, seed=1)
    if what == "model":
        metadata = make_metadata(60, model_fingerprint="cd" * 32)
    if what == "bins":
        config_path = write_config(config_path, key_first_bins=30)
    config = load_config(config_path)
    chunks = (20, 20, 20) if what == "chunks" else CHUNKS
    return AbsmaxEncoder(cache, metadata, config, chunks, Coder.PACKED if what == "coder" else Coder.RANS)


@pytest.mark.parametrize(
    "what",
    ["values", "twice the values", "one value", "dtype", "tokens", "model", "bins", "chunks", "coder"],
)
def test_another_documents_encoding_is_refused_unless_overwritten_and_foreign_files_stay(
    folder, encoded, config_path, tmp_path, what
):
    foreign = {"README": b"mine", "chunk_1.cgc": b"not a name of ours", ".tmp-notes": b"mine, too"}
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
    (folder / "chunk_00007.L1.cgc").write_bytes(b"of a longer document")
    before = read_folder(folder)
    other = make_other(what, config_path)
    with pytest.raises(OutputError, match="holds the encoding of another cache or configuration"):
        encode_document(other, folder)
    assert read_folder(folder) == before
    assert encode_document(other, folder, overwrite=True).num_reused_chunks == 0
    encode_document(other, tmp_path / "alone")
    assert read_folder(folder) == {**read_folder(tmp_path / "alone"), **foreign}


def test_overwriting_its_own_encoding_gives_the_same_files(encoder, folder, encoded):
    assert encode_document(encoder, folder, overwrite=True).num_reused_chunks == 0
    assert read_folder(folder) == encoded


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_tables_file_is_written_again(encoder, folder, encoded, damage):
    path, content = folder / "tables.cgt", encoded["tables.cgt"]
    path.write_bytes(content[:-1] if damage == "truncated" else content[:60] + b"\xff" + content[61:])
    if damage == "missing":
        path.unlink()
    result = encode_document(encoder, folder)
    assert (result.num_reused_chunks, result.repaired) == (3, () if damage == "missing" else ("tables.cgt",))
    assert read_folder(folder) == encoded


@pytest.mark.parametrize("name", ["tables.cgt", NAMES[1]])
def test_files_of_a_later_release_are_not_taken_for_damaged(encoder, folder, encoded, name):
    (folder / name).write_bytes(encoded[name][:8] + b"\x09" + encoded[name][9:])
    before = read_folder(folder)
    with pytest.raises(OutputError, match="`overwrite`"):
        encode_document(encoder, folder)
    assert read_folder(folder) == before


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_the_folders_place_is_refused(encoder, tmp_path, below):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"cannot be made: .*`output_path`"):
        encode_document(encoder, tmp_path / "file" / below)
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_in_a_files_place_is_refused(encoder, folder, overwrite):
    (folder / "tables.cgt").mkdir(parents=True)
    with pytest.raises((OutputError, InputError), match=r"tables.cgt: cannot be (read|removed)"):
        encode_document(encoder, folder, overwrite=overwrite)


def test_a_failure_midway_leaves_whole_files_only(encoder, folder, encoded, tmp_path, monkeypatch):
    encode_chunk = encoder.encode_chunk

    def fail_at_the_last(index, level):
        if index == 2:
            raise KeyboardInterrupt
        return encode_chunk(index, level)

    monkeypatch.setattr(encoder, "encode_chunk", fail_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        encode_document(encoder, tmp_path / "partial")
    assert read_folder(tmp_path / "partial") == {name: encoded[name] for name in encoded if name != NAMES[2]}


def test_nan_in_tokens_that_no_chunk_covers_is_no_matter(config_path, folder):
    cache = make_cache(60)
    cache.keys[0][55] = torch.nan
    encode_document(make_encoder(cache, make_metadata(60), config_path, (50,)), folder)
    assert sorted(os.listdir(folder)) == [NAMES[0], "tables.cgt"]


def test_a_layer_that_no_group_covers_is_refused(tmp_path):
    path = write_config(tmp_path / "short.json", key_third_layers=3)
    with pytest.raises(ConfigError, match="no key group covers layers 3 to 3: raise key_third_layers"):
        make_encoder(make_cache(60, num_layers=4), make_metadata(60), path, CHUNKS)
