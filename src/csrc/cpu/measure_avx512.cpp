// Measuring with AVX-512: the scales of a plane's tokens, and how often each channel's high part takes each value.
//
// Counting is what costs: one read-modify-write of memory per value. So that the counters stay in the first-level cache
// and the values in the second, 64 tokens are taken at a time, and of those 32 channels.

#include "cpu/cpu_path.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/avx512.h"
#include "cpu/planes.h"
#include "cpu/quantize_avx512.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx512 {
namespace {

constexpr int64_t kBlockTokens = 64;

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

template <class Dtype>
int64_t measure(const Plane& plane, int64_t num_tokens, uint32_t* counts) {
    using Storage = typename Dtype::Storage;
    constexpr uint32_t kInfinity = Dtype::kDtype == cachegen::Dtype::kFloat16    ? 0x7C00
                                   : Dtype::kDtype == cachegen::Dtype::kBfloat16 ? 0x7F80
                                                                                 : 0x7F800000;
    const auto* values = reinterpret_cast<const Storage*>(plane.values);
    auto* scales = reinterpret_cast<Storage*>(plane.scales);
    const int64_t num_channels = plane.num_channels();
    for (int64_t first_token = 0; first_token < num_tokens; first_token += kBlockTokens) {
        const int64_t count = std::min(kBlockTokens, num_tokens - first_token);
        const Storage* block = values + first_token * plane.token_stride;
        float inverses[kBlockTokens];
        for (int64_t token = 0; token < count; ++token) {
            const uint32_t largest = largest_magnitude<Dtype>(plane, block + token * plane.token_stride);
            if (largest >= kInfinity) return first_token + token;
            const auto bits = static_cast<std::conditional_t<sizeof(Storage) == 2, uint16_t, uint32_t>>(largest);
            std::memcpy(&scales[first_token + token], &bits, sizeof bits);
            inverses[token] = inverse_step(Dtype::widen(scales[first_token + token]), zero_symbol_of(plane.num_bins));
        }
        for (int64_t channel = 0; channel < num_channels; channel += kTileChannels)
            count_tile<Dtype>(plane, block, inverses, count, channel,
                              static_cast<int>(std::min<int64_t>(kTileChannels, num_channels - channel)),
                              counts + channel * kTableSize);
    }
    return -1;
}

}  // namespace
}  // namespace cachegen::avx512

namespace cachegen {

int64_t measure_plane_avx512(const Plane& plane, Dtype dtype, int64_t num_tokens, uint32_t* counts) {
    if (dtype == Dtype::kFloat16) return avx512::measure<Float16>(plane, num_tokens, counts);
    if (dtype == Dtype::kBfloat16) return avx512::measure<Bfloat16>(plane, num_tokens, counts);
    return avx512::measure<Float32>(plane, num_tokens, counts);
}

}  // namespace cachegen

#endif  // CACHEGEN_X86
