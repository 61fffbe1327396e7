// The static arithmetic coder, one code per channel: encoder and decoder of single symbols.
//
// This header knows no framework, no allocation and no exception, and g++ and nvcc both compile it. The tables are
// those of rans.h: the 16-bit cumulative frequencies that torchac and LMCache's CacheGen use are ours times 16, which
// cancels against the wider shift, so that the codes are theirs bit for bit. docs/coder.md derives the step.
//
// Surprises first:
//  - Renormalization moves all its bits at once. Leading bits that low and high share are final. After them low begins
//    with 0 and high with 1, and the straddling steps keep this so: they are one more run of bits, where low goes on
//    with ones and high with zeros.
//  - The decoder reads zeros beyond the code's end: the encoder stops as soon as two bits name the interval.
//  - The decoder knows how its code must end. This tells most damage, not all; the checksum does.
//
// Source: I. Witten, R. Neal, J. Cleary, "Arithmetic coding for data compression" (1987).

#pragma once

#include <cstdint>

#include "rans.h"

namespace cachegen {

constexpr uint32_t kCodeQuarter = 1u << 30;
constexpr uint32_t kCodeHalf = 1u << 31;
constexpr int64_t kMaxCodeTokens = 1 << 14;  // of a stream
constexpr int kCodeLengthBytes = 2;          // a code's length, little-endian

// A bound on the bytes of a code of up to kMaxCodeTokens symbols. A symbol costs 12 bits at most, and less than 2^-17
// for the rounding of its part of the interval; two bits end the code.
CACHEGEN_HOST_DEVICE constexpr int64_t max_code_bytes(int64_t num_symbols) { return (3 * num_symbols + 1) / 2 + 2; }

static_assert(max_code_bytes(kMaxCodeTokens) <= 0xFFFF, "a code's length must fit in 16 bits");

// Where the parts of a stream of codes begin, in bytes from its start: low bits, the channels' lengths, their codes.
struct CodeParts {
    int64_t lengths;
    int64_t codes;
};

CACHEGEN_HOST_DEVICE inline CodeParts lay_out_codes(const StreamShape& shape, int64_t low_bits) {
    CodeParts parts;
    parts.lengths = round_up((shape.num_tokens * shape.num_channels * low_bits + 7) / 8, 4);
    parts.codes = parts.lengths + round_up(kCodeLengthBytes * shape.num_channels, 4);
    return parts;
}

// The number of zero bits above the highest one bit of a number that is not zero.
CACHEGEN_HOST_DEVICE inline int count_leading_zeros(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __clz(static_cast<int>(bits));
#else
    return __builtin_clz(bits);
#endif
}

// The interval that the symbols narrow down to, from its first number to its last. Between symbols it has more than
// 2^30 numbers, and the rarest symbol takes a 4096th of them, so that low < high always.
struct CodeInterval {
    uint32_t low = 0;
    uint32_t high = 0xFFFFFFFFu;

    // How many numbers of the interval lie below the cumulative frequency `start` <= 4096.
    CACHEGEN_HOST_DEVICE uint64_t offset_of(uint32_t start) const {
        return ((static_cast<uint64_t>(high - low) + 1) * start) >> kFrequencyBits;
    }

    // Take a symbol's part. All of 2^32 numbers wrap to 0 of them, which is right: high is one less.
    CACHEGEN_HOST_DEVICE void narrow(uint32_t start, uint32_t frequency) {
        const uint32_t first = static_cast<uint32_t>(offset_of(start));
        const uint32_t end = static_cast<uint32_t>(offset_of(start + frequency));
        high = low + end - 1;
        low += first;
    }

    // The leading bits that all numbers of the interval share.
    CACHEGEN_HOST_DEVICE int num_shared_bits() const { return count_leading_zeros(low ^ high); }

    CACHEGEN_HOST_DEVICE void drop_shared_bits(int count) {
        low <<= count;
        high = high << count | ((1u << count) - 1);
    }

    // Where no bits are shared: how often the interval lies within the middle half.
    CACHEGEN_HOST_DEVICE int num_straddling_bits() const { return count_leading_zeros(~((low & ~high) << 1)); }

    // Double the interval around the middle, `count` times.
    CACHEGEN_HOST_DEVICE void drop_straddling_bits(int count) {
        low = (low << count) & ~kCodeHalf;
        high = high << count | kCodeHalf | ((1u << count) - 1);
    }
};

// Writes the code of one channel, never beyond its capacity.
class ArithmeticEncoder {
  public:
    CACHEGEN_HOST_DEVICE ArithmeticEncoder(uint8_t* bytes, int64_t capacity) : bytes_(bytes), capacity_(capacity) {}

    // Encode a symbol of non-zero frequency.
    CACHEGEN_HOST_DEVICE void encode(uint32_t start, uint32_t frequency) {
        interval_.narrow(start, frequency);
        const int num_shared = interval_.num_shared_bits();
        if (num_shared > 0) {
            const uint32_t bits = interval_.low >> (32 - num_shared);
            if (num_pending_ == 0) {
                put(bits, num_shared);
            } else {
                put_with_pending(bits >> (num_shared - 1));
                put(bits & ((1u << (num_shared - 1)) - 1), num_shared - 1);
            }
            interval_.drop_shared_bits(num_shared);
        }
        const int num_straddling = interval_.num_straddling_bits();
        num_pending_ += num_straddling;
        interval_.drop_straddling_bits(num_straddling);
    }

    // End the code. Returns its length in bytes, which the capacity held only if it is not larger.
    CACHEGEN_HOST_DEVICE int64_t finish() {
        // Two bits name a quarter that lies within the interval, whatever follows.
        ++num_pending_;
        put_with_pending(interval_.low < kCodeQuarter ? 0 : 1);
        for (; num_buffered_ > 0; num_buffered_ -= 8)
            store(num_buffered_ >= 8 ? buffer_ >> (num_buffered_ - 8) : buffer_ << (8 - num_buffered_));
        return num_bytes_;
    }

  private:
    // Write a bit, then its opposite for every pending one.
    CACHEGEN_HOST_DEVICE void put_with_pending(uint32_t bit) {
        put(bit, 1);
        const uint32_t opposite = bit - 1;  // 32 times
        for (; num_pending_ >= 32; num_pending_ -= 32) put(opposite, 32);
        put(opposite & ((1u << num_pending_) - 1), num_pending_);
        num_pending_ = 0;
    }

    // Write the low `count` <= 32 bits of `bits`; the others must be zero.
    CACHEGEN_HOST_DEVICE void put(uint32_t bits, int count) {
        buffer_ = buffer_ << count | bits;
        num_buffered_ += count;
        if (num_buffered_ >= 32) {
            num_buffered_ -= 32;
            for (int shift = 24; shift >= 0; shift -= 8) store(buffer_ >> (num_buffered_ + shift));
        }
    }

    CACHEGEN_HOST_DEVICE void store(uint64_t byte) {
        if (num_bytes_ < capacity_) bytes_[num_bytes_] = static_cast<uint8_t>(byte);
        ++num_bytes_;
    }

    uint8_t* bytes_;
    int64_t capacity_;
    int64_t num_bytes_ = 0;
    CodeInterval interval_;
    uint32_t num_pending_ = 0;
    uint64_t buffer_ = 0;  // the last num_buffered_ < 32 bits are still to be written
    int num_buffered_ = 0;
};

// Reads the code of one channel, never outside it.
class ArithmeticDecoder {
  public:
    ArithmeticDecoder() = default;

    CACHEGEN_HOST_DEVICE ArithmeticDecoder(const uint8_t* bytes, int64_t num_bytes)
        : next_(bytes), num_left_(num_bytes) {
        value_ = take(16) << 16;
        value_ |= take(16);
    }

    // Decode one symbol. The table is a FrequencyTable, or what has its two functions.
    template <class Table>
    CACHEGEN_HOST_DEVICE int decode(const Table& table) {
        // The last symbol whose part begins at or before the value: the absent ones' parts are empty.
        const uint32_t offset = value_ - interval_.low;
        int symbol = 0;
        for (int step = kTableSize / 2; step > 0; step /= 2)
            symbol += interval_.offset_of(table.start_of(symbol + step)) <= offset ? step : 0;
        interval_.narrow(table.start_of(symbol), table.frequency_of(symbol));
        const int num_shared = interval_.num_shared_bits();
        interval_.drop_shared_bits(num_shared);
        const int num_straddling = interval_.num_straddling_bits();
        interval_.drop_straddling_bits(num_straddling);
        // Doubling around the middle is a shift that turns the leading bit over, however often.
        const int count = num_shared + num_straddling;
        value_ = (value_ << count | take(count)) ^ (num_straddling > 0 ? kCodeHalf : 0);
        return symbol;
    }

    // Whether the code ends here as the encoder leaves it: its last two bits, then zeros up to the byte's end.
    CACHEGEN_HOST_DEVICE bool is_at_end() const {
        const int64_t num_bits_left = 8 * num_left_ + num_buffered_ + 32 - 2;  // negative counts zeros beyond the end
        return value_ == (interval_.low < kCodeQuarter ? kCodeQuarter : kCodeHalf) && num_bits_left >= 0 &&
               num_bits_left < 8;
    }

  private:
    // The next `count` <= 31 bits of the code.
    CACHEGEN_HOST_DEVICE uint32_t take(int count) {
        if (num_buffered_ < count) refill();
        const uint32_t bits = static_cast<uint32_t>((buffer_ >> 1) >> (63 - count));
        buffer_ <<= count;
        num_buffered_ -= count;
        return bits;
    }

    CACHEGEN_HOST_DEVICE void refill() {
        for (int i = 0; i < 4; ++i) {
            const uint64_t byte = num_left_ > 0 ? *next_++ : 0;
            --num_left_;
            num_buffered_ += 8;
            buffer_ |= byte << (64 - num_buffered_);
        }
    }

    const uint8_t* next_ = nullptr;
    int64_t num_left_ = 0;  // bytes; negative: zeros were read beyond the end
    CodeInterval interval_;
    uint32_t value_ = 0;
    uint64_t buffer_ = 0;  // the first num_buffered_ bits are the code's next ones
    int num_buffered_ = 0;
};

}  // namespace cachegen
