"""The coder of components: on every path the kernels write the reference's bytes, and nothing corrupt does harm."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from cachegen.coder import components as coder
from cachegen.coder import cpu
from cachegen.coder.component_tables import NUM_CODED_SCALES, NUM_REFINED_SCALES, LevelCoding, component_frequencies
from cachegen.coder.components import (
    ComponentGroup,
    decode_component_groups,
    decode_components,
    encode_components,
)
from cachegen.errors import BitstreamError
from cachegen.format import StreamEntry
from cachegen.methods.transform.transform import MAX_COMPONENT
from tests.reference.components import (
    decode_component_stream,
    encode_component_stream,
    refine,
    refinement_symbol,
    zero_symbol,
)
from tests.reference.planes import crc32c


@pytest.fixture(autouse=True, params=cpu.supported_paths())
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path that coding takes where a test names none: each in turn."""
    monkeypatch.setattr(coder, "native_path", lambda asked: cpu.native_path(asked or request.param))
    return request.param


def make_coding(anew: list[tuple[int, int]], refined: list[int] | None = None) -> LevelCoding:
    """A coding of components.

    Args:
        anew: (scale index, low bits) of components that are coded anew.
        refined: the level before's scale index of those that are refined.
    """
    refined = refined or []
    tables = [NUM_CODED_SCALES + index - 1 for index in refined] + [index - 1 for index, _ in anew]
    low_bits = [0] * len(refined) + [bits for _, bits in anew]
    return LevelCoding(np.array(tables, np.uint16), np.array(low_bits, np.uint8), len(refined))


def draw(coding: LevelCoding, num_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Components about as wide as their tables and the level before's, a few of them far out."""
    generator = np.random.default_rng(seed)
    coarse = np.round(generator.logistic(size=(num_tokens, coding.num_refined)) * 3).astype(np.int32)
    fine = np.zeros((num_tokens, coding.num_components), np.int32)
    fine[:, : coding.num_refined] = 3 * coarse + generator.integers(-1, 2, coarse.shape)
    for component in range(coding.num_refined, coding.num_components):
        sigma = 2.0 ** ((int(coding.table_indices[component]) - 7) / 4 + int(coding.low_bits[component]))
        fine[:, component] = np.round(generator.laplace(size=num_tokens) * sigma)
    far = generator.random(fine.shape) < 0.01
    far[:, : coding.num_refined] = False
    fine[far] = generator.integers(-MAX_COMPONENT, MAX_COMPONENT + 1, int(far.sum()))
    return fine, coarse


def reference_payload(
    fine: np.ndarray, coarse: np.ndarray | None, coding: LevelCoding, tokens_per_stream: int
) -> tuple[bytes, list[StreamEntry]]:
    payload, entries = b"", []
    for start in range(0, len(fine), tokens_per_stream):
        stop = start + tokens_per_stream
        content, num_words = encode_component_stream(
            fine[start:stop].tolist(), None if coarse is None else coarse[start:stop].tolist(), coding
        )
        padded = content + bytes(-len(content) % 16)
        entries.append(StreamEntry(len(content), num_words, crc32c(padded)))
        payload += padded
    return payload, entries


def decode_native(
    payload: bytes, entries: list[StreamEntry], coarse: np.ndarray | None, coding: LevelCoding, shape, tokens=None
) -> np.ndarray:
    components = np.zeros(shape, np.int32)
    if coarse is not None:
        components[:, : coding.num_refined] = coarse[:, : coding.num_refined]
    decode_components(payload, entries, components, coding, tokens or 32 * -(-shape[0] // 32))
    return components


def check(fine: np.ndarray, coarse: np.ndarray | None, coding: LevelCoding, tokens_per_stream: int = 0) -> bytes:
    """Encode and decode with both coders, which must agree byte for byte; returns the payload."""
    tokens_per_stream = tokens_per_stream or 32 * -(-len(fine) // 32)
    payload, entries = encode_components(fine, coarse, coding, tokens_per_stream)
    assert (bytes(payload), entries) == reference_payload(fine, coarse, coding, tokens_per_stream)
    assert (decode_native(payload, entries, coarse, coding, fine.shape, tokens_per_stream) == fine).all()
    offset = 0
    for entry, start in zip(entries, range(0, len(fine), tokens_per_stream), strict=True):
        part = slice(start, start + tokens_per_stream)
        found = decode_component_stream(
            bytes(payload[offset : offset + entry.num_bytes]),
            entry.num_words,
            len(fine[part]),
            None if coarse is None else coarse[part].tolist(),
            coding,
        )
        assert found == fine[part].tolist()
        offset += -(-entry.num_bytes // 16) * 16
    return bytes(payload)


# --- the kernels are the reference ------------------------------------------------------------------------------------

ALL_SCALES = make_coding([(index, 0) for index in range(1, NUM_CODED_SCALES + 1)])
ALL_LOW_BITS = make_coding([(13, 8), (12, 7), (11, 6), (10, 5), (13, 4), (12, 3), (11, 2), (10, 1), (13, 0), (1, 0)])
MIXED = make_coding([(13, 1), (9, 0), (2, 0)], refined=[1, 7, 13, 14, 20, NUM_REFINED_SCALES])
WIDE = make_coding([(1 + index % 13, 0) for index in range(70)])


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 64, 100])
@pytest.mark.parametrize(
    "coding", [ALL_SCALES, ALL_LOW_BITS, MIXED, WIDE], ids=["all scales", "all low bits", "mixed", "wide"]
)
def test_kernels_write_the_references_bytes(coding: LevelCoding, num_tokens: int) -> None:
    check(*draw(coding, num_tokens, seed=num_tokens), coding)


@pytest.mark.parametrize("seed", range(30))
def test_any_coding_round_trips(seed: int) -> None:
    generator = random.Random(seed)
    anew = [
        (generator.randint(10, 13), generator.randint(0, 8))
        if generator.random() < 0.5
        else (generator.randint(1, 13), 0)
        for _ in range(generator.randrange(0, 40))
    ]
    refined = [generator.randint(1, NUM_REFINED_SCALES) for _ in range(generator.randrange(0, 20))]
    coding = make_coding(anew, refined)
    num_tokens = generator.randint(1, 120)
    check(*draw(coding, num_tokens, seed), coding, 32 * generator.randint(1, 4))


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 40])
def test_without_components_there_are_states_alone(num_tokens: int) -> None:
    fine = np.zeros((num_tokens, 0), np.int32)
    payload = check(fine, None, make_coding([]))
    assert payload == (b"\0\0\1\0" * min(num_tokens, 32)).ljust(16 * -(-min(num_tokens, 32) // 4), b"\0")


def test_components_of_zero_cost_next_to_nothing() -> None:
    coding = make_coding([(1, 0)] * 4)
    payload = check(np.zeros((320, 4), np.int32), None, coding)
    assert len(payload) < 128 + 1280 * 0.2 / 8 * 2


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_change_neither_bytes_nor_components(num_threads: int) -> None:
    fine, coarse = draw(MIXED, 500, seed=1)
    payload, entries = encode_components(fine, coarse, MIXED, 64, num_threads)
    assert (bytes(payload), entries) == reference_payload(fine, coarse, MIXED, 64)
    components = np.zeros(fine.shape, np.int32)
    components[:, : MIXED.num_refined] = coarse
    decode_components(payload, entries, components, MIXED, 64, num_threads)
    assert (components == fine).all()


def test_columns_beyond_the_coded_ones_are_left_alone() -> None:
    fine, _ = draw(ALL_SCALES, 40, seed=3)
    payload, entries = encode_components(fine, None, ALL_SCALES, 64)
    components = np.full((40, ALL_SCALES.num_components + 3), 7, np.int32)
    decode_components(payload, entries, components, ALL_SCALES, 64)
    assert (components[:, :-3] == fine).all() and (components[:, -3:] == 7).all()


# Numbers of components around tiles and their halves, and an order in which streams are not decoded.
GROUP_SIZES = (5, 33, 0, 16, 70, 17, 8, 70, 1, 40)


def make_groups(num_tokens: int, tokens_per_stream: int) -> tuple[bytes, list[StreamEntry], list[ComponentGroup]]:
    """Groups of several sizes, their payload, and what `decode_component_groups` is to find in `components`."""
    payload, streams, groups = b"", [], []
    for number, size in enumerate(GROUP_SIZES):
        coding = make_coding([(1 + (index + number) % 13, 3 * (index % 5 == 4)) for index in range(size)])
        fine, _ = draw(coding, num_tokens, seed=number)
        part, entries = encode_components(fine, None, coding, tokens_per_stream)
        payload += bytes(part)
        streams += entries
        groups.append(ComponentGroup(number, fine, coding, tokens_per_stream))
    return payload, streams, groups


def emptied(groups: list[ComponentGroup]) -> list[ComponentGroup]:
    return [replace(group, components=np.full_like(group.components, 9)) for group in groups]


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("num_tokens", [1, 64, 70, 200])
def test_groups_of_any_sizes_are_decoded_together(num_tokens: int, num_threads: int) -> None:
    payload, streams, groups = make_groups(num_tokens, 64)
    found = emptied(groups)
    decode_component_groups(payload, streams, found, num_threads)
    for group, expected in zip(found, groups, strict=True):
        assert (group.components == expected.components).all()


def test_the_corrupt_stream_of_several_groups_is_named() -> None:
    payload, streams, groups = make_groups(200, 64)
    offset = 0
    for index, entry in enumerate(streams):
        damaged = bytearray(payload)
        damaged[offset + 2] ^= 2
        with pytest.raises(BitstreamError, match=f"group {index // 4}, stream {index % 4}"):
            decode_component_groups(damaged, streams, emptied(groups))
        offset += -(-entry.num_bytes // 16) * 16


@pytest.mark.parametrize("num_tokens", [32 * 256 - 1, 32 * 256 + 1])
def test_long_streams_are_coded(num_tokens: int) -> None:
    # Vector kernels leave streams of more than 256 rows to the portable one.
    coding = make_coding([(13, 1), (1, 0)], refined=[4])
    fine, coarse = draw(coding, num_tokens, seed=0)
    payload, entries = encode_components(fine, coarse, coding, 1 << 14)
    assert (bytes(payload), entries) == encode_portably(fine, coarse, coding, 1 << 14)
    assert (decode_native(payload, entries, coarse, coding, fine.shape) == fine).all()


def encode_portably(*arguments) -> tuple[bytes, list[StreamEntry]]:
    payload, entries = encode_components(*arguments, path="portable")
    return bytes(payload), entries


@pytest.mark.parametrize("num_tokens", [1, 33, 64])
def test_any_tables_do(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that no level has: a single symbol, gaps between symbols, all 32."""
    frequencies = np.zeros((40, 32), np.uint16)
    generator = np.random.default_rng(0)
    for row in frequencies[:38]:
        present = generator.choice(32, generator.integers(1, 33), replace=False)
        row[present] = 1
        row[present[0]] = 4097 - len(present)
    frequencies[38, 31] = frequencies[39, 0] = 4096
    monkeypatch.setattr(coder, "component_tables", lambda: cpu.Tables.from_frequencies(frequencies))
    low_bits = [generator.integers(0, 9) if index % 3 == 0 else 0 for index in range(40)]
    coding = LevelCoding(np.arange(40, dtype=np.uint16), np.array(low_bits, np.uint8), 0)
    fine = np.empty((num_tokens, 40), np.int32)
    for component in range(40):
        high = generator.choice(np.flatnonzero(frequencies[component]), num_tokens)
        low = generator.integers(0, 1 << low_bits[component], num_tokens)
        fine[:, component] = (high << low_bits[component]) + low - zero_symbol(int(low_bits[component]))
    payload, entries = encode_components(fine, None, coding, 64)
    assert (bytes(payload), entries) == encode_portably(fine, None, coding, 64)
    assert (decode_native(payload, entries, None, coding, fine.shape) == fine).all()
    gap = int(np.flatnonzero(frequencies[5] == 0)[0])
    fine[0, 5] = (gap << low_bits[5]) - zero_symbol(int(low_bits[5]))
    if np.flatnonzero(frequencies[5])[0] < gap < np.flatnonzero(frequencies[5])[-1]:
        with pytest.raises(ValueError, match="cannot be encoded: NO_FREQUENCY"):
            encode_components(fine, None, coding, 64)


# --- symbols ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coarse", "fines"),
    [(0, (-1, 0, 1)), (1, (2, 3, 4)), (5, (14, 15, 16)), (-1, (-2, -3, -4)), (-5, (-14, -15, -16))],
)
def test_refinement_counts_thirds_from_zero_outwards(coarse: int, fines: tuple[int, ...]) -> None:
    assert [refine(coarse, symbol) for symbol in range(3)] == list(fines)
    assert [refinement_symbol(coarse, fine) for fine in fines] == [0, 1, 2]


@pytest.mark.parametrize("low_bits", range(9))
def test_the_middle_symbol_is_zero(low_bits: int) -> None:
    assert zero_symbol(low_bits) == 16 * 2**low_bits + (2**low_bits // 2)


@pytest.mark.parametrize("coarse", [0, 1, -1, 9, -9, MAX_COMPONENT, -MAX_COMPONENT, 9 * MAX_COMPONENT])
def test_refinement_of_negative_zero_and_positive(coarse: int) -> None:
    coding = make_coding([], refined=[9])
    thirds = np.array([[third] for third in (-1, 0, 1, 1, -1)], np.int32)
    coarse_components = np.full((5, 1), coarse, np.int32)
    check(3 * coarse_components + thirds, coarse_components, coding)


@pytest.mark.parametrize("fine", [2, -2, 5, 1 << 24])
def test_what_does_not_refine_is_refused(fine: int) -> None:
    coding, coarse = make_coding([], refined=[9]), np.zeros((1, 1), np.int32)
    with pytest.raises(ValueError, match="cannot be encoded"):
        encode_components(np.full((1, 1), fine, np.int32), coarse, coding, 32)
    with pytest.raises(ValueError, match="does not refine"):
        encode_component_stream([[fine]], [[0]], coding)


@pytest.mark.parametrize("coarse", [2**29 + 1, -(2**29) - 1, 2**31 - 1, -(2**31)])
def test_what_no_level_can_refine_is_refused(coarse: int) -> None:
    # 3 coarse in 32 bits would be a refinement.
    fine = (3 * coarse + 2**31) % 2**32 - 2**31
    with pytest.raises(ValueError, match="cannot be encoded"):
        encode_components(
            np.full((40, 1), fine, np.int32), np.full((40, 1), coarse, np.int32), make_coding([], refined=[9]), 64
        )


# --- escapes ----------------------------------------------------------------------------------------------------------


def end_of_words(num_words: int, coding: LevelCoding, num_tokens: int) -> int:
    low_bits_bytes = 4 * -(-num_tokens * int(coding.low_bits.sum()) // 32)
    return 4 * min(num_tokens, 32) + low_bits_bytes + 2 * num_words


def escapes_of(payload: bytes, entry: StreamEntry, coding: LevelCoding, num_tokens: int) -> bytes:
    words_end = end_of_words(entry.num_words, coding, num_tokens)
    return payload[-(-words_end // 4) * 4 : entry.num_bytes]


@pytest.mark.parametrize(("index", "low_bits"), [(1, 0), (5, 0), (13, 0), (10, 1), (13, 3), (13, 8)])
def test_escapes_begin_where_symbols_end(index: int, low_bits: int) -> None:
    coding = make_coding([(index, low_bits)])
    present = np.flatnonzero(component_frequencies()[index - 1])
    smallest = (int(present[0]) << low_bits) - zero_symbol(low_bits)
    largest = (int(present[-1]) + 1 << low_bits) - 1 - zero_symbol(low_bits)
    for value, is_escaped in ((smallest, 0), (smallest - 1, 1), (largest, 0), (largest + 1, 1)):
        fine = np.array([[value]], np.int32)
        check(fine, None, coding)
        payload, (entry,) = encode_components(fine, None, coding, 32)
        assert len(escapes_of(bytes(payload), entry, coding, 1)) == 8 * is_escaped


@pytest.mark.parametrize("value", [MAX_COMPONENT, -MAX_COMPONENT])
def test_first_and_last_component_may_be_as_large_as_components_get(value: int) -> None:
    fine = np.zeros((40, 3), np.int32)
    fine[0, 0] = fine[39, 2] = value
    coding = make_coding([(3, 0), (13, 2), (1, 0)])
    check(fine, None, coding)
    payload, (entry,) = encode_components(fine, None, coding, 64)
    expected = [0, value, 119, value]
    assert np.frombuffer(escapes_of(bytes(payload), entry, coding, 40), "<i4").tolist() == expected


def test_everything_may_be_escaped() -> None:
    fine = np.full((33, 2), 1000, np.int32)
    check(fine, None, make_coding([(1, 0), (2, 0)]))


@pytest.mark.parametrize("value", [MAX_COMPONENT + 1, -MAX_COMPONENT - 1, 2**31 - 1, -(2**31)])
def test_larger_components_are_refused(value: int) -> None:
    coding = make_coding([(13, 8)])
    with pytest.raises(ValueError, match="cannot be encoded"):
        encode_components(np.array([[value]], np.int32), None, coding, 32)
    with pytest.raises(ValueError, match="is beyond"):
        encode_component_stream([[value]], None, coding)


def refuse_both(
    content: bytes, num_words: int, coarse: np.ndarray | None, coding: LevelCoding, shape: tuple[int, int]
) -> None:
    entry = StreamEntry(len(content), num_words, 0)
    with pytest.raises(BitstreamError):
        decode_native(content + bytes(-len(content) % 16), [entry], coarse, coding, shape)
    with pytest.raises(BitstreamError):
        decode_component_stream(content, num_words, shape[0], None if coarse is None else coarse.tolist(), coding)


@pytest.mark.parametrize(
    "escapes",
    [
        [(3, 100), (2, 100)],
        [(3, 100), (3, 100)],
        [(80, 100)],
        [(2**32 - 1, 100)],
        [(0, 1)],
        [(78, 1)],
        [(1, MAX_COMPONENT + 1)],
        [(1, -MAX_COMPONENT - 1)],
        [(1, -(2**31))],
    ],
    ids=["descending", "twice", "behind the end", "far behind it", "refined", "refined, last row", "+", "-", "int min"],
)
def test_wrong_escapes_are_refused(escapes: list[tuple[int, int]]) -> None:
    coding = make_coding([(9, 0)], refined=[9])
    fine, coarse = np.zeros((40, 2), np.int32), np.zeros((40, 1), np.int32)
    content, num_words = encode_component_stream(fine.tolist(), coarse.tolist(), coding)
    content += bytes(-len(content) % 4)
    for place, value in escapes:
        content += place.to_bytes(4, "little") + value.to_bytes(4, "little", signed=True)
    refuse_both(content, num_words, coarse, coding, (40, 2))


def test_an_escape_that_a_symbol_could_spell_is_taken() -> None:
    coding = make_coding([(9, 0)])
    content, num_words = encode_component_stream([[0]] * 5, None, coding)
    content += bytes(-len(content) % 4) + (2).to_bytes(4, "little") + (1).to_bytes(4, "little")
    padded = content + bytes(-len(content) % 16)
    found = decode_native(padded, [StreamEntry(len(content), num_words, 0)], None, coding, (5, 1))
    assert found.ravel().tolist() == [0, 0, 1, 0, 0]
    assert decode_component_stream(content, num_words, 5, None, coding) == [[0], [0], [1], [0], [0]]


# --- bytes that are refused -------------------------------------------------------------------------------------------


def make_stream() -> tuple[bytes, int, np.ndarray, np.ndarray]:
    """A stream of 40 tokens with refinements, low bits, words and two escapes."""
    fine, coarse = draw(MIXED, 40, seed=8)
    fine[:, MIXED.num_refined :] = fine[:, MIXED.num_refined :].clip(-5, 5)
    fine[4, -1], fine[39, -1] = 500, -500
    return *encode_component_stream(fine.tolist(), coarse.tolist(), MIXED), fine, coarse


def test_every_truncation_is_refused() -> None:
    content, num_words, fine, coarse = make_stream()
    words_end = end_of_words(num_words, MIXED, 40)
    # Only the checksum knows that there was one escape more.
    whole = {words_end, len(content) - 8}
    for length in range(len(content)):
        if length not in whole:
            refuse_both(content[:length], num_words, coarse, MIXED, fine.shape)


def test_words_left_over_or_missing_are_refused() -> None:
    fine, coarse = draw(MIXED, 40, seed=9)
    fine[:, MIXED.num_refined :] = fine[:, MIXED.num_refined :].clip(-1, 1)
    content, num_words = encode_component_stream(fine.tolist(), coarse.tolist(), MIXED)
    assert num_words > 2
    refuse_both(content + b"\0\0", num_words + 1, coarse, MIXED, fine.shape)
    refuse_both(content[:-2], num_words - 1, coarse, MIXED, fine.shape)
    refuse_both(content, num_words + 1, coarse, MIXED, fine.shape)
    refuse_both(content, 2**32 - 1, coarse, MIXED, fine.shape)
    refuse_both(content + bytes(3), num_words, coarse, MIXED, fine.shape)
    refuse_both(content + bytes(4), num_words, coarse, MIXED, fine.shape)


@pytest.mark.parametrize("state", [0, 1, 65536, 2**32 - 1])
def test_changed_states_are_refused(state: int) -> None:
    content, num_words, fine, coarse = make_stream()
    for lane in range(32):
        changed = content[: 4 * lane] + state.to_bytes(4, "little") + content[4 * lane + 4 :]
        assert changed != content
        refuse_both(changed, num_words, coarse, MIXED, fine.shape)


def test_a_stream_without_bytes_is_refused() -> None:
    for shape in ((5, 9), (40, 9)):
        refuse_both(b"", 0, np.zeros((shape[0], 6), np.int32), MIXED, shape)
    refuse_both(b"", 0, None, make_coding([]), (3, 0))


@pytest.mark.parametrize("seed", range(12))
def test_corruption_gives_an_error_or_other_components_and_nothing_else(seed: int) -> None:
    generator = random.Random(seed)
    content, num_words, fine, coarse = make_stream()
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 8, 50])):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        if generator.random() < 0.3:
            changed = changed[: generator.randrange(len(changed) + 1)]
        if generator.random() < 0.3:
            changed += generator.randbytes(generator.randrange(40))
        words = num_words if generator.random() < 0.7 else generator.randrange(2 * num_words)
        entry = StreamEntry(len(changed), words, 0)
        try:
            expected = decode_component_stream(bytes(changed), words, 40, coarse.tolist(), MIXED)
        except BitstreamError:
            refuse_both(bytes(changed), words, coarse, MIXED, fine.shape)
            continue
        padded = bytes(changed) + bytes(-len(changed) % 16)
        assert decode_native(padded, [entry], coarse, MIXED, fine.shape).tolist() == expected


def test_random_bytes_are_refused() -> None:
    generator = random.Random(0)
    for _ in range(200):
        content = generator.randbytes(generator.randrange(400))
        refuse_both(content, generator.randrange(200), np.zeros((40, 6), np.int32), MIXED, (40, 9))


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_value_errors() -> None:
    fine = np.zeros((4, 2), np.int32)
    coding = make_coding([(1, 0), (2, 0)])
    with pytest.raises(ValueError, match="fine has another shape"):
        encode_components(fine[:, :1], None, coding, 32)
    with pytest.raises(ValueError, match="coarse has another shape"):
        encode_components(fine, None, make_coding([(1, 0)], refined=[1]), 32)
    for tokens_per_stream in (0, 31, -32, 1 << 32):
        with pytest.raises(ValueError, match="tokens_per_stream is out of range"):
            encode_components(fine, None, coding, tokens_per_stream)
    with pytest.raises(ValueError, match="a table index is out of range"):
        encode_components(fine, None, make_coding([(1, 0), (38, 0)]), 32)
    for low_bits in (9, 255):
        with pytest.raises(ValueError, match="low_bits out of range"):
            encode_components(fine, None, make_coding([(1, 0), (2, low_bits)]), 32)
    payload, entries = encode_components(fine, None, coding, 32)
    with pytest.raises(ValueError, match="components has another shape"):
        decode_components(payload, entries, np.zeros((4, 1), np.int32), coding, 32)


def test_a_path_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="`path` must be one of portable, "):
        encode_components(np.zeros((4, 0), np.int32), None, make_coding([]), 32, path="best")
