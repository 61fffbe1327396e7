// The rANS coder: constants, the step of one symbol, and the arithmetic of a stream's layout.
//
// This header knows no framework, no allocation and no exception, and is written so that g++ and nvcc both compile it:
// the CPU and CUDA callers share every line here. docs/format.md describes the bytes, docs/coder.md derives the step.
//
// Surprises first:
//  - The encoder runs backwards: last channel, last row, last lane first; words are written downwards in memory, so
//    that the decoder reads them upwards.
//  - A frequency of 4096 (the only symbol of its table) leaves the state as it is: such a symbol costs no bits.
//  - All lanes of a row share one table, and lanes take their words in lane order.
//
// Source: J. Duda, "Asymmetric numeral systems" (2013); F. Giesen, "Interleaved entropy coders" (2014).

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CACHEGEN_HOST_DEVICE __host__ __device__
#else
#define CACHEGEN_HOST_DEVICE
#endif

namespace cachegen {

constexpr int kNumLanes = 32;       // tokens that share a row; one CUDA warp
constexpr int kFrequencyBits = 12;  // frequencies of a table sum to 2^12
constexpr uint32_t kFrequencyTotal = 1u << kFrequencyBits;
constexpr int kWordBits = 16;                    // renormalization moves one 16-bit word
constexpr uint32_t kStateLow = 1u << kWordBits;  // states live in [2^16, 2^32)
constexpr int kTableSize = 32;                   // symbols of a table; larger alphabets split off low bits
constexpr int kMaxLowBits = 8;
constexpr int kStreamAlignment = 16;  // bytes; every stream starts at a multiple of it

// What became of one stream. Device code writes one per stream, the host raises with the stream's index.
enum class Status : int32_t {
    kOk = 0,
    kTruncated = 1,    // the words ran out before the symbols
    kCorrupt = 2,      // words left over, or a lane did not end in the start state
    kNoFrequency = 3,  // the encoder met a symbol that its table gives no frequency
    kNotFinite = 4,    // the cache holds NaN or infinity
    kBadLowBits = 5,   // more low bits than a symbol may have
};

// Cumulative and plain frequencies of the 32 symbols. Absent symbols have frequency 0 and the start of the next one,
// so that "the last symbol whose start is <= slot" is always the right one.
struct alignas(64) FrequencyTable {
    uint16_t start[kTableSize];
    uint16_t frequency[kTableSize];

    CACHEGEN_HOST_DEVICE uint32_t start_of(int symbol) const { return start[symbol]; }
    CACHEGEN_HOST_DEVICE uint32_t frequency_of(int symbol) const { return frequency[symbol]; }
};

// One symbol of a table in 32 bits, as the CUDA kernels keep tables: entries order like their starts.
struct TableEntry {
    uint32_t start;
    uint32_t frequency;

    CACHEGEN_HOST_DEVICE static TableEntry unpack(uint32_t packed) { return {packed >> 16, packed & 0xFFFFu}; }
    // The packed entry of a symbol is at most this where, and only where, its start is at most the state's slot.
    CACHEGEN_HOST_DEVICE static uint32_t largest_at(uint32_t state) {
        return (state * 0x10000u + 0xFFFFu) & ((kFrequencyTotal << 16) - 1);  // as a sum it is a fused multiply-add
    }
};

// What a kernel may want to know of a table before it uses it; bits of a byte.
enum TableTraits : uint8_t {
    kSingleSymbol = 1,  // one frequency is 4096
    kWideTable = 2,     // a symbol above 15 has a frequency
};

CACHEGEN_HOST_DEVICE inline uint8_t traits_of(const FrequencyTable& table) {
    uint8_t traits = table.start[kTableSize / 2] < kFrequencyTotal ? kWideTable : 0;
    for (int symbol = 0; symbol < kTableSize; ++symbol)
        if (table.frequency[symbol] == kFrequencyTotal) traits |= kSingleSymbol;
    return traits;
}

CACHEGEN_HOST_DEVICE inline uint32_t slot_of(uint32_t state) { return state & (kFrequencyTotal - 1); }

// The state after decoding a symbol, before renormalization.
CACHEGEN_HOST_DEVICE inline uint32_t decode_step(uint32_t state, uint32_t start, uint32_t frequency) {
    return frequency * (state >> kFrequencyBits) + slot_of(state) - start;
}

CACHEGEN_HOST_DEVICE inline bool decode_needs_word(uint32_t state) { return state < kStateLow; }

// The state after taking one word, where decode_needs_word.
CACHEGEN_HOST_DEVICE inline uint32_t decode_take_word(uint32_t state, uint32_t word) {
    return (state << kWordBits) | word;
}

// Whether the encoder must give up the state's low word before it can encode a symbol of this frequency.
CACHEGEN_HOST_DEVICE inline bool encode_gives_word(uint32_t state, uint32_t frequency) {
    return (state >> (32 - kFrequencyBits)) >= frequency;
}

// The state after encoding a symbol of non-zero frequency, where not encode_gives_word.
CACHEGEN_HOST_DEVICE inline uint32_t encode_step(uint32_t state, uint32_t start, uint32_t frequency) {
    return ((state / frequency) << kFrequencyBits) + state % frequency + start;
}

// A stream: some tokens of one plane, all channels. Rows are runs of 32 tokens, the last one may be shorter.
struct StreamShape {
    int64_t num_tokens;
    int64_t num_channels;

    CACHEGEN_HOST_DEVICE int64_t num_rows() const { return (num_tokens + kNumLanes - 1) / kNumLanes; }
    CACHEGEN_HOST_DEVICE int num_lanes() const {
        return static_cast<int>(num_tokens < kNumLanes ? num_tokens : kNumLanes);
    }
    CACHEGEN_HOST_DEVICE int live_lanes(int64_t row) const {
        const int64_t rest = num_tokens - row * kNumLanes;
        return static_cast<int>(rest < kNumLanes ? rest : kNumLanes);
    }
    CACHEGEN_HOST_DEVICE int64_t states_bytes() const { return 4 * num_lanes(); }
};

CACHEGEN_HOST_DEVICE inline int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

}  // namespace cachegen
