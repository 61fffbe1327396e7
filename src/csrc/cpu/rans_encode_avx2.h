// Encoding rows of 32 lanes with AVX2: what planes and components share.
//
// The 32 states of a row lie in four vectors: lanes 0-3 and 16-19, 4-7 and 20-23, 8-11 and 24-27, 12-15 and 28-31,
// which is what unpacking the bytes of 32 lookups to words and to doublewords gives, and packing undoes.
//
// The quotient of a state x by a frequency f is an fp32 product with a reciprocal that is a little too small: it is
// exact or one too small, which the remainder tells. Why, with u = 2^-24: x is rounded to fp32, with one addition more
// where it has 32 bits (1.5 u). One Newton step from the processor's 1 / f, wrong by at most 1.5 * 2^-12, is too small
// by at most 2.3 u, is made too small by another 8 u, and is rounded (1 u); so is the product (1 u). Rounding up comes
// to 3.5 u, which the 8 u outweigh, and all of it to less than 16 u = 2^-20. After renormalization x / f is below 2^20,
// so the product lies between x / f - 1 and x / f.

#pragma once

#include <cstdint>

#include "cpu/avx2.h"
#include "rans.h"

namespace cachegen::avx2 {

constexpr int kAbsent = 0x8000;  // stands for a frequency of 0

// A channel's table, split into low and high bytes.
struct alignas(32) EncodeTable {
    uint8_t frequency_low[32], frequency_high[32];
    uint8_t start_low[32], start_high[32];
};

CACHEGEN_AVX2_INLINE void make_table(const FrequencyTable& table, EncodeTable* made) {
    for (int half = 0; half < 2; ++half) {
        alignas(32) uint16_t frequency[16];
        const __m256i given = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.frequency + 16 * half));
        const __m256i is_absent = _mm256_cmpeq_epi16(given, _mm256_setzero_si256());
        const __m256i absent = _mm256_set1_epi16(static_cast<int16_t>(kAbsent));
        _mm256_store_si256(reinterpret_cast<__m256i*>(frequency),
                           _mm256_or_si256(given, _mm256_and_si256(is_absent, absent)));
        split_words(frequency, made->frequency_low + 16 * half, made->frequency_high + 16 * half);
        split_words(table.start + 16 * half, made->start_low + 16 * half, made->start_high + 16 * half);
    }
}

// For each mask of eight lanes, their words side by side at the end of sixteen bytes.
struct CompressTable {
    alignas(16) uint8_t shuffles[256][16] = {};
    constexpr CompressTable() {
        for (int mask = 0; mask < 256; ++mask) {
            int place = 8 - __builtin_popcount(mask);
            for (int i = 0; i < 16; ++i) shuffles[mask][i] = 0x80;
            for (int lane = 0; lane < 8; ++lane) {
                if ((mask >> lane & 1) == 0) continue;
                shuffles[mask][2 * place] = static_cast<uint8_t>(2 * lane);
                shuffles[mask][2 * place + 1] = static_cast<uint8_t>(2 * lane + 1);
                ++place;
            }
        }
    }
};
constexpr CompressTable kCompress;

// Write the words of a mask's lanes before `word`; returns where they begin. The 16 bytes before are overwritten.
CACHEGEN_AVX2_INLINE uint16_t* give_words(uint16_t* word, uint32_t mask, const __m256i states[4]) {
    const __m256i low_half = _mm256_set1_epi32(0xFFFF);
    const __m256i first =
        _mm256_packus_epi32(_mm256_and_si256(states[0], low_half), _mm256_and_si256(states[1], low_half));
    const __m256i second =
        _mm256_packus_epi32(_mm256_and_si256(states[2], low_half), _mm256_and_si256(states[3], low_half));
    const __m128i eights[4] = {_mm256_castsi256_si128(first), _mm256_castsi256_si128(second),
                               _mm256_extracti128_si256(first, 1), _mm256_extracti128_si256(second, 1)};
    // Downwards, so that each store overwrites what the one before it left below its words.
    for (int i = 3; i >= 0; --i) {
        const uint32_t lanes = mask >> (8 * i) & 255;
        const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kCompress.shuffles[lanes]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(word - 8), _mm_shuffle_epi8(eights[i], shuffle));
        word -= _mm_popcnt_u32(lanes);
    }
    return word;
}

// Encode 8 lanes: the states after the symbols, where they have given up their words.
CACHEGEN_AVX2_INLINE __m256i encode_lanes(__m256i states, __m256i frequency, __m256i start) {
    const __m256 divisor = _mm256_cvtepi32_ps(frequency);
    const __m256 rough = _mm256_rcp_ps(divisor);
    const __m256 error = _mm256_fnmadd_ps(divisor, rough, _mm256_set1_ps(1.0f - 0x1p-21f));
    const __m256 reciprocal = _mm256_fmadd_ps(rough, error, rough);
    // The conversion takes them for signed.
    const __m256 is_wrapped = _mm256_castsi256_ps(states);
    const __m256 wrapped = _mm256_blendv_ps(_mm256_setzero_ps(), _mm256_set1_ps(0x1p32f), is_wrapped);
    const __m256 dividend = _mm256_add_ps(_mm256_cvtepi32_ps(states), wrapped);
    const __m256i quotient = _mm256_cvttps_epi32(_mm256_mul_ps(dividend, reciprocal));
    const __m256i remainder = _mm256_sub_epi32(states, _mm256_mullo_epi32(quotient, frequency));
    const __m256i coded =
        _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(quotient, kFrequencyBits), remainder), start);
    // One more to the quotient is 2^12 more to the state, and one frequency less to the remainder.
    const __m256i is_exact = _mm256_cmpgt_epi32(frequency, remainder);
    const __m256i correction = _mm256_sub_epi32(_mm256_set1_epi32(kFrequencyTotal), frequency);
    return _mm256_add_epi32(coded, _mm256_andnot_si256(is_exact, correction));
}

// Encode a row, backwards. Only where kIsTail may lanes be dead. `seen` becomes the or of all frequencies; words go
// before `word`.
template <bool kIsTail>
CACHEGEN_AVX2_INLINE void encode_symbols(__m256i symbols, const EncodeTable& table, int live, __m256i lanes[4],
                                         __m256i& seen, uint16_t*& word) {
    const __m256i is_upper = _mm256_slli_epi16(symbols, 3);  // bit 4 to bit 7
    // Only the low four bits look up; bit 7 would give zero.
    const __m256i index = _mm256_and_si256(symbols, _mm256_set1_epi8(31));
    __m256i frequency_words[2], start_words[2], frequency[4], start[4], gives[4], live_lanes[4];
    look_up_words(table.frequency_low, table.frequency_high, index, is_upper, frequency_words);
    look_up_words(table.start_low, table.start_high, index, is_upper, start_words);
    if (kIsTail) {
        const __m256i bytes = bytes_of_bits(_bzhi_u32(~0u, live));
        const __m256i words[2] = {_mm256_unpacklo_epi8(bytes, bytes), _mm256_unpackhi_epi8(bytes, bytes)};
        for (int i = 0; i < 4; ++i)
            live_lanes[i] = i % 2 == 0 ? _mm256_unpacklo_epi16(words[i / 2], words[i / 2])
                                       : _mm256_unpackhi_epi16(words[i / 2], words[i / 2]);
        for (int i = 0; i < 2; ++i) seen = _mm256_or_si256(seen, _mm256_and_si256(words[i], frequency_words[i]));
    } else {
        seen = _mm256_or_si256(seen, _mm256_or_si256(frequency_words[0], frequency_words[1]));
    }
    const __m256i zero = _mm256_setzero_si256();
    for (int i = 0; i < 2; ++i) {
        frequency[2 * i] = _mm256_unpacklo_epi16(frequency_words[i], zero);
        frequency[2 * i + 1] = _mm256_unpackhi_epi16(frequency_words[i], zero);
        start[2 * i] = _mm256_unpacklo_epi16(start_words[i], zero);
        start[2 * i + 1] = _mm256_unpackhi_epi16(start_words[i], zero);
    }
    __m256i states[4];
    for (int i = 0; i < 4; ++i) {
        states[i] = lanes[i];
        const __m256i keeps = _mm256_cmpgt_epi32(frequency[i], _mm256_srli_epi32(states[i], 32 - kFrequencyBits));
        gives[i] = _mm256_andnot_si256(keeps, kIsTail ? live_lanes[i] : _mm256_set1_epi32(-1));
    }
    const __m256i gives_bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(gives[0], gives[1]), _mm256_packs_epi32(gives[2], gives[3]));
    word = give_words(word, static_cast<uint32_t>(_mm256_movemask_epi8(gives_bytes)), states);
    for (int i = 0; i < 4; ++i) {
        const __m256i shortened =
            _mm256_srlv_epi32(states[i], _mm256_and_si256(gives[i], _mm256_set1_epi32(kWordBits)));
        const __m256i coded = encode_lanes(shortened, frequency[i], start[i]);
        lanes[i] = kIsTail ? _mm256_blendv_epi8(states[i], coded, live_lanes[i]) : coded;
    }
}

// Whether one of the frequencies seen is of a symbol without one.
CACHEGEN_AVX2_INLINE bool has_absent(__m256i seen) {
    return !_mm256_testz_si256(seen, _mm256_set1_epi16(static_cast<int16_t>(kAbsent)));
}

CACHEGEN_AVX2_INLINE void store_states(const __m256i lanes[4], uint32_t states[kNumLanes]) {
    for (int i = 0; i < 4; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(states + 4 * i), _mm256_castsi256_si128(lanes[i]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(states + 16 + 4 * i), _mm256_extracti128_si256(lanes[i], 1));
    }
}

}  // namespace cachegen::avx2
