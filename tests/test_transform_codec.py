"""The codec of method transform: what is decoded is what the levels say, and what does not belong is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache

import pytest
import torch

from cachegen.coder.cpu import crc32c
from cachegen.errors import BitstreamError, InputError, MismatchError
from cachegen.kv_cache import KVCache, RotaryEmbedding, from_planes
from cachegen.methods import open_document, parse_chunk, parse_document
from cachegen.methods.transform import encoder as transform_encoder
from cachegen.methods.transform import transform
from cachegen.methods.transform.encoder import TransformEncoder, choose_component_stream
from cachegen.methods.transform.encoder import build_chunk as build_transform_chunk
from cachegen.methods.transform.headers import MAX_STEP_LOG, TransformDocumentHeader
from cachegen.methods.transform.profile import Profile
from cachegen.methods.transform.profile_storage import load_profile, save_profile
from cachegen.methods.transform.transform import BLOCK_TOKENS, GroupTransform, quantize_components, step_of_level
from tests.fixtures.absmax import encode_all, start_encoder
from tests.fixtures.caches import DTYPES, make_metadata, make_shaped_cache
from tests.fixtures.transform import (
    allocate_for,
    decode_transformed,
    encode_levels,
    make_components,
    make_profile,
    make_transformed_cache,
    start_transform_encoder,
)
from tests.golden.make_transform_golden import exact_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SHAPES = [(2, 8), (1, 12), (1, 6), (3, 5), (1, 8), (2, 4)]
TOLERANCE = 1 / 256


def close(found: KVCache, expected: KVCache) -> bool:
    """Whether every row is as close as decoders must be to each other."""
    for plane, wanted in zip(found.planes, expected.planes, strict=True):
        rows, wanted_rows = plane.float().flatten(1), wanted.float().flatten(1)
        if not ((rows - wanted_rows).abs() <= TOLERANCE * wanted_rows.abs().amax(1, keepdim=True)).all():
            return False
    return True


def mean_squared_error(found: KVCache, expected: KVCache) -> float:
    errors = [(a.double() - b.double()).ravel() for a, b in zip(found.planes, expected.planes, strict=True)]
    return torch.cat(errors).square().mean().item()


def synthesize_levels(cache: KVCache, profile: Profile, step_log: int, num_levels: int, dtype) -> list[KVCache]:
    """What every level must decode to: straight from the transform and its quantizer, no coder between."""
    outputs = [allocate_for(profile, cache.num_tokens, dtype) for _ in range(num_levels)]
    encoder = start_transform_encoder(cache, profile, (cache.num_tokens,), step_log=step_log, num_levels=num_levels)
    codings = [encoder.document.codings(level) for level in encoder.levels]
    for index, group in enumerate(profile.groups):
        transform = GroupTransform(profile, group, CPU, may_round=dtype.itemsize == 2)
        counts = [coding[index].num_components for coding in codings]
        components = transform.analyze(transform.join(cache, 0), counts[-1])
        levels = quantize_components(components, step_of_level(step_log, 1), counts)
        for level, quantized in enumerate(levels, 1):
            transform.synthesize(quantized, step_of_level(step_log, level), outputs[level - 1], 0)
    return outputs


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact_products(monkeypatch) -> None:
    """As on a processor without products in bf16 or of bytes, whose rounding other tests bound."""
    monkeypatch.setattr(transform, "has_bf16_products", lambda device: False)
    monkeypatch.setattr(transform, "CAN_MULTIPLY_BF16", False)
    monkeypatch.setattr(transform, "has_byte_analysis", lambda: False)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [(3,), (1, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("chunk_tokens", [(90,), (1, 31, 32, 26), (40, 33)], ids=str)
def test_every_level_is_decoded_as_the_quantizer_says(dtype, groups, chunk_tokens) -> None:
    profile = make_profile(SHAPES, groups)
    num_tokens = sum(chunk_tokens)
    cache = make_transformed_cache(profile, num_tokens, dtype)
    encoder = start_transform_encoder(cache, profile, chunk_tokens, step_log=-8, num_levels=3)
    chunks = encode_levels(encoder)
    expected = synthesize_levels(cache, profile, -8, 3, dtype)
    for level in encoder.levels:
        output = allocate_for(profile, num_tokens, dtype)
        decode_transformed(encoder.tables_file, [files[:level] for files in chunks], profile, output)
        assert close(output, expected[level - 1])


@pytest.mark.parametrize("rotary", [None, RotaryEmbedding("r", "default", (1.0, 0.01), 1.3)])
def test_rotary_embeddings_are_undone_before_and_applied_after(rotary: RotaryEmbedding | None) -> None:
    profile = make_profile(SHAPES, (3,), rotary=rotary)
    cache = make_transformed_cache(profile, 70)
    encoder = start_transform_encoder(cache, profile, (33, 37), step_log=-128)
    output = allocate_for(profile, 70, torch.float32)
    decode_transformed(encoder.tables_file, encode_levels(encoder), profile, output)
    assert close(output, cache)


def test_the_error_falls_ninefold_per_level_at_a_high_rate() -> None:
    profile = make_profile(SHAPES, (3,), largest_scale=2.0**12)
    cache = make_transformed_cache(profile, 300)
    encoder = start_transform_encoder(cache, profile, (300,), step_log=-16, num_levels=4)
    (files,) = encode_levels(encoder)
    errors = []
    for level in encoder.levels:
        output = allocate_for(profile, 300, torch.float32)
        decode_transformed(encoder.tables_file, [files[:level]], profile, output)
        errors.append(mean_squared_error(output, cache))
    assert all(8 < coarse / fine < 10 for coarse, fine in itertools.pairwise(errors[:3]))
    assert errors[3] < errors[2]


def test_a_level_costs_about_what_it_would_alone() -> None:
    profile = make_profile(SHAPES, (3,), largest_scale=64.0)
    cache = make_transformed_cache(profile, 1000)
    (files,) = encode_levels(start_transform_encoder(cache, profile, (1000,), num_levels=2))
    ((alone,),) = encode_levels(start_transform_encoder(cache, profile, (1000,), step_log=-25))
    assert sum(map(len, files)) < 1.1 * len(alone) + 500


def test_components_may_all_be_below_the_step() -> None:
    profile = make_profile(SHAPES, (1, 2))
    cache = make_transformed_cache(profile, 40)
    encoder = start_transform_encoder(cache, profile, (40,), step_log=200, num_levels=2)
    assert [coding.num_components for coding in encoder.document.codings(2)] == [0, 0]
    output = allocate_for(profile, 40, torch.float32)
    decode_transformed(encoder.tables_file, encode_levels(encoder), profile, output)
    assert close(output, synthesize_levels(cache, profile, 200, 1, torch.float32)[0])


def test_values_far_from_the_profiles_are_escapes_of_their_components() -> None:
    profile = make_profile(SHAPES, (3,))
    (components,) = make_components(profile, 50)
    components[7] *= 8  # further than any symbol reaches, and not so far that the value would travel exactly
    cache = allocate_for(profile, 50, torch.float32)
    GroupTransform(profile, profile.groups[0], CPU).synthesize(components, 1.0, cache, 0)
    encoder = start_transform_encoder(cache, profile, (50,), step_log=-32)
    ((content,),) = encode_levels(encoder)
    assert parse_chunk(content).header.exact_bytes == 0
    output = allocate_for(profile, 50, torch.float32)
    decode_transformed(encoder.tables_file, [[content]], profile, output)
    assert close(output, synthesize_levels(cache, profile, -32, 1, torch.float32)[0])


# --- values that travel exactly ---------------------------------------------------------------------------------------


def decode_alone(encoder: TransformEncoder, profile: Profile, level: int, dtype: torch.dtype) -> KVCache:
    output = allocate_for(profile, sum(encoder.document.header.chunk_tokens), dtype)
    chunks = [files[:level] for files in encode_levels(encoder)]
    decode_transformed(encoder.tables_file, chunks, profile, output)
    return output


def largest_error(found: KVCache, expected: KVCache) -> float:
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(found.planes, expected.planes, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [1, 2])
def test_one_value_far_out_comes_back_exactly_and_leaves_its_neighbours_alone(dtype: torch.dtype, level: int) -> None:
    profile = make_profile(SHAPES, (1, 2))
    plain = make_transformed_cache(profile, 90, dtype)
    cache = from_planes([plane.clone() for plane in plain.planes])
    places = [(0, 0, 0, 3), (3, 55, 1, 4), (5, 89, 0, 3)]
    for plane, token, head, dim in places:
        cache.planes[plane][token, head, dim] = torch.finfo(dtype).max * (-1) ** token
    arguments = {"step_log": -8, "num_levels": 2}
    found = decode_alone(start_transform_encoder(cache, profile, (64, 26), **arguments), profile, level, dtype)
    undisturbed = decode_alone(start_transform_encoder(plain, profile, (64, 26), **arguments), profile, level, dtype)
    for plane, token, head, dim in places:
        assert found.planes[plane][token, head, dim] == cache.planes[plane][token, head, dim]
        found.planes[plane][token, head, dim] = plain.planes[plane][token, head, dim]
    # The value gives way to its channel's mean, a few deviations away, before the others are transformed.
    assert largest_error(found, plain) < 4 * largest_error(undisturbed, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_of_the_largest_numbers_comes_back_exactly(dtype: torch.dtype) -> None:
    profile = make_profile(SHAPES, (3,))
    signs = make_transformed_cache(profile, 70, torch.float32)
    largest = torch.finfo(dtype).max
    cache = from_planes([torch.where(plane < 0, -largest, largest).to(dtype) for plane in signs.planes])
    encoder = start_transform_encoder(cache, profile, (40, 30), num_levels=2)
    for level in encoder.levels:
        assert largest_error(decode_alone(encoder, profile, level, dtype), cache) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_finite_cache_decodes_to_finite_values(dtype: torch.dtype) -> None:
    profile = make_profile(SHAPES, (3,))
    generator = torch.Generator().manual_seed(3)
    info = torch.finfo(dtype)
    exponents = torch.tensor([math.log2(info.tiny), math.log2(info.max)])
    planes = []
    for shape in SHAPES:
        powers = torch.rand(200, *shape, generator=generator) * (exponents[1] - exponents[0]) + exponents[0]
        planes.append((torch.randn(200, *shape, generator=generator).sign() * powers.exp2()).clamp(info.min, info.max))
    cache = from_planes([plane.to(dtype) for plane in planes])
    for step_log in (-200, 0, 200):
        encoder = start_transform_encoder(cache, profile, (200,), step_log=step_log, num_levels=3)
        for level in encoder.levels:
            decoded = decode_alone(encoder, profile, level, dtype)
            assert all(torch.isfinite(plane).all() for plane in decoded.planes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_recorded_errors_are_those_of_what_is_decoded(dtype: torch.dtype) -> None:
    profile = make_profile(SHAPES, (1, 2))
    cache = make_transformed_cache(profile, 90, dtype)
    cache.values[1][17, 0, 2] = 3e4
    encoder = start_transform_encoder(cache, profile, (90,), step_log=-8, num_levels=3)
    (files,) = encode_levels(encoder)
    for level in encoder.levels:
        decoded = decode_alone(encoder, profile, level, dtype)
        errors = [(a.double() - b.double()).abs().flatten() for a, b in zip(decoded.planes, cache.planes, strict=True)]
        found = encoder.read_error(0, level, [files[level - 1]])
        assert found.largest == pytest.approx(torch.cat(errors).max().item(), rel=1e-6)
        assert found.mean == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)


def test_real_looking_values_all_go_through_the_transform() -> None:
    profile = make_profile(SHAPES, (1, 2))
    cache = make_transformed_cache(profile, 2000, torch.bfloat16)
    for step_log in (-100, 0, 100):
        encoder = start_transform_encoder(cache, profile, (2000,), step_log=step_log, num_levels=2)
        (files,) = encode_levels(encoder)
        assert [parse_chunk(content).header.exact_bytes for content in files] == [0, 0]


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_change_neither_bytes_nor_values(num_threads: int) -> None:
    profile = make_profile(SHAPES, (1, 2))
    cache = make_transformed_cache(profile, 2000)
    arguments = {"step_log": -16, "num_levels": 2}
    encoder = start_transform_encoder(cache, profile, (1500, 500), **arguments)
    chunks = encode_levels(encoder)
    assert (
        encode_levels(start_transform_encoder(cache, profile, (1500, 500), num_threads=num_threads, **arguments))
        == chunks
    )
    outputs = [allocate_for(profile, 2000, torch.float32) for _ in range(2)]
    decode_transformed(encoder.tables_file, chunks, profile, outputs[0])
    decode_transformed(encoder.tables_file, chunks, profile, outputs[1], num_threads=num_threads)
    assert all(torch.equal(a, b) for a, b in zip(outputs[0].planes, outputs[1].planes, strict=True))


def test_a_chunk_decodes_alone_as_with_all_others() -> None:
    profile = make_profile(SHAPES, (1, 2))
    cache = make_transformed_cache(profile, 120)
    encoder = start_transform_encoder(cache, profile, (50, 37, 33), num_levels=2)
    chunks = encode_levels(encoder)
    whole = allocate_for(profile, 120, torch.float32)
    decode_transformed(encoder.tables_file, chunks, profile, whole)
    start = 0
    for index, num_tokens in enumerate((50, 37, 33)):
        alone = allocate_for(profile, num_tokens, torch.float32)
        decode_transformed(encoder.tables_file, [chunks[index]], profile, alone, first_chunk=index)
        expected = whole.slice(start, start + num_tokens)
        assert all(torch.equal(a, b) for a, b in zip(alone.planes, expected.planes, strict=True))
        start += num_tokens


def test_levels_and_chunks_may_be_encoded_in_any_order() -> None:
    profile = make_profile(SHAPES, (3,))
    encoder = start_transform_encoder(make_transformed_cache(profile, 64), profile, (40, 24), num_levels=3)
    chunks = encode_levels(encoder)
    for index, level in [(1, 2), (0, 3), (0, 1), (1, 1), (1, 3), (0, 2)]:
        assert b"".join(encoder.encode_chunk(index, level)) == chunks[index][level - 1]


def test_tokens_beyond_the_chunks_are_not_looked_at() -> None:
    profile = make_profile(SHAPES, (3,))
    cache = make_transformed_cache(profile, 60)
    for plane in cache.planes:
        plane[50:] = torch.nan
    encoder = start_transform_encoder(cache, profile, (50,))
    output = allocate_for(profile, 50, torch.float32)
    decode_transformed(encoder.tables_file, encode_levels(encoder), profile, output)
    assert not any(plane.isnan().any() for plane in output.planes)


def test_strides_of_the_cache_and_the_output_do_not_matter() -> None:
    profile = make_profile(SHAPES, (3,))

    def head_major(plane: torch.Tensor) -> torch.Tensor:
        return plane.permute(1, 0, 2).contiguous().permute(1, 0, 2)

    cache = make_transformed_cache(profile, 40, torch.float16)
    encoder = start_transform_encoder(cache, profile, (40,))
    files = encode_levels(encoder)
    strided = from_planes([head_major(plane) for plane in cache.planes])
    assert encode_levels(start_transform_encoder(strided, profile, (40,))) == files
    outputs = [allocate_for(profile, 40, torch.float16) for _ in range(2)]
    outputs[1] = from_planes([head_major(plane) for plane in outputs[1].planes])
    for output in outputs:
        decode_transformed(encoder.tables_file, files, profile, output)
    assert all(torch.equal(a, b) for a, b in zip(outputs[0].planes, outputs[1].planes, strict=True))


def test_a_profile_from_its_folder_codes_as_in_memory(tmp_path) -> None:
    saved = save_profile(tmp_path, make_profile(SHAPES, (1, 2)))
    cache = make_transformed_cache(saved, 40)
    encoder = start_transform_encoder(cache, load_profile(tmp_path, for_encoding=True), (40,))
    assert encode_levels(encoder) == encode_levels(start_transform_encoder(cache, saved, (40,)))
    output = allocate_for(saved, 40, torch.float32)
    decode_transformed(encoder.tables_file, encode_levels(encoder), load_profile(tmp_path), output)


def test_the_transform_takes_one_block_of_tokens_at_a_time(monkeypatch) -> None:
    # Memory beyond the chunk's own components is that of a block.
    profile = make_profile(SHAPES, (3,))
    cache = make_transformed_cache(profile, 3 * BLOCK_TOKENS + 1)
    seen = []
    for name in ("join", "reconstruct"):
        original = getattr(GroupTransform, name)

        def note(self, first, *rest, original=original, name=name):
            seen.append((name, first.num_tokens if isinstance(first, KVCache) else len(first)))
            return original(self, first, *rest)

        monkeypatch.setattr(GroupTransform, name, note)
    encoder = start_transform_encoder(cache, profile, (cache.num_tokens,))
    output = allocate_for(profile, cache.num_tokens, torch.float32)
    decode_transformed(encoder.tables_file, encode_levels(encoder), profile, output)
    blocks = [BLOCK_TOKENS, BLOCK_TOKENS, BLOCK_TOKENS, 1]
    # The encoder looks at what it has coded, too.
    encoded = [(name, num_tokens) for num_tokens in blocks for name in ("join", "reconstruct")]
    assert seen == encoded + [("reconstruct", num_tokens) for num_tokens in blocks]


def test_an_encoder_keeps_the_components_of_one_chunk_only() -> None:
    profile = make_profile(SHAPES, (3,))
    encoder = start_transform_encoder(make_transformed_cache(profile, 60), profile, (20, 20, 20), num_levels=2)
    for index in range(3):
        encoder.encode_chunk(index, 1)
        assert encoder._quantized is not None and encoder._quantized.index == index
        assert encoder._quantized.components[0][0].shape[0] == 20


def test_document_says_what_it_was_made_from() -> None:
    profile = make_profile(SHAPES, (1, 2))
    encoder = start_transform_encoder(make_transformed_cache(profile, 60), profile, (40, 11), step_log=9, num_levels=3)
    header = encoder.document.header
    assert (header.num_cache_tokens, header.chunk_tokens, header.prefill_block_size) == (60, (40, 11), 512)
    assert (header.step_log, header.num_levels, encoder.levels) == (9, 3, (1, 2, 3))
    assert [(plane.num_kv_heads, plane.head_dim) for plane in header.planes] == SHAPES
    assert header.profile_hash.hex() == profile.profile_hash
    assert parse_document(encoder.tables_file) == header
    expected = encoder.expected_header(1, 2)
    assert (expected.first_token, expected.num_tokens, expected.level) == (40, 11, 2)


# --- caches and arguments that are refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused_naming_layer_and_token(value: float) -> None:
    profile = make_profile(SHAPES, (3,))
    cache = make_transformed_cache(profile, 40)
    cache.values[1][37, 0, 2] = value
    encoder = start_transform_encoder(cache, profile, (20, 20))
    encoder.encode_chunk(0, 1)
    with pytest.raises(InputError, match=r"NaN or infinity \(layer 1, values, token 37\)"):
        encoder.encode_chunk(1, 1)


@pytest.mark.parametrize("chunk_tokens", [(), (0,), (10, 0), (-1, 5), (20, 21)])
def test_chunks_that_do_not_fit_the_cache_are_refused(chunk_tokens: tuple[int, ...]) -> None:
    profile = make_profile(SHAPES, (3,))
    with pytest.raises(ValueError, match="`chunk_tokens` must be positive and at most 40 in all"):
        start_transform_encoder(make_transformed_cache(profile, 40), profile, chunk_tokens)


@pytest.mark.parametrize(
    "arguments", [{"num_levels": 0}, {"num_levels": 5}, {"step_log": MAX_STEP_LOG + 1}, {"step_log": -MAX_STEP_LOG - 1}]
)
def test_levels_and_steps_out_of_range_are_refused(arguments: dict) -> None:
    profile = make_profile(SHAPES, (3,))
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        start_transform_encoder(make_transformed_cache(profile, 4), profile, (4,), **arguments)


def test_a_profile_of_another_model_is_refused() -> None:
    profile = make_profile(SHAPES, (3,))
    cache, metadata = make_transformed_cache(profile, 40), make_metadata(40)
    for other, field in (
        (dataclasses.replace(profile, model_fingerprint="00" * 32), "model_fingerprint"),
        (profile, "rope_hash"),  # the metadata have no rotary embedding
    ):
        with pytest.raises(MismatchError, match=f"the profile's {field} is "):
            TransformEncoder(cache, metadata, other, (40,), step_log=0)
    with pytest.raises(MismatchError, match="the profile's shapes are not the KV cache's"):
        start_transform_encoder(cache, make_profile(SHAPES[:4], (2,)), (40,))


@pytest.mark.parametrize("step_log", [-MAX_STEP_LOG, MAX_STEP_LOG])
def test_the_largest_and_smallest_steps_are_coded(step_log: int) -> None:
    profile = make_profile(SHAPES, (3,))
    cache = make_transformed_cache(profile, 40)
    encoder = start_transform_encoder(cache, profile, (40,), step_log=step_log, num_levels=4)
    output = allocate_for(profile, 40, torch.float32)
    decode_transformed(encoder.tables_file, encode_levels(encoder), profile, output)
    assert all(torch.isfinite(plane).all() for plane in output.planes)


# --- gates ------------------------------------------------------------------------------------------------------------


@cache
def small_document() -> tuple[TransformEncoder, Profile, list[bytes]]:
    """An encoder of one chunk of two levels with low bits, an escape and a tail, its profile and the chunk's files."""
    profile = make_profile([(1, 4), (1, 3), (1, 4), (1, 2)], (1, 1), rotary=RotaryEmbedding("r", "d", (1.0, 0.1), 1.0))
    cache = make_transformed_cache(profile, 34)
    cache.values[0][33] += 40.0
    encoder = start_transform_encoder(cache, profile, (34,), step_log=-16, num_levels=2)
    (files,) = encode_levels(encoder)
    return encoder, profile, files


def decode_with(
    contents: list[bytes], tables_file: bytes | None = None, profile: Profile | None = None, **arguments
) -> KVCache:
    encoder, own_profile, _ = small_document()
    expected = {"first_token": 0, "token_hash": encoder.expected_header(0, 1).token_hash}
    output = arguments.pop("output", None) or allocate_for(own_profile, 34, torch.float32)
    document = open_document(tables_file or encoder.tables_file, find_profile=lambda _: profile or own_profile)
    document.decode(contents, output, **(expected | arguments))
    return output


def test_the_small_document_has_escapes_and_low_bits() -> None:
    encoder, _, files = small_document()
    assert encoder.document.codings(1)[0].low_bits.any()
    header = parse_chunk(files[0]).header
    stream, low_bits = header.streams[0], encoder.document.codings(1)[0].low_bits
    parts = 128 + 4 * -(-34 * int(low_bits.sum()) // 32) + 2 * stream.num_words
    assert stream.num_bytes >= parts + 8
    decode_with(files)


def test_chunk_of_another_place_or_context_is_refused() -> None:
    _, profile, files = small_document()
    with pytest.raises(MismatchError, match=r"^first_token is 0, but .* say 34"):
        decode_with(files, first_token=34)
    with pytest.raises(MismatchError, match=r"^token_hash is "):
        decode_with(files, token_hash=bytes(32))
    with pytest.raises(MismatchError, match=r"^num_tokens is 34, but .* say 33"):
        decode_with(files, output=allocate_for(profile, 33, torch.float32))


def test_levels_in_another_order_or_incomplete_are_refused_and_the_level_named() -> None:
    _, _, (first, second) = small_document()
    for contents, level, found in (([second], 1, 2), ([second, first], 1, 2), ([first, first], 2, 1)):
        with pytest.raises(MismatchError, match=f"^level is {found}, but .* say {level}") as caught:
            decode_with(contents)
        assert caught.value.level == level
    with pytest.raises(MismatchError, match=r"^level is 2, but .* say 3"):
        decode_with([first, second, second])
    with pytest.raises(ValueError, match="at least the file of level 1"):
        decode_with([])


def other_document(*, seed: int = 0, step_log: int = -16, dtype=torch.float32, **fields) -> tuple[bytes, list[bytes]]:
    """Tables file and chunk files of the small document with something else about it."""
    _, profile, _ = small_document()
    cache = make_transformed_cache(profile, 34, dtype, seed=1)
    metadata = make_metadata(34, seed=seed, rotary_embeddings=profile.rotary_embeddings, **fields)
    encoder = TransformEncoder(cache, metadata, profile, (34,), step_log=step_log, num_levels=2)
    return encoder.tables_file, encode_levels(encoder)[0]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("dtype", {"dtype": torch.float16}),
        ("step_log", {"step_log": -15}),
        ("tables_hash", {"block_size": 513}),
    ],
)
def test_chunk_of_another_document_is_refused_by_field(field: str, changes: dict) -> None:
    files = small_document()[2]
    other_tables, other_files = other_document(**changes)
    with pytest.raises(MismatchError, match=f"^{field} is .*the chunk is of another document"):
        decode_with(files, other_tables)
    with pytest.raises(MismatchError, match=f"^{field} is ") as caught:
        decode_with([files[0], other_files[1]])
    assert caught.value.level == 2


def test_level_two_of_another_context_is_refused() -> None:
    _, other_files = other_document(seed=1)
    with pytest.raises(MismatchError, match=r"^token_hash is ") as caught:
        decode_with([small_document()[2][0], other_files[1]])
    assert caught.value.level == 2


def change_header(content: bytes, **fields) -> bytes:
    chunk = parse_chunk(content)
    header = dataclasses.replace(chunk.header, **fields)
    return b"".join(build_transform_chunk(header, header.streams, [chunk.payload], exact_of(chunk)))


@pytest.mark.parametrize(
    "fields",
    [
        {"model_fingerprint": bytes(32)},
        {"rope_hash": bytes(32)},
        {"profile_hash": bytes(32)},
        {"tables_hash": bytes(32)},
        {"num_layers": 3},
    ],
    ids=str,
)
def test_every_gate_is_compared(fields: dict) -> None:
    _, _, (first, second) = small_document()
    with pytest.raises(MismatchError, match=f"^{next(iter(fields))} is "):
        decode_with([change_header(first, **fields), second])
    with pytest.raises(MismatchError, match=f"^{next(iter(fields))} is "):
        decode_with([first, change_header(second, **fields)])


def test_another_number_of_groups_is_refused() -> None:
    first = small_document()[2][0]
    header = parse_chunk(first).header
    content = change_header(
        first, tokens_per_stream=header.tokens_per_stream[:1], stream_index=header.stream_index[:12]
    )
    payload_bytes = -(-header.streams[0].num_bytes // 16) * 16
    content = content[: len(content) - (sum(-(-s.num_bytes // 16) * 16 for s in header.streams) - payload_bytes)]
    with pytest.raises(MismatchError, match=r"^num_groups is 1, but .* say 2"):
        decode_with([content])


def test_streams_of_more_tokens_than_escapes_can_name_are_refused() -> None:
    profile = make_profile([(16, 32), (1, 1)], (1,))
    cache = make_transformed_cache(profile, 5)
    encoder = start_transform_encoder(cache, profile, (5,), step_log=-1000)
    ((content,),) = encode_levels(encoder)
    num_components = encoder.document.codings(1)[0].num_components
    assert num_components > 256
    content = change_header(content, tokens_per_stream=(1 << 24,))
    with pytest.raises(BitstreamError, match="components are too many") as caught:
        decode_transformed(encoder.tables_file, [[content]], profile, allocate_for(profile, 5, torch.float32))
    assert caught.value.field == "tokens_per_stream"


def test_a_profile_that_the_document_does_not_name_is_refused() -> None:
    encoder, profile, files = small_document()
    other = dataclasses.replace(profile, profile_hash="77" * 32)
    with pytest.raises(MismatchError, match=r"^profile_hash is 777777777777, but .*give `profile` its folder"):
        decode_with(files, profile=other)
    header = dataclasses.replace(encoder.document.header, planes=encoder.document.header.planes[::-1])
    tables_file = header.pack()
    with pytest.raises(MismatchError, match="planes have other shapes than the profile's"):
        open_document(tables_file, find_profile=lambda _: profile)


def test_without_a_profile_a_document_is_opened_but_not_decoded() -> None:
    encoder, profile, files = small_document()
    document = open_document(encoder.tables_file)
    assert isinstance(document.header, TransformDocumentHeader)
    with pytest.raises(InputError, match=r"needs the profile .* \(`profile`\)"):
        document.decode(files, allocate_for(profile, 34, torch.float32), first_token=0, token_hash=bytes(32))


def test_chunks_of_another_method_are_refused() -> None:
    files = small_document()[2]
    tables_file, chunk = encode_all(
        start_encoder(make_shaped_cache([(1, 3), (1, 2)], 34, torch.float32), (64, 8), (34,))
    )
    with pytest.raises(MismatchError, match=r"^method is cachegen, but .* say transform"):
        decode_with([chunk])
    document = open_document(tables_file)
    output = make_shaped_cache([(1, 3), (1, 2)], 34, torch.float32)
    with pytest.raises(MismatchError, match=r"^method is transform, but .* say cachegen"):
        document.decode(files[:1], output, first_token=0, token_hash=bytes(32))


@pytest.mark.parametrize("level", [1, 2])
def test_every_flipped_bit_of_a_chunk_is_noticed(level: int) -> None:
    content = small_document()[2][level - 1]
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            parse_chunk(changed)


@pytest.mark.parametrize("level", [1, 2])
def test_every_truncation_of_a_chunk_is_noticed(level: int) -> None:
    files = list(small_document()[2])
    content = files[level - 1]
    for length in range(len(content)):
        files[level - 1] = content[:length]
        with pytest.raises(BitstreamError) as caught:
            decode_with(files)
        assert caught.value.level == level


def test_a_corrupt_stream_is_named_by_level_group_and_number() -> None:
    files = list(small_document()[2])
    chunk = parse_chunk(files[1])
    payload = bytearray(chunk.payload)
    offset = -(-chunk.header.streams[0].num_bytes // 16) * 16
    payload[offset : offset + 4] = bytes(4)  # a lane's state in the second group
    streams = [
        chunk.header.streams[0],
        chunk.header.streams[1]._replace(
            crc=crc32c(payload[offset : offset + -(-chunk.header.streams[1].num_bytes // 16) * 16])
        ),
    ]
    files[1] = b"".join(build_transform_chunk(chunk.header, streams, [bytes(payload)]))
    with pytest.raises(BitstreamError) as caught:
        decode_with(files)
    assert (caught.value.level, caught.value.field) == (2, "group 1, stream 0")


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_is_encoding_of_knows_its_own_chunks_only() -> None:
    profile = make_profile(SHAPES, (3,))
    encoder = start_transform_encoder(make_transformed_cache(profile, 60), profile, (30, 30), num_levels=2)
    chunks = encode_levels(encoder)
    for index, files in enumerate(chunks):
        assert [i for i in range(2) if encoder.is_encoding_of(i, files)] == [index]
        for level in (0, 1):
            changed = list(files)
            changed[level] = files[level][:-1]
            assert not encoder.is_encoding_of(index, changed)
            changed[level] = files[level][:-1] + bytes([files[level][-1] ^ 1])
            assert not encoder.is_encoding_of(index, changed)
        assert not encoder.is_encoding_of(index, files[::-1])
    # A level that another run, on another device, has computed does not refine this one.
    other_first = change_header(chunks[0][0], mean_error=0.0)
    assert not encoder.is_encoding_of(0, [other_first, chunks[0][1]])
    with pytest.raises(MismatchError, match=r"^refines a file of level 1 that is not the one beside it"):
        output = allocate_for(profile, 30, torch.float32)
        decode_transformed(encoder.tables_file, [[other_first, chunks[0][1]]], profile, output)
    other = start_transform_encoder(make_transformed_cache(profile, 60), profile, (30, 30), num_levels=2, step_log=1)
    assert not other.is_encoding_of(0, chunks[0])
    version_1 = encode_all(start_encoder(make_shaped_cache([(1, 3), (1, 2)], 34, torch.float32), (64, 8), (34,)))[1]
    assert not encoder.is_encoding_of(0, [version_1, version_1])


# --- how streams are cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_components", [0, 1, 5, 80, 700, 65535])
@pytest.mark.parametrize("num_tokens", [1, 31, 33, 1000, 70_000, 1 << 24])
def test_streams_are_whole_rows_and_not_too_long(num_components: int, num_tokens: int) -> None:
    tokens = choose_component_stream(num_components, num_tokens)
    assert 0 < tokens <= 1 << 24 and tokens % 32 == 0 and tokens * num_components < 1 << 32
    target = 32 * max(1, round(transform_encoder.SYMBOLS_PER_COMPONENT_LANE / max(num_components, 1)))
    assert tokens <= 1.5 * target + 32
