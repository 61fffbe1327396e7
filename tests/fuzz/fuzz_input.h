// What the fuzzers share: a fuzz input taken apart into a shape, a coder, tables and bytes.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/arithmetic_portable.h"
#include "cpu/rans_portable.h"
#include "frequency_tables.h"

namespace cachegen {

#define FUZZ_CHECK(condition)                                                            \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                \
        }                                                                                \
    } while (false)

// Takes bytes from the front of a fuzz input; zeros once it has run out.
class FuzzInput {
  public:
    FuzzInput(const uint8_t* data, size_t size) : data_(data), size_(size) {}

    uint32_t byte() {
        if (position_ == size_) return 0;
        return data_[position_++];
    }

    // A copy without spare bytes at its end, so that a read beyond it is seen.
    std::vector<uint8_t> rest() const { return {data_ + position_, data_ + size_}; }

  private:
    const uint8_t* data_;
    size_t size_;
    size_t position_ = 0;
};

// A stream's coding, drawn from an input. It owns its tables.
struct FuzzCoding {
    enum Kind { kRans, kPacked, kArithmetic, kNumKinds };

    Kind kind;
    StreamShape shape;
    std::vector<FrequencyTable> tables;
    PlaneCoding coding;

    explicit FuzzCoding(FuzzInput& input) {
        kind = static_cast<Kind>(input.byte() % kNumKinds);
        // Mostly small ones, which are fast; some with several rows and tiles.
        shape.num_tokens = small_or_large(input.byte(), 40, 100);
        shape.num_channels = small_or_large(input.byte(), 5, 70);
        coding.low_bits = static_cast<int>(input.byte() % (kMaxLowBits + 1));
        if (kind == kPacked) return;
        uint32_t seed = input.byte();
        tables.resize(shape.num_channels);
        for (FrequencyTable& table : tables) {
            uint32_t weights[kTableSize] = {};
            const auto next = [&seed] { return (seed = seed * 1664525u + 1013904223u) >> 16; };
            // From a single symbol to all 32, from flat to steep.
            const uint32_t num_present = 1 + next() % kTableSize, steepness = next() % 12;
            for (uint32_t i = 0; i < num_present; ++i)
                weights[next() % kTableSize] += 1 + ((next() & 4095) >> steepness);
            weights[next() % kTableSize] += 1 << (next() % 13);
            normalize(weights, &table);
        }
        coding.tables = tables.data();
        coding.num_tables = shape.num_channels;
        coding.is_arithmetic = kind == kArithmetic;
    }

    FuzzCoding(const FuzzCoding&) = delete;

  private:
    static int64_t small_or_large(uint32_t byte, uint32_t small, uint32_t large) {
        return 1 + byte % (byte < 240 ? small : large);
    }
};

}  // namespace cachegen
