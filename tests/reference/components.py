"""The coder of components in plain Python: slow, and laid out like docs/format.md. The oracle of the tests.

A stream holds some tokens of one group of layers at one level. Components that the level before coded are refined by
one of three symbols each; the others are coded anew, as a table-coded high part and raw low bits, with a list of
escapes for what no symbol stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachegen.coder.component_tables import LevelCoding, component_frequencies
from cachegen.errors import BitstreamError
from cachegen.format import LANES, TABLE_SIZE
from cachegen.methods.transform.transform import LEVEL_RATIO, MAX_COMPONENT
from tests.reference.planes import FREQUENCY_BITS, STATE_LOW, WORD_BITS

ESCAPE_BYTES = 8
_MIDDLE = TABLE_SIZE // 2


@dataclass(frozen=True)
class Escape:
    """A component that no symbol stands for; `place` is token * num_components + component."""

    place: int
    value: int


def zero_symbol(low_bits: int) -> int:
    """Return the symbol of a component of zero: the middle of the middle high part."""
    return (_MIDDLE << low_bits) + ((1 << low_bits) >> 1)


def refine(coarse: int, symbol: int) -> int:
    """Return the component that a refinement says: 0 is the third of the cell towards zero, 2 the one away from it."""
    return LEVEL_RATIO * coarse + (1 - symbol if coarse < 0 else symbol - 1)


def refinement_symbol(coarse: int, fine: int) -> int:
    """Return the symbol that refines `coarse` to `fine`; the inverse of `refine`.

    Raises:
        ValueError: `fine` is not in the cell of `coarse`.
    """
    third = fine - LEVEL_RATIO * coarse
    if not -1 <= third <= 1:
        raise ValueError(f"{fine} does not refine {coarse}")
    return 1 + (-third if coarse < 0 else third)


def encode_component_stream(
    fine: Sequence[Sequence[int]], coarse: Sequence[Sequence[int]] | None, coding: LevelCoding
) -> tuple[bytes, int]:
    """Encode one stream.

    Args:
        fine: `[num_tokens][num_components]`, this level's.
        coarse: `[num_tokens][at least num_refined]`, the level before's; None at level 1.

    Returns:
        The stream without its padding, and its number of words.

    Raises:
        ValueError: `fine` does not refine `coarse`, or a component is beyond 2^24.
    """
    num_tokens, num_components = len(fine), coding.num_components
    symbols = [[0] * num_tokens for _ in range(num_components)]
    escapes: list[Escape] = []
    for token in range(num_tokens):
        for component in range(num_components):
            value = fine[token][component]
            if component < coding.num_refined and coarse is not None:
                symbol = refinement_symbol(coarse[token][component], value)
            else:
                if abs(value) > MAX_COMPONENT:
                    raise ValueError(f"component {value} is beyond {MAX_COMPONENT}")
                symbol = _nearest_symbol(value, component, coding)
                if symbol - zero_symbol(int(coding.low_bits[component])) != value:
                    escapes.append(Escape(token * num_components + component, value))
            symbols[component][token] = symbol

    states, words = _encode_high_parts(symbols, num_tokens, coding)
    content = b"".join(state.to_bytes(4, "little") for state in states)
    content += _pack_low_bits(symbols, num_tokens, coding)
    content += b"".join(word.to_bytes(2, "little") for word in words)
    if escapes:
        content += bytes(-len(content) % 4)
        for escape in escapes:
            content += escape.place.to_bytes(4, "little") + escape.value.to_bytes(4, "little", signed=True)
    return content, len(words)


def decode_component_stream(
    content: bytes, num_words: int, num_tokens: int, coarse: Sequence[Sequence[int]] | None, coding: LevelCoding
) -> list[list[int]]:
    """Decode one stream.

    Args:
        content: the stream without its padding.
        num_words: its number of words, from the index.
        coarse: `[num_tokens][at least num_refined]`, the level before's; None at level 1.

    Returns:
        Components, `[num_tokens][num_components]`.

    Raises:
        BitstreamError: the stream is not whole, its lanes do not end in the start state, or an escape is out of place.
    """
    states_end = 4 * min(num_tokens, LANES)
    low_bits_bytes = _low_bits_bytes(num_tokens, coding)
    words_at = states_end + low_bits_bytes
    words_end = words_at + 2 * num_words
    if words_end > len(content):
        raise BitstreamError("the stream ends too early", field="stream")
    states = [int.from_bytes(content[at : at + 4], "little") for at in range(0, states_end, 4)]
    words = [int.from_bytes(content[at : at + 2], "little") for at in range(words_at, words_end, 2)]
    low_parts = _unpack_low_bits(content[states_end:words_at], num_tokens, coding)
    high_parts = _decode_high_parts(states, words, num_tokens, coding)

    components = [[0] * coding.num_components for _ in range(num_tokens)]
    for token in range(num_tokens):
        for component in range(coding.num_components):
            low_bits = int(coding.low_bits[component])
            symbol = high_parts[component][token] << low_bits | low_parts[component][token]
            if component < coding.num_refined and coarse is not None:
                components[token][component] = refine(coarse[token][component], symbol)
            else:
                components[token][component] = symbol - zero_symbol(low_bits)
    for escape in _read_escapes(content, words_end, num_tokens, coding):
        token, component = divmod(escape.place, coding.num_components)
        components[token][component] = escape.value
    return components


def _nearest_symbol(value: int, component: int, coding: LevelCoding) -> int:
    """Return the symbol nearest to a component's among those whose high part has a frequency."""
    low_bits = int(coding.low_bits[component])
    frequencies = component_frequencies()[coding.table_indices[component]].tolist()
    present = [high for high in range(TABLE_SIZE) if frequencies[high]]
    smallest, largest = present[0] << low_bits, (present[-1] << low_bits) + (1 << low_bits) - 1
    return min(max(value + zero_symbol(low_bits), smallest), largest)


def _lanes(num_tokens: int) -> list[range]:
    """The tokens of each row; only the last row may have fewer than 32."""
    return [range(start, min(start + LANES, num_tokens)) for start in range(0, num_tokens, LANES)]


def _low_bits_bytes(num_tokens: int, coding: LevelCoding) -> int:
    num_bits = num_tokens * sum(map(int, coding.low_bits))
    return 4 * -(-num_bits // 32)


def _pack_low_bits(symbols: Sequence[Sequence[int]], num_tokens: int, coding: LevelCoding) -> bytes:
    packed, num_bits = 0, 0
    for tokens in _lanes(num_tokens):
        for component in range(coding.num_components):
            for bit in range(coding.low_bits[component]):
                for token in tokens:
                    packed |= (symbols[component][token] >> bit & 1) << num_bits
                    num_bits += 1
    return packed.to_bytes(_low_bits_bytes(num_tokens, coding), "little")


def _unpack_low_bits(content: bytes, num_tokens: int, coding: LevelCoding) -> list[list[int]]:
    low_parts = [[0] * num_tokens for _ in range(coding.num_components)]
    packed, num_bits = int.from_bytes(content, "little"), 0
    for tokens in _lanes(num_tokens):
        for component in range(coding.num_components):
            for bit in range(coding.low_bits[component]):
                for token in tokens:
                    low_parts[component][token] |= (packed >> num_bits & 1) << bit
                    num_bits += 1
    return low_parts


def _table(component: int, coding: LevelCoding) -> tuple[list[int], list[int]]:
    """Return the frequencies of a component's table and their exclusive cumulative sums."""
    frequencies = component_frequencies()[coding.table_indices[component]].tolist()
    return frequencies, [sum(frequencies[:symbol]) for symbol in range(TABLE_SIZE)]


def _encode_high_parts(
    symbols: Sequence[Sequence[int]], num_tokens: int, coding: LevelCoding
) -> tuple[list[int], list[int]]:
    """Return the lanes' states and the words, walking the decoder's order backwards."""
    states = [STATE_LOW] * min(num_tokens, LANES)
    words: list[int] = []
    for component in reversed(range(coding.num_components)):
        frequencies, starts = _table(component, coding)
        for token in reversed(range(num_tokens)):
            high = symbols[component][token] >> int(coding.low_bits[component])
            state, frequency = states[token % LANES], frequencies[high]
            if state >> (32 - FREQUENCY_BITS) >= frequency:
                words.append(state & 0xFFFF)
                state >>= WORD_BITS
            states[token % LANES] = ((state // frequency) << FREQUENCY_BITS) + state % frequency + starts[high]
    words.reverse()
    return states, words


def _decode_high_parts(
    states: list[int], words: Sequence[int], num_tokens: int, coding: LevelCoding
) -> list[list[int]]:
    high_parts = [[0] * num_tokens for _ in range(coding.num_components)]
    num_taken = 0
    for component in range(coding.num_components):
        frequencies, starts = _table(component, coding)
        for token in range(num_tokens):
            state = states[token % LANES]
            slot = state & ((1 << FREQUENCY_BITS) - 1)
            high = max(symbol for symbol in range(TABLE_SIZE) if starts[symbol] <= slot and frequencies[symbol])
            high_parts[component][token] = high
            state = frequencies[high] * (state >> FREQUENCY_BITS) + slot - starts[high]
            if state < STATE_LOW:
                if num_taken == len(words):
                    raise BitstreamError("the words run out before the symbols", field="stream")
                state = state << WORD_BITS | words[num_taken]
                num_taken += 1
            states[token % LANES] = state
    if num_taken < len(words) or any(state != STATE_LOW for state in states):
        raise BitstreamError("the lanes do not end in the start state", field="stream")
    return high_parts


def _read_escapes(content: bytes, words_end: int, num_tokens: int, coding: LevelCoding) -> list[Escape]:
    """Read the list behind the words, which must be ascending, of components coded anew, and within bounds."""
    if len(content) == words_end:
        return []
    begin = words_end + -words_end % 4
    if len(content) <= begin or (len(content) - begin) % ESCAPE_BYTES:
        raise BitstreamError("the escapes are cut", field="stream")
    escapes, previous = [], -1
    for at in range(begin, len(content), ESCAPE_BYTES):
        place = int.from_bytes(content[at : at + 4], "little")
        value = int.from_bytes(content[at + 4 : at + 8], "little", signed=True)
        if not previous < place < num_tokens * coding.num_components:
            raise BitstreamError("an escape is out of order or out of the stream", field="stream")
        if place % coding.num_components < coding.num_refined:
            raise BitstreamError("an escape is of a component that is refined", field="stream")
        if abs(value) > MAX_COMPONENT:
            raise BitstreamError(f"an escape is beyond {MAX_COMPONENT}", field="stream")
        escapes.append(Escape(place, value))
        previous = place
    return escapes
