// Reading the frequency tables of a plane from their compact form.
//
// The twin of src/cachegen/symbol_model.py, which says how the form is made; docs/format.md, "Frequency tables".

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "rans.h"

namespace cachegen {

// The weights a table may use: 0 and the integers up to 4096 with at most three significant bits.
constexpr int kNumWeightClasses = 45;

constexpr std::array<uint16_t, kNumWeightClasses> make_weights() {
    std::array<uint16_t, kNumWeightClasses> weights{};
    int count = 0;
    for (int weight = 0; weight <= 4096; ++weight) {
        int significant = weight;
        while (significant >= 8 && significant % 2 == 0) significant /= 2;
        if (significant < 8) weights[count++] = static_cast<uint16_t>(weight);
    }
    return weights;
}

inline constexpr auto kWeights = make_weights();
static_assert(kWeights[kNumWeightClasses - 1] == 4096, "the last class is the largest weight");

constexpr int kSymbolIndexBits = 5;  // of a table's first and last symbol
constexpr int kRiceBits = 2;         // remainder bits of the Rice code of class differences
constexpr int kMinTableBits = 2 * kSymbolIndexBits + 1 + kRiceBits;  // of a table in its compact form

// A bounded reader, most significant bit of each byte first.
class BitReader {
  public:
    BitReader(const uint8_t* bytes, int64_t num_bytes) : bytes_(bytes), num_bytes_(num_bytes) {}

    // Read `count` <= 32 bits.
    bool read(int count, uint32_t* value) {
        if (count > 8 * num_bytes_ - position_) return false;
        *value = static_cast<uint32_t>((peek() >> 1) >> (63 - count));
        position_ += count;
        return true;
    }

    // A Rice code: the quotient in unary (ones, then a zero), then the remainder.
    bool read_rice(uint32_t* value) {
        const uint64_t zeros = ~peek();  // the code's zero is among them, or the quotient is too large
        const int quotient = zeros == 0 ? 64 : __builtin_clzll(zeros);
        uint32_t remainder = 0;
        if (quotient > kNumWeightClasses || quotient + 1 > 8 * num_bytes_ - position_) return false;
        position_ += quotient + 1;
        if (!read(kRiceBits, &remainder)) return false;
        *value = static_cast<uint32_t>(quotient) << kRiceBits | remainder;
        return true;
    }

    // Whether only zero bits, fewer than a byte of them, are left.
    bool at_end() {
        const int64_t rest = 8 * num_bytes_ - position_;
        uint32_t bits = 0;
        return rest < 8 && read(static_cast<int>(rest), &bits) && bits == 0;
    }

  private:
    // At least the next 57 bits, the first one leading; zeros beyond the end.
    uint64_t peek() const {
        const int64_t first = position_ >> 3;
        uint64_t bits = 0;
        if (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && first + 8 <= num_bytes_) {
            std::memcpy(&bits, bytes_ + first, 8);
            bits = __builtin_bswap64(bits);
        } else {
            for (int i = 0; i < 8; ++i) bits = bits << 8 | (first + i < num_bytes_ ? bytes_[first + i] : 0);
        }
        return bits << (position_ & 7);
    }

    const uint8_t* bytes_;
    int64_t num_bytes_;
    int64_t position_ = 0;  // in bits
};

// Scale weights to frequencies that sum to 4096: floors, but at least 1; the first of the largest weights takes what
// is left over. `weights` must have a non-zero sum. The result is always possible: 32 symbols rounded up to 1 take
// less than the largest has.
inline void normalize(const uint32_t weights[kTableSize], FrequencyTable* table) {
    uint32_t total = 0;
    int largest = 0;
    for (int symbol = 0; symbol < kTableSize; ++symbol) {
        total += weights[symbol];
        if (weights[symbol] > weights[largest]) largest = symbol;
    }
    uint32_t frequencies[kTableSize], sum = 0;
    for (int symbol = 0; symbol < kTableSize; ++symbol) {
        // In fp64, which vectorizes: a quotient below an integer is so by more than rounding can bridge.
        const auto quotient = static_cast<int32_t>(
            static_cast<double>(static_cast<int32_t>(weights[symbol] * kFrequencyTotal)) / static_cast<int32_t>(total));
        frequencies[symbol] = weights[symbol] == 0 ? 0 : std::max(1u, static_cast<uint32_t>(quotient));
        sum += frequencies[symbol];
    }
    frequencies[largest] += kFrequencyTotal - sum;  // unsigned wrap-around makes this right for both signs
    uint32_t start = 0;
    for (int symbol = 0; symbol < kTableSize; ++symbol) {
        table->start[symbol] = static_cast<uint16_t>(start);
        table->frequency[symbol] = static_cast<uint16_t>(frequencies[symbol]);
        start += frequencies[symbol];
    }
}

// Read the tables of a plane's channels. Returns false where the bytes are not what the format says.
inline bool read_tables(const uint8_t* bytes, int64_t num_bytes, int64_t num_channels, int alphabet_size,
                        FrequencyTable* tables) {
    BitReader reader(bytes, num_bytes);
    for (int64_t channel = 0; channel < num_channels; ++channel) {
        uint32_t first, last;
        if (!reader.read(kSymbolIndexBits, &first) || !reader.read(kSymbolIndexBits, &last)) return false;
        if (first > last || last >= static_cast<uint32_t>(alphabet_size)) return false;
        uint32_t weights[kTableSize] = {};
        int weight_class = 0;
        for (uint32_t symbol = first; symbol <= last; ++symbol) {
            uint32_t code;
            if (!reader.read_rice(&code)) return false;
            // Zigzag: 0, -1, 1, -2, 2, ...
            weight_class += code & 1 ? -static_cast<int>((code + 1) / 2) : static_cast<int>(code / 2);
            if (weight_class < 0 || weight_class >= kNumWeightClasses) return false;
            weights[symbol] = kWeights[weight_class];
        }
        if (weights[first] == 0 || weights[last] == 0) return false;
        normalize(weights, &tables[channel]);
    }
    return reader.at_end();
}

}  // namespace cachegen
