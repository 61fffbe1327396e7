// The compact form of the frequency tables of a plane, read and written.
//
// The twin of src/cachegen/symbol_model.py, which says how the form is made; docs/format.md, "Frequency tables".

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

// Writes bits, most significant bit of each byte first, into memory that reaches 8 bytes beyond the last.
class BitWriter {
  public:
    explicit BitWriter(uint8_t* bytes) : next_(bytes) {}

    // Write the low `count` bits of `bits`, 1 to 48; the others must be zero.
    void write(uint64_t bits, int count) {
        buffer_ = buffer_ << count | bits;
        num_buffered_ += count;
        const uint64_t leading = buffer_ << (64 - num_buffered_);
        for (int i = 0; i < 8; ++i) next_[i] = static_cast<uint8_t>(leading >> (56 - 8 * i));
        next_ += num_buffered_ / 8;
        num_buffered_ %= 8;
    }

    // Fill the last byte; returns where the next one would be.
    uint8_t* finish() {
        if (num_buffered_ > 0) write(0, 8 - num_buffered_);
        return next_;
    }

  private:
    uint8_t* next_;
    uint64_t buffer_ = 0;  // its last num_buffered_ < 8 bits are in the byte at next_, which is not full
    int num_buffered_ = 0;
};

// No table in its compact form is longer: its ends, and the code of the largest difference for each symbol.
constexpr int kMaxTableBits =
    2 * kSymbolIndexBits + kTableSize * (2 * kNumWeightClasses / (1 << kRiceBits) + 1 + kRiceBits);

// The class whose weight is nearest, in ratio, to a symbol's share of 4096; at least 1 for one that occurs.
inline int weight_class_of(uint32_t count, uint32_t total) {
    // boundaries[i] lies between classes i and i + 1: the geometric mean of their weights. Nothing lies above the last.
    static const auto boundaries = [] {
        std::array<double, kNumWeightClasses> means{};
        for (int i = 0; i + 1 < kNumWeightClasses; ++i)
            means[i] = std::sqrt(static_cast<double>(kWeights[i]) * kWeights[i + 1]);
        means[kNumWeightClasses - 1] = kWeights[kNumWeightClasses - 1];
        return means;
    }();
    if (count == 0) return 0;
    const double target = static_cast<double>(count) * kFrequencyTotal / total;
    // The class of the largest weight that is not above the target: its three leading bits, and no search, whose
    // branches no processor can predict.
    int lower = std::max(1, static_cast<int>(target));
    if (lower >= 4) {
        uint64_t bits;
        std::memcpy(&bits, &target, sizeof bits);
        lower = 4 * static_cast<int>((bits >> 52) - 1024) + static_cast<int>(bits >> 50 & 3);
    }
    return lower + (target > boundaries[lower]);
}

// Append the compact form of a plane's tables, made from symbol counts [num_channels][32]. Returns false where a
// channel has no symbol, or more than fit in 32 bits.
inline bool write_tables(const uint32_t* counts, int64_t num_channels, std::vector<uint8_t>* bytes) {
    const size_t begin = bytes->size();
    bytes->resize(begin + (num_channels * kMaxTableBits + 7) / 8 + 8);
    BitWriter writer(bytes->data() + begin);
    for (int64_t channel = 0; channel < num_channels; ++channel, counts += kTableSize) {
        uint64_t total = 0;
        int first = kTableSize, last = 0;
        for (int symbol = 0; symbol < kTableSize; ++symbol) {
            total += counts[symbol];
            if (counts[symbol] == 0) continue;
            first = std::min(first, symbol);
            last = symbol;
        }
        if (total == 0 || total > 0xFFFFFFFFu) return false;
        writer.write(static_cast<uint64_t>(first << kSymbolIndexBits | last), 2 * kSymbolIndexBits);
        int previous = 0;
        for (int symbol = first; symbol <= last; ++symbol) {
            const int weight_class = weight_class_of(counts[symbol], static_cast<uint32_t>(total));
            const int difference = weight_class - previous;
            previous = weight_class;
            const int zigzag = difference > 0 ? 2 * difference : difference < 0 ? -2 * difference - 1 : 0;
            const int quotient = zigzag >> kRiceBits;
            const uint64_t ones = (uint64_t{1} << quotient) - 1;
            writer.write(ones << (kRiceBits + 1) | static_cast<uint64_t>(zigzag & ((1 << kRiceBits) - 1)),
                         quotient + 1 + kRiceBits);
        }
    }
    bytes->resize(writer.finish() - bytes->data());
    return true;
}

}  // namespace cachegen
