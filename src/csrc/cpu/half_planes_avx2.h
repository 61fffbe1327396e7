// Values of 16 bits of a cache's planes, eight at a time: widened, their rotations undone, their sizes added up.

#pragma once

#include "cpu/avx2.h"
#include "cpu/synthesis.h"
#include "quantization.h"

namespace cachegen::avx2 {

constexpr int kHalfWidth = 8;

// Eight values as fp32; those behind the last one are zero.
template <bool kIsHalf>
CACHEGEN_AVX2_INLINE __m256 widen_half(const uint16_t* values, int64_t count) {
    alignas(16) uint16_t part[kHalfWidth] = {};
    if (count < kHalfWidth) {
        for (int64_t i = 0; i < count; ++i) part[i] = values[i];
        values = part;
    }
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    if constexpr (kIsHalf) return _mm256_cvtph_ps(words);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

CACHEGEN_AVX2_INLINE __m256 magnitude(__m256 values) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), values); }

// Keep the largest and the sum. What is no number may be lost to the maximum, and stays in the sum.
CACHEGEN_AVX2_INLINE void add_sizes(__m256 values, float* largest, float* sums) {
    const __m256 size = magnitude(values);
    _mm256_storeu_ps(largest, _mm256_max_ps(_mm256_loadu_ps(largest), size));
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), size));
}

// Undo the rotation of a head's values in place.
CACHEGEN_AVX2_INLINE void undo_head(float* head, const SynthesisPlane& plane, const float* cosines,
                                    const float* sines) {
    const int64_t step = plane.is_interleaved ? 2 : 1;
    float* const firsts = head + plane.offset;
    float* const seconds = firsts + (plane.is_interleaved ? 1 : plane.num_pairs);
    int64_t pair = 0;
    if (!plane.is_interleaved) {
        for (; pair + kHalfWidth <= plane.num_pairs; pair += kHalfWidth) {
            const __m256 x = _mm256_loadu_ps(firsts + pair), y = _mm256_loadu_ps(seconds + pair);
            const __m256 cosine = _mm256_loadu_ps(cosines + pair), sine = _mm256_loadu_ps(sines + pair);
            _mm256_storeu_ps(firsts + pair, _mm256_add_ps(_mm256_mul_ps(x, cosine), _mm256_mul_ps(y, sine)));
            _mm256_storeu_ps(seconds + pair, _mm256_sub_ps(_mm256_mul_ps(y, cosine), _mm256_mul_ps(x, sine)));
        }
    }
    for (; pair < plane.num_pairs; ++pair) {
        float &first = firsts[step * pair], &second = seconds[step * pair];
        const float x = first, y = second;
        first = x * cosines[pair] + y * sines[pair];
        second = y * cosines[pair] - x * sines[pair];
    }
}

// The first `count` of eight values; the others become zero.
CACHEGEN_AVX2_INLINE __m256 first_values(__m256 values, int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i is_live = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
    return _mm256_and_ps(values, _mm256_castsi256_ps(is_live));
}

}  // namespace cachegen::avx2
