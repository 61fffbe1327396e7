"""Documents whose layers lack first tokens: what is stored decodes as ever, what is not is zero, in every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cachegen.errors import BitstreamError, ConfigError, InputError, MismatchError, OutputError
from cachegen.format.files import TABLES_NAME, chunk_name
from cachegen.kv_cache import KVCache, from_planes
from cachegen.methods import make_encoder, open_document, parse_chunk, read_config
from cachegen.methods.base import Encoder
from cachegen.methods.layer_classes import layer_classes
from cachegen.methods.transform.encoder import TransformEncoder
from cachegen.methods.transform.exact_values import ExactValues, check_stored
from cachegen.pipeline.decode import EncodedFolder
from cachegen.pipeline.encode import encode_document
from tests.fixtures.caches import allocate_like, are_equal, make_correlated_cache, make_metadata
from tests.fixtures.transform import make_profile
from tests.golden.invalid_files import reseal

SHAPES = [(2, 8), (2, 8), (2, 8), (2, 4), (1, 8), (1, 8), (2, 8), (2, 8)]
NUM_TOKENS, CHUNKS = 85, (20, 20, 20, 15)
NUM_COVERED = sum(CHUNKS)
CACHE = make_correlated_cache(SHAPES, NUM_TOKENS, torch.bfloat16)
METADATA = make_metadata(NUM_TOKENS, rotary_embeddings=())
PROFILE = make_profile(SHAPES, [1, 2, 1], rotary=None)
CONFIGS = {
    "rans": {"method": "uniform", "bits": 6},
    "ac": {"method": "uniform", "bits": 6, "coder": "ac"},
    "packed": {"method": "uniform", "bits": 6, "coder": "packed"},
    "lossless": {"method": "lossless"},
}
METHODS = (*CONFIGS, "transform")
FIRST_STORED = {
    "two windows": (0, 45, 45, 70),
    "a chunk that begins behind": (0, NUM_COVERED, NUM_COVERED, 0),
    "windows in all layers": (50, 50, 50, 50),
    "within the first chunk": (1, 19, 19, 0),
    "nothing at all": (NUM_COVERED,) * 4,
}


def start(method: str, first_stored: Sequence[int] = (), *, cache: KVCache = CACHE, chunks=CHUNKS) -> Encoder:
    metadata = dataclasses.replace(METADATA, token_ids=METADATA.token_ids[: cache.num_tokens])
    if method == "transform":
        flags = {"step_log": -40, "num_levels": 2}
        return TransformEncoder(cache, metadata, PROFILE, chunks, first_stored=first_stored, **flags)
    return make_encoder(read_config(CONFIGS[method], "test"), cache, metadata, chunks, first_stored=first_stored)


def decode(folder: Path, level: int | None = None, chunks: Sequence[int] | None = None) -> KVCache:
    encoded = EncodedFolder(folder, 2, find_profile=lambda _: PROFILE, level=level)
    output = allocate_like(CACHE, NUM_COVERED)
    encoded.decode_into(output, METADATA.token_ids, encoded.select_chunks(None) if chunks is None else chunks)
    return output


def blank(cache: KVCache, first_stored: Sequence[int]) -> KVCache:
    """The cache with zeros for what is not stored."""
    planes = [plane.clone() for plane in cache.planes]
    for index, plane in enumerate(planes):
        plane[: first_stored[index // 2]] = 0
    return from_planes(planes)


@pytest.mark.parametrize("first_stored", FIRST_STORED.values(), ids=FIRST_STORED)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_decodes_as_in_a_document_of_all_tokens(tmp_path, method, first_stored):
    for name, first in (("all", ()), ("some", first_stored)):
        encode_document(start(method, first), tmp_path / name)
    for level in (1, None):
        assert are_equal(decode(tmp_path / "some", level), blank(decode(tmp_path / "all", level), first_stored))


@pytest.mark.parametrize("method", METHODS)
def test_a_document_of_all_tokens_has_the_same_bytes_whatever_says_so(tmp_path, method):
    assert start(method, (0,) * 4).tables_file == start(method).tables_file
    assert start(method, (0,) * 4).encode_chunk(1) == start(method).encode_chunk(1)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_stored_takes_no_bytes(tmp_path, method):
    first_stored = (NUM_COVERED - 7,) * 4
    sizes = {
        name: encode_document(start(method, first), tmp_path / name).chunk_bytes[1]
        for name, first in (("all", ()), ("some", first_stored))
    }
    headers = [parse_chunk((tmp_path / "some" / chunk_name(i)).read_bytes()).header for i in range(len(CHUNKS))]
    assert [header.file_bytes for header in headers[:3]] == [header.header_bytes for header in headers[:3]]
    assert [header.num_streams for header in headers[:3]] == [0, 0, 0]
    assert sum(sizes["some"]) < sum(sizes["all"]) / 2


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_stored_may_be_anything(tmp_path, method):
    first_stored = FIRST_STORED["two windows"]
    planes = [plane.clone() for plane in CACHE.planes]
    for index, plane in enumerate(planes):
        plane[: first_stored[index // 2]] = torch.nan
    expected = start(method, first_stored, cache=CACHE)
    encoder = start(method, first_stored, cache=from_planes(planes))
    # A group of the transform is stored from the earliest of its layers on; these have one first token each.
    assert encoder.tables_file == expected.tables_file
    for index in range(len(CHUNKS)):
        assert b"".join(encoder.encode_chunk(index)) == b"".join(expected.encode_chunk(index))
    changed = [plane.clone() for plane in CACHE.planes]
    changed[2][60] += 1
    assert start(method, first_stored, cache=from_planes(changed)).tables_file != expected.tables_file


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lossless"])
def test_a_value_that_is_not_finite_is_named_by_its_place_in_the_whole_cache(method):
    planes = [plane.clone() for plane in CACHE.planes]
    planes[5][52] = torch.inf
    with pytest.raises(InputError, match=r"layer 2, values, token 52"):
        encoder = start(method, FIRST_STORED["two windows"], cache=from_planes(planes))
        for index in range(len(CHUNKS)):
            encoder.encode_chunk(index)


def test_layers_of_a_group_are_stored_from_the_earliest_on():
    encoder = start("transform", (10, 30, 20, 40))
    assert encoder.document.header.first_stored == (10, 20, 20, 40)


def test_classes_are_the_layers_that_begin_together():
    header = start("rans", (0, 45, 45, 70)).document.header
    assert [(c.layers, c.first_stored) for c in layer_classes(header)] == [((0,), 0), ((1, 2), 45), ((3,), 70)]
    assert [c.is_all for c in layer_classes(start("rans").document.header)] == [True]
    assert header.is_whole_only and not start("rans").document.header.is_whole_only
    assert sum(header.stored_values_of_chunks) == 32 * 75 + (24 + 16) * 30 + 32 * 5


@pytest.mark.parametrize("first_stored", [(0, 0, 0), (0, 0, 0, 0, 1), (0, 0, 0, NUM_COVERED + 1)])
def test_first_tokens_that_are_none_of_the_chunks_are_refused(first_stored):
    with pytest.raises(ValueError, match="`first_stored` must have"):
        start("rans", first_stored)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_encoding_goes_on_where_it_stopped(tmp_path, method):
    first_stored = FIRST_STORED["two windows"]
    expected = encode_document(start(method, first_stored), tmp_path)
    (tmp_path / chunk_name(1)).unlink()
    result = encode_document(start(method, first_stored), tmp_path)
    assert result.num_reused_chunks == 3 * len(expected.chunk_bytes)
    assert result.chunk_bytes == expected.chunk_bytes


@pytest.mark.parametrize(("before", "after"), [((), (0, 45, 45, 70)), ((0, 45, 45, 70), ())])
@pytest.mark.parametrize("method", METHODS)
def test_an_encoding_with_other_tokens_is_not_taken_for_the_same(tmp_path, method, before, after):
    encode_document(start(method, before), tmp_path)
    content = (tmp_path / TABLES_NAME).read_bytes()
    with pytest.raises(OutputError, match="the encoding of another cache or configuration"):
        encode_document(start(method, after), tmp_path)
    assert (tmp_path / TABLES_NAME).read_bytes() == content
    assert encode_document(start(method, after), tmp_path, overwrite=True).num_reused_chunks == 0


def test_mean_errors_count_every_value_once(tmp_path):
    result = encode_document(start("transform", FIRST_STORED["two windows"]), tmp_path)
    decoded = decode(tmp_path)
    differences = [
        (a.float() - b.float())[first:].abs().flatten()
        for a, b, first in zip(decoded.planes, CACHE.planes, (0, 0, 45, 45, 45, 45, 70, 70), strict=True)
        for b in [b[:NUM_COVERED]]
    ]
    assert result.errors[2].mean == pytest.approx(torch.cat(differences).mean().item(), rel=0.02)


# --- files that must be refused ---------------------------------------------------------------------------------------


def read_chunk(encoder: Encoder, index: int, content: bytes) -> None:
    document = open_document(encoder.tables_file, find_profile=lambda _: PROFILE)
    first = sum(CHUNKS[:index])
    output = allocate_like(CACHE, CHUNKS[index])
    document.decode([content], output, first_token=first, token_hash=None)


def absent_at(encoder: Encoder, index: int) -> tuple[int, int]:
    """Where a chunk's numbers of absent tokens stand, and how many there are."""
    header = encoder.expected_header(index)
    arrays_at = 24 + header.num_bytes()
    return arrays_at + header.arrays_bytes, len(header.num_absent)


@pytest.mark.parametrize("method", ["lossless", "transform"])
@pytest.mark.parametrize(("number", "error"), [(21, BitstreamError), (2**32 - 1, BitstreamError), (6, MismatchError)])
def test_a_chunk_that_lacks_other_tokens_than_the_document_says_is_refused(method, number, error):
    encoder = start(method, (0, 45, 45, 70))
    content = b"".join(encoder.encode_chunk(2))  # tokens 40 to 60: the second layer lacks 5
    read_chunk(encoder, 2, content)
    at, _ = absent_at(encoder, 2)
    with pytest.raises(error, match="num_absent"):
        read_chunk(encoder, 2, reseal(content, at + 4, "I", number))


@pytest.mark.parametrize("method", METHODS)
def test_an_array_that_says_nothing_is_refused(method):
    encoder = start(method, (0, 45, 45, 70))
    at, count = absent_at(encoder, 2)
    content = reseal(b"".join(encoder.encode_chunk(2)), at, f"{count}I", *[0] * count)
    with pytest.raises(BitstreamError, match="num_absent: a layer must lack tokens"):
        read_chunk(encoder, 2, content)


@pytest.mark.parametrize("method", METHODS)
def test_a_tables_file_whose_layers_begin_behind_its_chunks_is_refused(method):
    encoder = start(method, (0, 45, 45, 70))
    at = encoder.document.header.header_bytes - 4 - 8 * 4
    for number in (NUM_COVERED + 1, 2**64 - 1):
        with pytest.raises(BitstreamError, match="first_stored: a layer begins behind the 75 tokens"):
            open_document(reseal(encoder.tables_file, at + 8, "Q", number))


def test_a_document_whose_groups_do_not_begin_at_one_token_is_refused():
    encoder = start("transform", (0, 45, 45, 70))
    at = encoder.document.header.header_bytes - 4 - 8 * 4
    content = reseal(encoder.tables_file, at + 8, "Q", 44)
    with pytest.raises(BitstreamError, match="first_stored: the layers of a group"):
        open_document(content, find_profile=lambda _: PROFILE)


def test_exact_values_of_tokens_that_are_not_stored_are_refused():
    shapes = [(1, 4), (1, 4), (1, 4), (1, 4)]

    def values(token: int, channel: int) -> ExactValues:
        return ExactValues(np.array([token]), np.array([channel]), np.zeros(1, np.uint16))

    check_stored(values(3, 7), shapes, (3, 5))
    check_stored(values(0, 7), shapes, ())
    for token, channel in ((2, 0), (2, 7), (4, 8), (4, 15)):
        with pytest.raises(BitstreamError, match="exact values: a value is of a token that is not stored"):
            check_stored(values(token, channel), shapes, (3, 5))


def test_a_document_that_can_only_be_used_whole_is_not_decoded_in_part(tmp_path):
    encode_document(start("rans", (0, 45, 45, 70)), tmp_path)
    encoded = EncodedFolder(tmp_path, 1)
    assert encoded.select_chunks(4) == encoded.select_chunks(None) == CHUNKS
    with pytest.raises(ConfigError, match="`num_chunks` 3 asked for, but the document can only be used whole"):
        encoded.select_chunks(3)
