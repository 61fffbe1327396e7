// Measuring with AVX2: the scales of a plane's tokens, and how often each channel's high part takes each value, in the
// blocks of measure_blocks.h.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/avx2.h"
#include "cpu/measure_blocks.h"
#include "cpu/planes.h"
#include "cpu/quantize_avx2.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx2 {
namespace {

// The largest magnitude of a token, as bits of its dtype. Magnitudes order like their bit patterns.
template <class Dtype>
CACHEGEN_AVX2 uint32_t largest_magnitude(const Plane& plane, const typename Dtype::Storage* values) {
    using Storage = typename Dtype::Storage;
    using Bits = std::conditional_t<sizeof(Storage) == 2, uint16_t, uint32_t>;
    constexpr int kStep = 32 / sizeof(Storage);
    constexpr Bits kMagnitude = sizeof(Storage) == 2 ? 0x7FFF : 0x7FFFFFFF;
    __m256i largest = _mm256_setzero_si256();
    Bits scalar_largest = 0;
    for (int64_t head = 0; head < plane.num_heads; ++head, values += plane.head_stride) {
        int64_t dim = 0;
        for (; dim + kStep <= plane.head_dim; dim += kStep) {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + dim));
            if constexpr (sizeof(Storage) == 2)
                largest = _mm256_max_epu16(largest, _mm256_and_si256(bits, _mm256_set1_epi16(kMagnitude)));
            else
                largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(kMagnitude)));
        }
        for (; dim < plane.head_dim; ++dim) {
            Bits bits;
            std::memcpy(&bits, values + dim, sizeof bits);
            scalar_largest = std::max(scalar_largest, static_cast<Bits>(bits & kMagnitude));
        }
    }
    alignas(32) Bits all[kStep];
    _mm256_store_si256(reinterpret_cast<__m256i*>(all), largest);
    return std::max(scalar_largest, *std::max_element(all, all + kStep));
}

// Count the symbols of a tile of a block's tokens.
template <class Dtype>
CACHEGEN_AVX2 void count_tile(const Plane& plane, const typename Dtype::Storage* values, const float* inverses,
                              int64_t num_tokens, int64_t first_channel, int num_channels, uint32_t* counts) {
    const TileRuns runs(first_channel, num_channels, plane.head_dim, plane.head_stride);
    const bool is_whole = runs.is_whole();
    const __m256i zero_symbol = _mm256_set1_epi16(static_cast<int16_t>(zero_symbol_of(plane.num_bins)));
    const __m128i low_bits = _mm_cvtsi32_si128(plane.coding.low_bits);
    for (int64_t token = 0; token < num_tokens; ++token, values += plane.token_stride) {
        alignas(32) typename Dtype::Storage gathered[kTileChannels];
        const typename Dtype::Storage* row = gathered;
        if (is_whole)
            row = values + runs.runs[0].offset;
        else
            gather_row(values, runs, gathered);
        __m256i words[2];
        quantize_row<Dtype>(row, _mm256_set1_ps(inverses[token]), zero_symbol, words);
        for (__m256i& word : words)
            // The minimum only matters where another thread changes the cache meanwhile.
            word = _mm256_min_epu16(_mm256_srl_epi16(word, low_bits), _mm256_set1_epi16(kTableSize - 1));
        alignas(32) uint8_t high[kTileChannels];
        _mm256_store_si256(reinterpret_cast<__m256i*>(high), pack_row(words));
        if (num_channels == kTileChannels) {
#pragma GCC unroll 32
            for (int channel = 0; channel < kTileChannels; ++channel) ++counts[channel * kTableSize + high[channel]];
        } else {
            for (int channel = 0; channel < num_channels; ++channel) ++counts[channel * kTableSize + high[channel]];
        }
    }
}

}  // namespace

int64_t measure_plane(const Plane& plane, Dtype dtype, int64_t num_tokens, uint32_t* counts) {
    int64_t bad_token = -1;
    with_dtype(dtype, [&](auto tag) {
        using Tag = decltype(tag);
        bad_token = measure_in_blocks<Tag>(plane, num_tokens, counts, largest_magnitude<Tag>, count_tile<Tag>);
    });
    return bad_token;
}

}  // namespace cachegen::avx2

#endif  // CACHEGEN_X86
