// The frame of measuring with vectors: which tokens and channels are taken together, and the scales.
//
// Counting is what costs: one read-modify-write of memory per value. So that the counters stay in the first-level cache
// and the values in the second, 64 tokens are taken at a time, and of those 32 channels.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/planes.h"
#include "cpu/stream_batch.h"
#include "quantization.h"

namespace cachegen {

// Find the scales of a plane's tokens and count its symbols; returns the first token that is not finite, or -1.
//
// largest_magnitude(plane, token's values): as bits of the dtype. count_tile(plane, block's values, inverses, number of
// tokens, first channel, number of channels, counts of the first channel).
template <class Dtype, class LargestMagnitude, class CountTile>
int64_t measure_in_blocks(const Plane& plane, int64_t num_tokens, uint32_t* counts, LargestMagnitude largest_magnitude,
                          CountTile count_tile) {
    using Storage = typename Dtype::Storage;
    constexpr int64_t kBlockTokens = 64;
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
            const uint32_t largest = largest_magnitude(plane, block + token * plane.token_stride);
            if (largest >= kInfinity) return first_token + token;
            const auto bits = static_cast<std::conditional_t<sizeof(Storage) == 2, uint16_t, uint32_t>>(largest);
            std::memcpy(&scales[first_token + token], &bits, sizeof bits);
            inverses[token] = inverse_step(Dtype::widen(scales[first_token + token]), zero_symbol_of(plane.num_bins));
        }
        for (int64_t channel = 0; channel < num_channels; channel += kTileChannels)
            count_tile(plane, block, inverses, count, channel,
                       static_cast<int>(std::min<int64_t>(kTileChannels, num_channels - channel)),
                       counts + channel * kTableSize);
    }
    return -1;
}

}  // namespace cachegen
