// Measuring with AVX-512: the scales of a plane's tokens, and how often each channel's high part takes each value.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <utility>

#include "cpu/avx512.h"
#include "cpu/measure_blocks.h"
#include "cpu/planes.h"
#include "cpu/quantize_avx512.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx512 {
namespace {

// The largest magnitude of a token, as bits of its dtype.
template <class Dtype>
CACHEGEN_AVX512 uint32_t largest_magnitude(const Plane& plane, const typename Dtype::Storage* values) {
    __m512i largest = _mm512_setzero_si512();
    constexpr bool kIsWord = sizeof(typename Dtype::Storage) == 2;
    constexpr int kStep = kIsWord ? 32 : 16;
    for (int64_t head = 0; head < plane.num_heads; ++head, values += plane.head_stride) {
        for (int64_t dim = 0; dim < plane.head_dim; dim += kStep) {
            const __mmask32 live = first_lanes(plane.head_dim - dim);
            // Magnitudes order like their bit patterns.
            if constexpr (kIsWord) {
                const __m512i words = _mm512_maskz_loadu_epi16(live, values + dim);
                largest = _mm512_max_epu16(largest, _mm512_and_si512(words, _mm512_set1_epi16(0x7FFF)));
            } else {
                const __m512i words = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(live), values + dim);
                largest = _mm512_max_epu32(largest, _mm512_and_si512(words, _mm512_set1_epi32(0x7FFFFFFF)));
            }
        }
    }
    if constexpr (kIsWord)
        largest =
            _mm512_max_epu32(_mm512_srli_epi32(largest, 16), _mm512_and_si512(largest, _mm512_set1_epi32(0xFFFF)));
    return _mm512_reduce_max_epu32(largest);
}

template <class Dtype, int... kPositions>
inline void count_words(const uint16_t* symbols, uint32_t* counts, std::integer_sequence<int, kPositions...>) {
    (++counts[channel_at<Dtype>(kPositions) * kTableSize + symbols[kPositions]], ...);
}

// Count the symbols of a tile of a block's tokens.
template <class Dtype>
CACHEGEN_AVX512 void count_tile(const Plane& plane, const typename Dtype::Storage* values, const float* inverses,
                                int64_t num_tokens, int64_t first_channel, int num_channels, uint32_t* counts) {
    const TileRuns runs(first_channel, num_channels, plane.head_dim, plane.head_stride);
    const __m512i zero_symbol = _mm512_set1_epi16(static_cast<int16_t>(zero_symbol_of(plane.num_bins)));
    const __m128i low_bits = _mm_cvtsi32_si128(plane.coding.low_bits);
    for (int64_t token = 0; token < num_tokens; ++token, values += plane.token_stride) {
        const WideRow row =
            runs.is_whole() ? load_whole_row<Dtype>(values + runs.runs[0].offset) : load_row<Dtype>(values, runs);
        const __m512i symbols = quantize_row(row, _mm512_set1_ps(inverses[token]), zero_symbol);
        alignas(64) uint16_t high[kTileChannels];
        // The minimum only matters where another thread changes the cache meanwhile.
        _mm512_store_si512(high,
                           _mm512_min_epu16(_mm512_srl_epi16(symbols, low_bits), _mm512_set1_epi16(kTableSize - 1)));
        if (num_channels == kTileChannels) {
            count_words<Dtype>(high, counts, std::make_integer_sequence<int, kTileChannels>());
        } else {
            for (int position = 0; position < kTileChannels; ++position)
                if (channel_at<Dtype>(position) < num_channels)
                    ++counts[channel_at<Dtype>(position) * kTableSize + high[position]];
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

}  // namespace cachegen::avx512

#endif  // CACHEGEN_X86
