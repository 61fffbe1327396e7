// What the CPU's and the CUDA coder of components share: the integers of a symbol, and where the escapes of a stream
// lie.
//
// A stream holds some tokens of one group of layers at one level. Components that the level before coded are refined
// by one of three symbols each; the others are coded anew, as a table-coded high part and raw low bits, with a list of
// escapes for what no symbol stands for. docs/format.md, "Streams of components", has the bytes:
//   states | low bits, to a multiple of 4 | words, to a multiple of 4 | escapes
//
// No allocation and no exception, and compiled by g++ and nvcc, as rans.h.

#pragma once

#include <cstdint>

#include "rans.h"

namespace cachegen {

constexpr int kLevelRatio = 3;              // the step of a level over that of the next
constexpr int32_t kMaxComponent = 1 << 24;  // magnitude of a component, in steps of the level that codes it anew
constexpr int32_t kMaxCoarse = 1 << 29;     // of one that is refined: three times as much fits 32 bits
constexpr int kEscapeBytes = 8;             // u32 place in the stream, token after token; i32 component

// The symbol of a component of zero: the middle of the middle high part.
CACHEGEN_HOST_DEVICE inline int32_t zero_component_symbol(int low_bits) {
    return (kTableSize / 2 << low_bits) + ((1 << low_bits) >> 1);
}

// A refinement says which third of the coarse cell it is, mirrored for negative ones: 0 towards zero, 2 away from it.
CACHEGEN_HOST_DEVICE inline int32_t refine(int32_t coarse, int32_t symbol) {
    return kLevelRatio * coarse + (coarse < 0 ? 1 - symbol : symbol - 1);
}

// How a component is coded: as a symbol, or as an escape beside the nearest symbol that there is.
struct ComponentSymbol {
    int32_t symbol;
    bool is_escape;
    bool is_codable;  // false: it does not refine its coarse one, or is beyond kMaxComponent
};

CACHEGEN_HOST_DEVICE inline ComponentSymbol refinement_symbol(int32_t coarse, int32_t fine) {
    const int64_t third = fine - int64_t{kLevelRatio} * coarse;
    if (coarse < -kMaxCoarse || coarse > kMaxCoarse || third < -1 || third > 1) return {1, false, false};
    return {static_cast<int32_t>(1 + (coarse < 0 ? -third : third)), false, true};
}

// The first and the last symbol of a table that have a frequency; what lies beyond them are escapes.
struct SymbolRange {
    uint8_t first;
    uint8_t last;

    // Table: what has the frequency_of a symbol, some of them not zero.
    template <class Table>
    CACHEGEN_HOST_DEVICE static SymbolRange of(const Table& table) {
        int first = 0, last = kTableSize - 1;
        while (first < last && table.frequency_of(first) == 0) ++first;
        while (last > first && table.frequency_of(last) == 0) --last;
        return {static_cast<uint8_t>(first), static_cast<uint8_t>(last)};
    }
};

CACHEGEN_HOST_DEVICE inline ComponentSymbol anew_symbol(int32_t component, const SymbolRange& range, int low_bits) {
    const int32_t zero = zero_component_symbol(low_bits);
    if (component < -kMaxComponent || component > kMaxComponent) return {zero, false, false};
    const int32_t smallest = range.first << low_bits, largest = ((range.last + 1) << low_bits) - 1;
    const int32_t wanted = component + zero;
    const int32_t symbol = wanted < smallest ? smallest : wanted > largest ? largest : wanted;
    return {symbol, symbol != wanted, true};
}

struct Escape {
    uint32_t place;  // in the stream: token * num_components + component
    int32_t component;

    // Escapes ascend, and stand for components that are coded anew.
    CACHEGEN_HOST_DEVICE bool is_valid(int64_t place_before, int64_t num_tokens, uint32_t num_components,
                                       uint32_t num_refined) const {
        return place > place_before && place < num_tokens * num_components && place % num_components >= num_refined &&
               component >= -kMaxComponent && component <= kMaxComponent;
    }
};
static_assert(sizeof(Escape) == kEscapeBytes, "an escape is what the stream holds");

// The escapes of a stream, in bytes from its start.
struct EscapeList {
    int64_t begin = 0;
    int64_t count = 0;

    // Find them behind the words, making every check of the stream's length.
    CACHEGEN_HOST_DEVICE Status find(int64_t words_end, int64_t num_bytes) {
        if (words_end > num_bytes) return Status::kTruncated;
        if (words_end == num_bytes) return Status::kOk;
        begin = round_up(words_end, 4);
        if (num_bytes <= begin || (num_bytes - begin) % kEscapeBytes != 0) return Status::kCorrupt;
        count = (num_bytes - begin) / kEscapeBytes;
        return Status::kOk;
    }
};

// The length of a stream with so many escapes.
CACHEGEN_HOST_DEVICE inline int64_t bytes_with_escapes(int64_t words_end, int64_t num_escapes) {
    return num_escapes == 0 ? words_end : round_up(words_end, 4) + kEscapeBytes * num_escapes;
}

}  // namespace cachegen
