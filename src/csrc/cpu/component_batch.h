// Streams of components that are decoded together: as planes' are (stream_batch.h), but each component has a table and
// low bits of its own, and streams may have more or fewer components.

#pragma once

#include <cstdint>

#include "component_streams.h"
#include "cpu/components.h"
#include "cpu/rans_portable.h"
#include "cpu/stream_batch.h"
#include "rans.h"

namespace cachegen {

constexpr int kTileComponents = 16;  // components between two transpositions; 64 bytes of int32

// A table from its first symbol with a frequency on. Most components have few symbols, which take less time to find.
struct NarrowTable {
    FrequencyTable table;  // symbol 0 is `first`; those behind the last one start at 4096
    int first = 0;
    int num_symbols = 0;

    void make(const FrequencyTable& wide) {
        const SymbolRange range = SymbolRange::of(wide);
        first = range.first;
        num_symbols = range.last - range.first + 1;
        for (int symbol = 0; symbol < kTableSize; ++symbol) {
            const bool is_present = symbol < num_symbols;
            table.start[symbol] = is_present ? wide.start[first + symbol] : static_cast<uint16_t>(kFrequencyTotal);
            table.frequency[symbol] = is_present ? wide.frequency[first + symbol] : 0;
        }
    }
};

// One stream of a batch: its parts in memory, how its components are coded, and where they go.
struct ComponentStream {
    const uint8_t* states = nullptr;
    const uint8_t* low_bits = nullptr;
    const uint8_t* words = nullptr;
    const uint8_t* words_end = nullptr;
    const ComponentCoding* coding = nullptr;
    const LowBits* low_bits_layout = nullptr;
    int32_t* components = nullptr;  // [num_tokens][stride], of the stream's first token
    int64_t stride = 0;

    int64_t num_components() const { return coding->num_components; }
};

// Streams of as many tokens, those of more components first.
struct ComponentBatch {
    int num_streams = 0;
    StreamShape shape{};  // num_channels: the most components of a stream
    const uint8_t* readable_end = nullptr;
    const NarrowTable* tables = nullptr;  // of all codings
    ComponentStream streams[kMaxBatch];
};

// How far from a symbol of a component's narrow table, low bits below it, to what it stands for: the component, or the
// third of its coarse cell, as refinement_symbol counts them from -1 on.
inline int32_t bias_of(const ComponentCoding& coding, const NarrowTable& table, int64_t component) {
    if (component < coding.num_refined) return 1 - table.first;
    const int low_bits = coding.low_bits[component];
    return zero_component_symbol(low_bits) - (table.first << low_bits);
}

}  // namespace cachegen
