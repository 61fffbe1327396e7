// Where the parts of a stream lie, and reading and writing its low bits. Bytes of a stream (docs/format.md, "Streams"):
//   states | low bits, to a multiple of 4 | words
// A plane without tables (coder `packed`) has neither states nor words: its symbols are all low bits.

#pragma once

#include <cstdint>

#include "rans.h"

namespace cachegen {

// Where the parts of a stream begin, in bytes from its start; `words` is also the length of all that precedes them.
struct StreamParts {
    int64_t low_bits;
    int64_t words;
};

CACHEGEN_HOST_DEVICE inline StreamParts lay_out_parts(const StreamShape& shape, bool has_tables, int64_t num_low_bits) {
    StreamParts parts;
    parts.low_bits = has_tables ? shape.states_bytes() : 0;
    parts.words = parts.low_bits + round_up((num_low_bits + 7) / 8, 4);
    return parts;
}

// Read `count` <= 32 bits from bit `position`, least significant bit first, touching only the bytes they lie in.
CACHEGEN_HOST_DEVICE inline uint32_t read_bits(const uint8_t* bytes, int64_t position, int count) {
    const uint8_t* first = bytes + (position >> 3);
    const int shift = static_cast<int>(position & 7);
    uint64_t window = 0;
    for (int i = 0; i < (shift + count + 7) >> 3; ++i) window |= static_cast<uint64_t>(first[i]) << (8 * i);
    return static_cast<uint32_t>((window >> shift) & ((uint64_t{1} << count) - 1));
}

// Set `count` <= 32 bits at bit `position` of zeroed bytes.
CACHEGEN_HOST_DEVICE inline void write_bits(uint8_t* bytes, int64_t position, int count, uint32_t bits) {
    uint8_t* first = bytes + (position >> 3);
    const int shift = static_cast<int>(position & 7);
    uint64_t window = static_cast<uint64_t>(bits) << shift;
    for (int i = 0; i < (shift + count + 7) >> 3; ++i, window >>= 8) first[i] |= static_cast<uint8_t>(window);
}

}  // namespace cachegen
