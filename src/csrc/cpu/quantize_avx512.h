// Quantization with AVX-512: 32 channels of a token to words, and blocks of words to channel-major bytes.

#pragma once

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include "cpu/avx512.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx512 {

// The values of 32 channels in fp32, in two vectors. Which channel lies where differs by dtype, see channel_at.
struct WideRow {
    __m512 first, second;
};

template <class Dtype>
CACHEGEN_AVX512_INLINE WideRow widen_row(__m512i words) {
    if constexpr (Dtype::kDtype == cachegen::Dtype::kFloat16)
        return {_mm512_cvtph_ps(_mm512_castsi512_si256(words)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))};
    else
        return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}

// Read 32 contiguous channels of a token.
template <class Dtype>
CACHEGEN_AVX512_INLINE WideRow load_whole_row(const typename Dtype::Storage* row) {
    if constexpr (Dtype::kDtype == cachegen::Dtype::kFloat32)
        return {_mm512_loadu_ps(row), _mm512_loadu_ps(row + 16)};
    else if constexpr (Dtype::kDtype == cachegen::Dtype::kFloat16)
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))),
                _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 16)))};
    else
        return widen_row<Dtype>(_mm512_loadu_si512(row));
}

// Read the channels of a tile from a token. Channels that are not there read as zero.
template <class Dtype>
CACHEGEN_AVX512_INLINE WideRow load_row(const typename Dtype::Storage* row, const TileRuns& runs) {
    if constexpr (sizeof(typename Dtype::Storage) == 4) {
        WideRow wide{_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int i = 0; i < runs.num_runs; ++i) {
            const float* address = row + runs.runs[i].offset;
            wide.first = _mm512_mask_loadu_ps(wide.first, static_cast<__mmask16>(runs.runs[i].mask), address);
            wide.second =
                _mm512_mask_loadu_ps(wide.second, static_cast<__mmask16>(runs.runs[i].mask >> 16), address + 16);
        }
        return wide;
    } else {
        __m512i words = _mm512_setzero_si512();
        for (int i = 0; i < runs.num_runs; ++i)
            words = _mm512_mask_loadu_epi16(words, runs.runs[i].mask, row + runs.runs[i].offset);
        return widen_row<Dtype>(words);
    }
}

// The channel of word `position` of what quantize_row makes: 0 to 31.
template <class Dtype>
constexpr int channel_at(int position) {
    const int lane = position / 8, word = position % 8;
    const int element = 4 * lane + word % 4, vector = word / 4;
    return Dtype::kDtype == cachegen::Dtype::kBfloat16 ? 2 * element + vector : 16 * vector + element;
}

// The symbols of 32 channels as words. Values that are no fit for the scale give words above any symbol.
CACHEGEN_AVX512_INLINE __m512i quantize_row(const WideRow& row, __m512 inverse, __m512i zero_symbol) {
    // The conversion rounds ties to even; out of range it gives the smallest integer, which the packing saturates.
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(row.first, inverse));
    const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(row.second, inverse));
    return _mm512_add_epi16(_mm512_packs_epi32(first, second), zero_symbol);
}

}  // namespace cachegen::avx512

#endif  // CACHEGEN_X86
