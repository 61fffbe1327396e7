"""Blocks of a cache to blobs and back: what comes back, how long they are, where they begin, what is refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cachegen.calibration.calibrate import CalibrationContext
from cachegen.calibration.predictor import make_predictor
from cachegen.errors import BitstreamError, ConfigError, InputError, MismatchError, UnsupportedVersionError
from cachegen.integrations.blobs import CODED, RAW, Identity, Section, pack_blob, read_blob
from cachegen.integrations.block_codec import BlockCodec, read_settings
from cachegen.integrations.memory_objects import (
    deserialize_object,
    estimate_bytes,
    pack_key,
    serialize_object,
)
from cachegen.integrations.positions import find_position
from cachegen.methods import load_profile
from tests.fixtures.blocks import BUNDLED_PROFILE, Key, Memory, read_bundled_cache, stack_planes
from tests.fixtures.caches import make_cache, make_metadata

NUM_TOKENS = 1024
TRANSFORM = {"method": "transform", "profile": BUNDLED_PROFILE, "step_log": -16}
METHODS = [
    {"method": "lossless", "head_dim": 64},
    {"method": "cachegen", "head_dim": 64},
    {"method": "uniform", "bits": 8, "head_dim": 64},
    TRANSFORM,
]
IDENTITY = Identity(b"k" * 32, b"l" * 32, b"c" * 32)


def make_codec(options: dict) -> BlockCodec:
    return BlockCodec(read_settings({"threads": 1, **options}))


def cut_block(index: int = 0, num_tokens: int = 256) -> torch.Tensor:
    """A block of the bundled model's cache."""
    return stack_planes(read_bundled_cache(NUM_TOKENS).slice(index * num_tokens, (index + 1) * num_tokens))


def round_trip(codec: BlockCodec, *tensors: torch.Tensor, key: bytes = b"key") -> list[torch.Tensor]:
    blob = codec.encode(key, tensors)
    decoded = [torch.empty_like(tensor) for tensor in tensors]
    codec.decode(key, blob, decoded)
    return decoded


def are_same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def sections_of(codec: BlockCodec, blob: bytearray, *tensors: torch.Tensor, key: bytes = b"key") -> list[Section]:
    return read_blob(blob, codec.identify(key, [t.shape for t in tensors], [t.dtype for t in tensors]))


def relative_error(decoded: torch.Tensor, exact: torch.Tensor) -> float:
    return ((decoded.float() - exact.float()).norm() / exact.float().norm()).item()


# --- the blob ---------------------------------------------------------------------------------------------------------


def make_blob() -> bytearray:
    sections = [Section(RAW, [b"raw bytes"]), Section(CODED, [b"", b"tables", b"chunk"], 4, 512)]
    return pack_blob(IDENTITY, sections)


def test_a_blob_gives_its_sections_whatever_is_behind_it():
    raw, coded = read_blob(make_blob() + b"left over", IDENTITY)
    assert (raw.kind, bytes(raw.parts[0])) == (RAW, b"raw bytes")
    assert [bytes(part) for part in coded.parts] == [b"", b"tables", b"chunk"]
    assert (coded.kind, coded.num_exact, coded.position) == (CODED, 4, 512)


def test_a_blob_with_any_bit_changed_is_refused():
    blob = make_blob()
    for bit in range(8 * len(blob)):
        changed = bytearray(blob)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            read_blob(changed, IDENTITY)


def test_a_blob_that_is_cut_off_is_refused_wherever():
    blob = make_blob()
    for length in range(len(blob)):
        with pytest.raises(BitstreamError):
            read_blob(blob[:length], IDENTITY)


@pytest.mark.parametrize("field", ["key", "layout", "codec"])
def test_a_blob_of_something_else_is_refused_and_the_message_says_of_what(field):
    wanted = Identity(**{**vars(IDENTITY), field: b"x" * 32})
    with pytest.raises(MismatchError, match=f"the blob's {field} is"):
        read_blob(make_blob(), wanted)


def test_a_blob_of_a_later_version_is_refused_as_such():
    blob = make_blob()
    blob[8] = 2
    with pytest.raises(UnsupportedVersionError, match="version: 2 is not supported, this release reads 1"):
        read_blob(blob, IDENTITY)


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "most_error"), list(zip(METHODS, (0, 0.25, 0.02, 0.25), strict=True)))
def test_a_block_comes_back_as_the_method_says_and_smaller(options, most_error):
    codec, block = make_codec(options), cut_block(1)
    (decoded,) = round_trip(codec, block)
    assert relative_error(decoded, block) <= most_error
    counts = codec.counters.snapshot()
    assert (counts["coded"], counts["encoded"], counts["decoded"]) == (1, 1, 1)
    assert counts["blob_bytes"] < counts["raw_bytes"] == counts["decoded_bytes"] == block.nbytes


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 64, 32), {"head_dim": 16}),
        ((2, 3, 64, 32), {}),
        ((1, 3, 64, 32), {"fused": True, "head_dim": 8}),
        ((3, 64, 32), {"fused": True, "head_dim": 8}),
        ((3, 64, 36), {"first_channels": 32}),
        ((1, 3, 64, 36), {}),
    ],
)
def test_every_layout_comes_back_bit_for_bit(shape, options):
    codec = make_codec({"method": "lossless", **options})
    block = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1).bfloat16()
    (decoded,) = round_trip(codec, block)
    assert are_same_bits(decoded, block) and codec.counters.snapshot()["coded"] == 1


def test_keys_and_values_side_by_side_are_those_of_the_profile():
    block = cut_block(1)
    keys, values = (part.unflatten(2, (2, 64)) for part in block)
    fused = torch.cat([keys, values], dim=3).flatten(2)
    codec = make_codec(TRANSFORM)
    (apart,), (together,) = round_trip(codec, block), round_trip(codec, fused)
    assert are_same_bits(together.unflatten(2, (2, 128))[..., :64].flatten(2).contiguous(), apart[0].contiguous())


def test_tensors_of_several_shapes_and_dtypes_are_one_object():
    codec = make_codec({"method": "lossless"})
    tensors = [
        cut_block(0),
        torch.randint(0, 255, (1, 2, 64, 40), dtype=torch.uint8).view(torch.float8_e4m3fn),
        (torch.randn(2, 1, 128, 16) * 0.1).half(),
    ]
    assert all(map(are_same_bits, round_trip(codec, *tensors), tensors))
    counts = codec.counters.snapshot()
    assert (counts["coded"], counts["raw:dtype"], counts["encoded"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("reason", "options", "block"),
    [
        ("dtype", {"method": "cachegen"}, torch.ones(2, 2, 64, 16, dtype=torch.int8)),
        ("layout", {"method": "cachegen", "head_dim": 5}, torch.ones(2, 2, 64, 16).half()),
        ("layout", TRANSFORM, torch.ones(2, 2, 64, 16).half()),
        ("values", {"method": "cachegen"}, torch.full((2, 2, 64, 16), torch.nan).half()),
        ("values", {"method": "lossless"}, torch.ones(2, 2, 64, 16)),
        ("larger", {"method": "uniform", "bits": 8}, torch.randn(2, 1, 1, 8).half()),
    ],
)
def test_what_cannot_be_coded_is_stored_as_it_is_and_counted_and_logged_once(reason, options, block, caplog):
    codec = make_codec(options)
    for _ in range(2):
        (decoded,) = round_trip(codec, block)
        assert are_same_bits(decoded, block)
    counts = codec.counters.snapshot()
    assert counts[f"raw:{reason}"] == 2 and "coded" not in counts
    assert len(caplog.records) == 1 and f"raw:{reason}" in caplog.text


def test_the_first_tokens_of_a_context_stay_exact():
    codec, block = make_codec(TRANSFORM), cut_block(0)
    (decoded,) = round_trip(codec, block)
    assert are_same_bits(decoded[:, :, :4].contiguous(), block[:, :, :4].contiguous())
    assert not torch.equal(decoded[:, :, 4:], block[:, :, 4:])


def test_several_levels_are_all_used():
    errors = []
    for levels in (1, 2):
        (decoded,) = round_trip(make_codec({**TRANSFORM, "levels": levels}), cut_block(1))
        errors.append(relative_error(decoded, cut_block(1)))
    assert errors[1] < 0.7 * errors[0]


def test_threads_get_the_same_bytes_as_one():
    codec = make_codec(TRANSFORM)
    blocks = [cut_block(index % 4) for index in range(8)]
    alone = [codec.encode(b"key", [block]) for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda block: codec.encode(b"key", [block]), blocks)) == alone
    assert codec.counters.snapshot()["encoded"] == 16


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", METHODS)
@pytest.mark.parametrize("kind", ["noise", "numbers", "zeros"])
def test_no_blob_is_longer_than_its_bound(options, kind):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 6, 64, 128)
    block = {
        "noise": torch.randint(0, 1 << 15, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16),
        "numbers": torch.randn(shape, generator=generator).bfloat16(),
        "zeros": torch.zeros(shape, dtype=torch.bfloat16),
    }[kind]
    codec = make_codec(options)
    assert len(codec.encode(b"key", [block])) <= codec.max_blob_bytes([shape], [torch.bfloat16])
    assert codec.max_blob_bytes([shape], [torch.bfloat16]) - block.nbytes < 200


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [16, 64, 256])
def test_the_position_of_each_block_of_a_models_cache_is_found(num_tokens):
    codec = make_codec(TRANSFORM)
    for index in range(NUM_TOKENS // num_tokens):
        block = cut_block(index, num_tokens)
        (section,) = sections_of(codec, codec.encode(b"key", [block]), block)
        assert section.position == index * num_tokens


def test_a_predictor_tells_positions_too(tmp_path):
    profile = load_profile(BUNDLED_PROFILE)
    cache = read_bundled_cache(NUM_TOKENS)
    metadata = make_metadata(NUM_TOKENS, rotary_embeddings=profile.rotary_embeddings)
    make_predictor([CalibrationContext("a", cache, metadata)], notes={}).save(tmp_path)
    codec = make_codec({"method": "lossless", "profile": str(tmp_path)})
    for index in range(4):
        block = cut_block(index)
        blob = codec.encode(b"key", [block])
        (section,) = sections_of(codec, blob, block)
        assert section.position == 256 * index
        decoded = torch.empty_like(block)
        codec.decode(b"key", blob, [decoded])
        assert are_same_bits(decoded, block)


def test_a_block_whose_position_is_not_found_is_not_spoilt(caplog):
    """A profile's components would lose most of keys that are turned otherwise."""
    codec, block = make_codec({**TRANSFORM, "max_context_tokens": 1}), cut_block(3)
    (decoded,) = round_trip(codec, block)
    counts = codec.counters.snapshot()
    assert are_same_bits(decoded, block) and counts["position_unknown"] == counts["raw:position"] == 1
    assert "is the profile this model's?" in caplog.text


def test_a_block_unlike_all_that_the_profile_knows_is_not_spoilt():
    codec, block = make_codec(TRANSFORM), cut_block(3)
    block[1] = block[1].flip(2)  # the values' channels in another order: the keys still have their position
    (decoded,) = round_trip(codec, block)
    counts = codec.counters.snapshot()
    assert are_same_bits(decoded, block) and counts["raw:unlike"] == 1 and "position_unknown" not in counts


def test_keys_of_no_model_have_no_position():
    profile = load_profile(BUNDLED_PROFILE)
    cache = make_cache(64, num_layers=6, num_kv_heads=2, head_dim=64)
    assert find_position(cache, profile.plane_means, profile.rotations, 1 << 17) is None


def test_where_nothing_turns_the_position_is_the_first():
    cache = make_cache(64)
    assert find_position(cache, cache.planes, (None,) * 4, 1 << 17) == 0


# --- what is refused --------------------------------------------------------------------------------------------------


def serialize(codec: BlockCodec, block: torch.Tensor, key: Key) -> Memory:
    source = Memory.of(block)
    target = Memory.empty(estimate_bytes(codec, source.get_shapes(), source.dtypes))
    num_bytes = serialize_object(codec, source, target, key)
    stored = Memory.empty(num_bytes)
    stored.raw.copy_(target.raw[:num_bytes])
    return stored


def test_objects_come_back():
    codec, block = make_codec({"method": "lossless"}), cut_block(2)
    output = Memory.of(torch.empty_like(block))
    deserialize_object(codec, serialize(codec, block, Key()), output, Key())
    assert are_same_bits(output.get_tensor(0), block)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("damaged", lambda raw: raw[200:201].add_(1)),
        ("damaged", lambda raw: raw.zero_()),
        ("damaged", lambda raw: raw[:8].copy_(torch.arange(8))),
    ],
)
def test_a_damaged_object_is_a_miss_that_is_counted_and_logged_on_one_line(reason, change, caplog):
    codec, block = make_codec({"method": "lossless"}), cut_block(2)
    stored = serialize(codec, block, Key())
    change(stored.raw)
    with pytest.raises(BitstreamError):
        deserialize_object(codec, stored, Memory.of(block), Key())
    counts = codec.counters.snapshot()
    assert counts[f"missed:{reason}"] == 1 and "decoded" not in counts
    (record,) = caplog.records
    assert record.exc_info is None and "\n" not in record.getMessage()


OTHER_KEYS = [
    Key(chunk_hash=b"\x02" * 32),
    Key(model_name="another/model"),
    Key(kv_rank=1),
    Key(object_group_id=1),
    Key(cache_salt="another user"),
]


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_an_object_under_another_key_is_a_miss(key):
    codec, block = make_codec({"method": "lossless"}), cut_block(2)
    stored = serialize(codec, block, Key())
    with pytest.raises(MismatchError, match="the blob's key is"):
        deserialize_object(codec, stored, Memory.of(block), key)
    assert codec.counters.snapshot()["missed:foreign"] == 1


def test_keys_that_differ_are_different_bytes():
    assert len({pack_key(key) for key in [Key(), *OTHER_KEYS]}) == 1 + len(OTHER_KEYS)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cachegen", "head_dim": 64},
        {"method": "uniform", "bits": 8, "head_dim": 64},
        {"method": "uniform", "bits": 4, "head_dim": 32},
        TRANSFORM,
    ],
)
def test_an_object_of_another_configuration_is_a_miss(options):
    written = serialize(make_codec({"method": "uniform", "bits": 4, "head_dim": 64}), cut_block(2), Key())
    codec = make_codec(options)
    with pytest.raises(MismatchError, match="the blob's codec is"):
        deserialize_object(codec, written, Memory.of(cut_block(2)), Key())


@pytest.mark.parametrize("shape", [(2, 6, 128, 128), (2, 6, 256, 64), (6, 2, 256, 128)])
def test_an_object_of_another_shape_is_a_miss(shape):
    codec = make_codec({"method": "lossless"})
    stored = serialize(codec, cut_block(2), Key())
    with pytest.raises(MismatchError, match="the blob's layout is"):
        deserialize_object(codec, stored, Memory.of(torch.empty(shape, dtype=torch.bfloat16)), Key())


def test_a_buffer_that_is_too_small_is_refused_before_a_byte_is_written():
    codec, target = make_codec({"method": "lossless"}), Memory.empty(100)
    with pytest.raises(ValueError, match="the buffer has 100 bytes"):
        serialize_object(codec, Memory.of(cut_block()), target, Key())
    assert not target.raw.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gzip"}, "method must be one of"),
        ({"method": "uniform"}, "bits is missing"),
        ({"method": "uniform", "bits": 8, "level": 1}, "unknown field level"),
        ({"method": "transform", "step_log": 0}, "needs a profile"),
        ({"profile": "somewhere"}, "profile must be a folder"),
        ({"method": "lossless", "profile": BUNDLED_PROFILE}, "is not one for method lossless"),
        ({"method": "uniform", "bits": 8, "threads": 0}, "threads must be"),
        ({"method": "uniform", "bits": 8, "head_dim": -1}, "head_dim must be"),
        ({"method": "uniform", "bits": 8, "fused": "yes"}, "fused must be"),
        ({"method": "lossless", "config": {"method": "uniform", "bits": 8}}, "method is lossless, config says uniform"),
        ({"config": {"method": "uniform", "bits": 8}, "bits": 4}, "bits belongs into config"),
    ],
)
def test_a_wrong_configuration_is_refused_at_the_start(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_settings(options)
    assert "\n" not in str(caught.value)


def test_a_missing_profile_is_refused_at_the_start(tmp_path):
    with pytest.raises(InputError, match="profile"):
        read_settings({**TRANSFORM, "profile": str(tmp_path)})


def test_a_config_may_be_a_file_or_an_object_and_means_the_same(config_path):
    content = json.loads(config_path.read_text("utf-8"))
    by_path, by_object = read_settings({"config": str(config_path)}), read_settings({"config": content})
    assert by_path.codec_hash == by_object.codec_hash


def test_settings_that_decode_otherwise_have_other_hashes_and_threads_do_not_count():
    settings = [*METHODS, {"method": "uniform", "bits": 7, "head_dim": 64}, {**TRANSFORM, "step_log": 0}]
    assert len({read_settings(options).codec_hash for options in settings}) == len(settings)
    assert read_settings({**TRANSFORM, "threads": 2}).codec_hash == read_settings(TRANSFORM).codec_hash
