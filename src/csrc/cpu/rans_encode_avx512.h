// Encoding rows of 32 lanes with AVX-512: what planes and components share.
//
// The quotient of a state by a frequency is an fp32 product with a reciprocal that is a little too small: it is exact
// or one too small, which the remainder tells.
//
// Why: after renormalization the quotient x/f is below 2^20. Rounding x to fp32, the reciprocal's own error and
// rounding the product come to less than 2^-22 of it together; the reciprocal is lowered by 2^-21. So the product lies
// between x/f (1 - 2^-20) > x/f - 1 and x/f, and its integer part is that of x/f or one less.

#pragma once

#include <cstdint>

#include "cpu/avx512.h"
#include "rans.h"

namespace cachegen::avx512 {

// A channel's table as the encoder wants it: 32 entries each.
struct alignas(64) EncodeTable {
    uint32_t start_frequency[kTableSize];  // start << 16 | frequency; kAbsent where the frequency is 0
    float reciprocal[kTableSize];
};

constexpr uint32_t kAbsent = 0x8000;

CACHEGEN_AVX512_INLINE void make_table(const FrequencyTable& table, EncodeTable* made) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const auto* starts = reinterpret_cast<const __m256i*>(table.start + 16 * half);
        const auto* frequencies = reinterpret_cast<const __m256i*>(table.frequency + 16 * half);
        const __m512i start = _mm512_cvtepu16_epi32(_mm256_load_si256(starts));
        __m512i frequency = _mm512_cvtepu16_epi32(_mm256_load_si256(frequencies));
        frequency =
            _mm512_mask_mov_epi32(frequency, _mm512_testn_epi32_mask(frequency, frequency), _mm512_set1_epi32(kAbsent));
        _mm512_store_si512(made->start_frequency + 16 * half, _mm512_or_si512(_mm512_slli_epi32(start, 16), frequency));
        // One Newton step from 14 bits.
        const __m512 exact = _mm512_cvtepi32_ps(frequency);
        const __m512 rough = _mm512_rcp14_ps(exact);
        const __m512 error = _mm512_fnmadd_ps(exact, rough, _mm512_set1_ps(1.0f));
        const __m512 reciprocal = _mm512_fmadd_ps(rough, error, rough);
        _mm512_store_ps(made->reciprocal + 16 * half, _mm512_mul_ps(reciprocal, _mm512_set1_ps(1.0f - 0x1p-21f)));
    }
}

// Encode 16 lanes: the states after the symbols, where they have given up their words.
CACHEGEN_AVX512_INLINE __m512i encode_lanes(__m512i states, __m512i frequency, __m512i start, __m512 reciprocal) {
    const __m512i quotient = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_cvtepu32_ps(states), reciprocal));
    const __m512i remainder = _mm512_sub_epi32(states, _mm512_mullo_epi32(quotient, frequency));
    const __mmask16 is_short = _mm512_cmpge_epu32_mask(remainder, frequency);
    const __m512i coded =
        _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(quotient, kFrequencyBits), remainder), start);
    // One more to the quotient is 2^12 more to the state, and one frequency less to the remainder.
    return _mm512_mask_add_epi32(coded, is_short, coded,
                                 _mm512_sub_epi32(_mm512_set1_epi32(kFrequencyTotal), frequency));
}

// The low halves of 32 states.
CACHEGEN_AVX512_INLINE __m512i low_halves(__m512i first, __m512i second) {
    alignas(64) static constexpr uint16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                       32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    return _mm512_permutex2var_epi16(first, _mm512_load_si512(kEven), second);
}

// Encode a row, backwards. Only where kIsTail may lanes be dead. `seen` becomes the or of all table entries; words go
// before next_word.
template <bool kIsTail>
CACHEGEN_AVX512_INLINE void encode_symbols(__m512i first_symbols, __m512i second_symbols, const EncodeTable& table,
                                           __mmask32 live, __m512i& first_states, __m512i& second_states, __m512i& seen,
                                           uint16_t*& next_word) {
    const __m512i low_entries = _mm512_load_si512(table.start_frequency);
    const __m512i high_entries = _mm512_load_si512(table.start_frequency + 16);
    __m512i first_entry = _mm512_permutex2var_epi32(low_entries, first_symbols, high_entries);
    __m512i second_entry = _mm512_permutex2var_epi32(low_entries, second_symbols, high_entries);
    const __m512 low_reciprocals = _mm512_load_ps(table.reciprocal);
    const __m512 high_reciprocals = _mm512_load_ps(table.reciprocal + 16);
    const __m512 first_reciprocal = _mm512_permutex2var_ps(low_reciprocals, first_symbols, high_reciprocals);
    const __m512 second_reciprocal = _mm512_permutex2var_ps(low_reciprocals, second_symbols, high_reciprocals);
    if (kIsTail) {
        // Dead lanes: no symbol seen, no word.
        seen = _mm512_or_si512(seen, _mm512_maskz_mov_epi32(static_cast<__mmask16>(live), first_entry));
        seen = _mm512_or_si512(seen, _mm512_maskz_mov_epi32(static_cast<__mmask16>(live >> 16), second_entry));
    } else {
        seen = _mm512_ternarylogic_epi32(seen, first_entry, second_entry, 0xFE);  // or of three
    }
    const __m512i low_half = _mm512_set1_epi32(0xFFFF);
    const __m512i first_frequency = _mm512_and_si512(first_entry, low_half);
    const __m512i second_frequency = _mm512_and_si512(second_entry, low_half);

    __m512i first = first_states, second = second_states;
    __mmask16 first_gives = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(first, 32 - kFrequencyBits), first_frequency);
    __mmask16 second_gives = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(second, 32 - kFrequencyBits), second_frequency);
    if (kIsTail) {
        first_gives &= static_cast<__mmask16>(live);
        second_gives &= static_cast<__mmask16>(live >> 16);
    }
    const __mmask32 gives = _mm512_kunpackw(second_gives, first_gives);
    const int num_words = _mm_popcnt_u32(gives);
    const __m512i words = _mm512_maskz_compress_epi16(gives, low_halves(first, second));
    uint16_t* const word = next_word - num_words;
    next_word = word;
    _mm512_mask_storeu_epi16(word, _bzhi_u32(~0u, num_words), words);
    first = _mm512_mask_srli_epi32(first, first_gives, first, kWordBits);
    second = _mm512_mask_srli_epi32(second, second_gives, second, kWordBits);
    first = encode_lanes(first, first_frequency, _mm512_srli_epi32(first_entry, 16), first_reciprocal);
    second = encode_lanes(second, second_frequency, _mm512_srli_epi32(second_entry, 16), second_reciprocal);
    first_states = kIsTail ? _mm512_mask_mov_epi32(first_states, static_cast<__mmask16>(live), first) : first;
    second_states = kIsTail ? _mm512_mask_mov_epi32(second_states, static_cast<__mmask16>(live >> 16), second) : second;
}

// Whether one of the entries seen is of a symbol without frequency.
CACHEGEN_AVX512_INLINE bool has_absent(__m512i seen) {
    return _mm512_test_epi32_mask(seen, _mm512_set1_epi32(kAbsent)) != 0;
}

CACHEGEN_AVX512_INLINE void store_states(__m512i first, __m512i second, uint32_t states[kNumLanes]) {
    _mm512_storeu_si512(states, first);
    _mm512_storeu_si512(states + 16, second);
}

}  // namespace cachegen::avx512
