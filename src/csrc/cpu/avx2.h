// What the AVX2 kernels share: the target attribute and a transposition. As in avx512.h, each function carries its
// target itself.

#pragma once

#include <immintrin.h>

#include <cstdint>

#define CACHEGEN_AVX2 __attribute__((target("avx2,bmi2,popcnt,f16c,fma")))
#define CACHEGEN_AVX2_INLINE CACHEGEN_AVX2 __attribute__((always_inline)) inline

namespace cachegen::avx2 {

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
