// Quantization with AVX2: 32 channels of a token to words, in the channels' order.

#pragma once

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <cstring>

#include "cpu/avx2.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx2 {

// Read eight values as fp32.
template <class Dtype>
CACHEGEN_AVX2_INLINE __m256 load_eight(const typename Dtype::Storage* values) {
    if constexpr (Dtype::kDtype == cachegen::Dtype::kFloat32) {
        return _mm256_loadu_ps(values);
    } else {
        const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        if constexpr (Dtype::kDtype == cachegen::Dtype::kFloat16) return _mm256_cvtph_ps(words);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
}

// The symbols of 32 contiguous channels as words: channels 0-3, 8-11, 4-7 and 12-15 in the first vector, and likewise
// in the second. Values that are no fit for the scale give words above any symbol.
template <class Dtype>
CACHEGEN_AVX2_INLINE void quantize_row(const typename Dtype::Storage* row, __m256 inverse, __m256i zero_symbol,
                                       __m256i words[2]) {
    for (int i = 0; i < 2; ++i) {
        // The conversion rounds ties to even; out of range it gives the smallest integer, which the packing saturates.
        const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(load_eight<Dtype>(row + 16 * i), inverse));
        const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(load_eight<Dtype>(row + 16 * i + 8), inverse));
        words[i] = _mm256_add_epi16(_mm256_packs_epi32(first, second), zero_symbol);
    }
}

// The words of quantize_row as bytes, in the channels' order.
CACHEGEN_AVX2_INLINE __m256i pack_row(const __m256i words[2]) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words[0], words[1]), order);
}

// Copy the channels of a tile from a token. Channels that are not there become zero.
template <class Storage>
inline void gather_row(const Storage* row, const TileRuns& runs, Storage gathered[kTileChannels]) {
    std::memset(gathered, 0, kTileChannels * sizeof(Storage));
    for (int i = 0; i < runs.num_runs; ++i) {
        const int first = __builtin_ctz(runs.runs[i].mask), count = __builtin_popcount(runs.runs[i].mask);
        std::memcpy(gathered + first, row + runs.runs[i].offset + first, count * sizeof(Storage));
    }
}

}  // namespace cachegen::avx2

#endif  // CACHEGEN_X86
