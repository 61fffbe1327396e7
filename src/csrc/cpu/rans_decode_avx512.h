// Decoding rows of 32 lanes with AVX-512, several streams side by side: what planes and components share.
//
// The 32-bit states of a row lie in two vectors of 16-bit halves, so that 32 lanes fill one register each:
//     x' = f * (x >> 12) + slot - start
//        = (16 f * high) + (f * (low >> 12) + slot - start),    where the second part is below 2^16.
// 16 f does not fit 16 bits where f = 4096, the only symbol of its table: such lanes keep their high half.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/avx512.h"
#include "rans.h"
#include "stream_layout.h"

namespace cachegen::avx512 {

CACHEGEN_AVX512_INLINE __m512i low_words(__m512i first, __m512i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)), _mm512_cvtepi32_epi16(second), 1);
}

CACHEGEN_AVX512_INLINE void load_states(const uint8_t* bytes, int num_lanes, __m512i* low, __m512i* high) {
    const __m512i start = _mm512_set1_epi32(kStateLow);
    const __mmask32 live = first_lanes(num_lanes);
    const __m512i first = _mm512_mask_loadu_epi32(start, static_cast<__mmask16>(live), bytes);
    const __m512i second = _mm512_mask_loadu_epi32(start, static_cast<__mmask16>(live >> 16), bytes + 64);
    *low = low_words(first, second);
    *high = low_words(_mm512_srli_epi32(first, 16), _mm512_srli_epi32(second, 16));
}

// Whether every lane is in the state that the encoder began in.
CACHEGEN_AVX512_INLINE bool are_at_start(__m512i low, __m512i high) {
    return _mm512_test_epi16_mask(low, low) == 0 && _mm512_cmpeq_epi16_mask(high, _mm512_set1_epi16(1)) == ~0u;
}

// One step of a binary search in several streams: add kStep to the symbols whose successor by kStep starts at or below
// the slot. Loads that begin within `start` may end within `frequency`, but no lane looks there.
template <int kCount, int kStep>
CACHEGEN_AVX512_INLINE void search_step(const FrequencyTable* const tables[kCount], const __m512i slots[kCount],
                                        __m512i symbols[kCount]) {
    __m512i starts[kCount];
    __mmask32 is_above[kCount];
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s)
        starts[s] = _mm512_permutexvar_epi16(symbols[s], _mm512_loadu_si512(tables[s]->start + kStep));
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) is_above[s] = _mm512_cmpge_epu16_mask(slots[s], starts[s]);
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s)
        symbols[s] = _mm512_mask_add_epi16(symbols[s], is_above[s], symbols[s], _mm512_set1_epi16(kStep));
}

// The last symbol whose start is at most the slot, by halves. Only the first kSymbols symbols of the tables occur.
template <int kCount, int kSymbols>
struct BinarySearch {
    const FrequencyTable* const* tables;

    CACHEGEN_AVX512_INLINE void operator()(const __m512i slots[kCount], __m512i symbols[kCount]) const {
        const __m512i first = _mm512_set1_epi16(kSymbols / 2);
#pragma GCC unroll 8
        for (int s = 0; s < kCount; ++s) {
            const __m512i starts = _mm512_permutexvar_epi16(first, _mm512_load_si512(tables[s]->start));
            symbols[s] = _mm512_maskz_mov_epi16(_mm512_cmpge_epu16_mask(slots[s], starts), first);
        }
        if (kSymbols > 16) search_step<kCount, 8>(tables, slots, symbols);
        if (kSymbols > 8) search_step<kCount, 4>(tables, slots, symbols);
        search_step<kCount, 2>(tables, slots, symbols);
        search_step<kCount, 1>(tables, slots, symbols);
    }
};

// The same for tables of at most kBounds + 1 symbols from 0 on: a symbol is the number of starts, but for the first
// one, at or below the slot. No comparison waits for another.
template <int kCount, int kBounds>
struct LinearSearch {
    __m512i starts[kCount][kBounds];

    CACHEGEN_AVX512_INLINE explicit LinearSearch(const FrequencyTable* const tables[kCount]) {
#pragma GCC unroll 8
        for (int s = 0; s < kCount; ++s)
#pragma GCC unroll 8
            for (int i = 0; i < kBounds; ++i)
                starts[s][i] = _mm512_set1_epi16(static_cast<int16_t>(tables[s]->start[i + 1]));
    }

    CACHEGEN_AVX512_INLINE void operator()(const __m512i slots[kCount], __m512i symbols[kCount]) const {
        const __m512i one = _mm512_set1_epi16(1);
#pragma GCC unroll 8
        for (int s = 0; s < kCount; ++s)
            symbols[s] = _mm512_maskz_mov_epi16(_mm512_cmpge_epu16_mask(slots[s], starts[s][0]), one);
#pragma GCC unroll 8
        for (int i = 1; i < kBounds; ++i)
#pragma GCC unroll 8
            for (int s = 0; s < kCount; ++s)
                symbols[s] =
                    _mm512_mask_add_epi16(symbols[s], _mm512_cmpge_epu16_mask(slots[s], starts[s][i]), symbols[s], one);
    }
};

// One row of several streams, with 64 readable bytes at every `word`. Only where kIsGeneral may lanes be dead or tables
// have a single symbol.
template <int kCount, bool kIsGeneral, class Search>
CACHEGEN_AVX512_INLINE void decode_rows(const Search& search, const FrequencyTable* const tables[kCount],
                                        __mmask32 live, __m512i low[kCount], __m512i high[kCount],
                                        const uint8_t* word[kCount], __m512i symbols[kCount]) {
    const __m512i slot_mask = _mm512_set1_epi16(kFrequencyTotal - 1);
    // Step by step through all streams: processors look only so far ahead for something to do.
    __m512i slots[kCount], frequency[kCount], rest[kCount], next_low[kCount], next_high[kCount];
    __mmask32 carries[kCount], needs_word[kCount];
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) slots[s] = _mm512_and_si512(low[s], slot_mask);
    search(slots, symbols);
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) {
        frequency[s] = _mm512_permutexvar_epi16(symbols[s], _mm512_load_si512(tables[s]->frequency));
        rest[s] = _mm512_sub_epi16(slots[s], _mm512_permutexvar_epi16(symbols[s], _mm512_load_si512(tables[s]->start)));
    }
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) {
        const __m512i scaled = _mm512_slli_epi16(frequency[s], 4);
        rest[s] = _mm512_add_epi16(rest[s], _mm512_mullo_epi16(frequency[s], _mm512_srli_epi16(low[s], 12)));
        next_low[s] = _mm512_mullo_epi16(scaled, high[s]);
        next_high[s] = _mm512_mulhi_epu16(scaled, high[s]);
    }
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) {
        next_low[s] = _mm512_add_epi16(next_low[s], rest[s]);
        carries[s] = _mm512_cmplt_epu16_mask(next_low[s], rest[s]);
    }
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) {
        next_high[s] = _mm512_mask_sub_epi16(next_high[s], carries[s], next_high[s], _mm512_set1_epi16(-1));
        if (kIsGeneral) {
            const __mmask32 is_single = _mm512_cmpeq_epi16_mask(frequency[s], _mm512_set1_epi16(kFrequencyTotal));
            next_high[s] = _mm512_mask_mov_epi16(next_high[s], is_single, high[s]);
        }
        needs_word[s] = _mm512_testn_epi16_mask(next_high[s], next_high[s]);
    }
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) {
        if (kIsGeneral) {
            needs_word[s] &= live;
            next_high[s] = _mm512_mask_mov_epi16(high[s], live, next_high[s]);
            high[s] = _mm512_mask_mov_epi16(next_high[s], needs_word[s], next_low[s]);
            next_low[s] = _mm512_mask_mov_epi16(low[s], live, next_low[s]);
        } else {
            high[s] = _mm512_mask_mov_epi16(next_high[s], needs_word[s], next_low[s]);
        }
        low[s] = _mm512_mask_expand_epi16(next_low[s], needs_word[s], _mm512_loadu_si512(word[s]));
        word[s] += 2 * _mm_popcnt_u32(needs_word[s]);
        // Keeps GCC from packing the pointers of all streams into one vector register.
        asm("" : "+r"(word[s]));
    }
}

// Append the raw bits of a full row: each bit plane is one 32-bit word.
CACHEGEN_AVX512_INLINE __m512i append_full_low_bits(__m512i symbols, const uint8_t* planes, int low_bits) {
    symbols = _mm512_sll_epi16(symbols, _mm_cvtsi32_si128(low_bits));
    for (int bit = 0; bit < low_bits; ++bit) {
        uint32_t plane;
        std::memcpy(&plane, planes + 4 * bit, 4);
        symbols = _mm512_mask_add_epi16(symbols, plane, symbols, _mm512_set1_epi16(static_cast<int16_t>(1 << bit)));
    }
    return symbols;
}

CACHEGEN_AVX512_INLINE __m512i append_tail_low_bits(__m512i symbols, const uint8_t* bytes, int64_t position,
                                                    int low_bits, int live) {
    symbols = _mm512_sll_epi16(symbols, _mm_cvtsi32_si128(low_bits));
    for (int bit = 0; bit < low_bits; ++bit, position += live)
        symbols = _mm512_mask_add_epi16(symbols, read_bits(bytes, position, live), symbols,
                                        _mm512_set1_epi16(static_cast<int16_t>(1 << bit)));
    return symbols;
}

}  // namespace cachegen::avx512
