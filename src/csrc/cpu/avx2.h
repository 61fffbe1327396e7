// What the AVX2 kernels share: the target attribute, lookups, transpositions. As in avx512.h, each function carries its
// target itself.

#pragma once

#include <immintrin.h>

#include <cstdint>

#define CACHEGEN_AVX2 __attribute__((target("avx2,bmi2,popcnt,f16c,fma")))
#define CACHEGEN_AVX2_INLINE CACHEGEN_AVX2 __attribute__((always_inline)) inline

namespace cachegen::avx2 {

// 32 words in two halves, for lookups of words by byte shuffles: [half][low or high bytes], in both 128-bit lanes.
struct WordTable {
    __m256i low[2], high[2];
};

CACHEGEN_AVX2_INLINE WordTable load_table(const uint16_t words[32]) {
    WordTable table;
    const __m128i low_bytes = _mm_set1_epi16(0x00FF);
    for (int half = 0; half < 2; ++half) {
        const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 16 * half));
        const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 16 * half + 8));
        table.low[half] = _mm256_broadcastsi128_si256(
            _mm_packus_epi16(_mm_and_si128(first, low_bytes), _mm_and_si128(second, low_bytes)));
        table.high[half] =
            _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
    }
    return table;
}

// Look up 32 bytes (0 to 31) in 32 bytes.
template <bool kWide>
CACHEGEN_AVX2_INLINE __m256i look_up_bytes(const __m256i table[2], __m256i index, __m256i is_upper) {
    const __m256i lower = _mm256_shuffle_epi8(table[0], index);
    if (!kWide) return lower;
    return _mm256_blendv_epi8(lower, _mm256_shuffle_epi8(table[1], index), is_upper);
}

// Transpose 16x16 bytes.
CACHEGEN_AVX2_INLINE void transpose_16x16_bytes(__m128i row[16]) {
    for (int stage = 0; stage < 4; ++stage) {
        __m128i next[16];
        for (int i = 0; i < 8; ++i) {
            next[2 * i] = _mm_unpacklo_epi8(row[i], row[i + 8]);
            next[2 * i + 1] = _mm_unpackhi_epi8(row[i], row[i + 8]);
        }
        for (int i = 0; i < 16; ++i) row[i] = next[i];
    }
}

}  // namespace cachegen::avx2
