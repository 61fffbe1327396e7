// What the encoder must know of a cache beforehand: the scale of every token, and how often every symbol occurs. The
// numbers are those of cpu/planes.h, measure_plane.

#pragma once

#include "cuda/planes.cuh"

namespace cachegen {
namespace cuda {

constexpr int kCountedChannels = 128;  // of a block, one per thread
constexpr int kCountedTokens = 1024;   // of a block

// Warp = token, lanes over its channels. Grid: x = planes, y = eight tokens each, as many as there are or fewer.
template <class Dtype>
__global__ void __launch_bounds__(kThreadsPerBlock)
    find_scales_kernel(const PlaneRecord* planes, int num_tokens, uint32_t* bad_tokens) {
    using Storage = typename Dtype::Storage;
    const int lane = static_cast<int>(threadIdx.x) % kNumLanes, warp = static_cast<int>(threadIdx.x) / kNumLanes;
    const PlaneRecord& plane = planes[blockIdx.x];
    const int num_heads = static_cast<int>(plane.num_heads), head_dim = static_cast<int>(plane.head_dim);
    for (int64_t token = int64_t{blockIdx.y} * kWarpsPerBlock + warp; token < num_tokens;
         token += int64_t{gridDim.y} * kWarpsPerBlock) {
        const auto* values = reinterpret_cast<const Storage*>(plane.values) + token * plane.token_stride;
        CACHEGEN_ASSUME_GLOBAL(values);
        // Magnitudes order like their bit patterns, and so do infinity and NaN, above all finite ones.
        uint32_t largest = 0;
        int head = 0, dim = lane;
        for (;;) {
            for (; dim >= head_dim; dim -= head_dim) ++head;
            if (head >= num_heads) break;
            const uint32_t magnitude = bits_of(Dtype::widen(values[head * plane.head_stride + dim])) & 0x7FFFFFFFu;
            if (magnitude > largest) largest = magnitude;
            dim += kNumLanes;
        }
        for (int distance = kNumLanes / 2; distance > 0; distance /= 2) {
            const uint32_t other = __shfl_xor_sync(kAllLanes, largest, distance);
            if (other > largest) largest = other;
        }
        if (lane != 0) continue;
        const bool is_finite = largest < 0x7F800000u;
        if (!is_finite) atomicMin(&bad_tokens[blockIdx.x], static_cast<uint32_t>(token));
        // Exact: the scale is one of the values.
        reinterpret_cast<Storage*>(plane.scales)[token] = Dtype::narrow(is_finite ? float_of(largest) : 0.0f);
    }
}

// Thread = channel, over a run of tokens. Grid: x = planes, y = channels, z = tokens, as many as there are or fewer.
template <class Dtype>
__global__ void __launch_bounds__(kCountedChannels)
    count_symbols_kernel(const PlaneRecord* planes, int num_tokens, uint32_t* counts) {
    using Storage = typename Dtype::Storage;
    __shared__ uint32_t block_counts[kTableSize][kCountedChannels];  // a column belongs to its thread alone
    const PlaneRecord& plane = planes[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x), head_dim = static_cast<int>(plane.head_dim);
    const int channel = static_cast<int>(blockIdx.y) * kCountedChannels + thread;
    if (channel >= plane.num_heads * plane.head_dim) return;
    const int zero_symbol = zero_symbol_of(static_cast<int>(plane.num_bins));
    const int low_bits = static_cast<int>(plane.low_bits);
    const auto* values =
        reinterpret_cast<const Storage*>(plane.values) + channel / head_dim * plane.head_stride + channel % head_dim;
    const auto* scales = reinterpret_cast<const Storage*>(plane.scales);
    CACHEGEN_ASSUME_GLOBAL(values);
    CACHEGEN_ASSUME_GLOBAL(scales);
    for (int high = 0; high < kTableSize; ++high) block_counts[high][thread] = 0;
    for (int64_t first = int64_t{blockIdx.z} * kCountedTokens; first < num_tokens;
         first += int64_t{gridDim.z} * kCountedTokens) {
        const int64_t last = first + kCountedTokens < num_tokens ? first + kCountedTokens : num_tokens;
        for (int64_t token = first; token < last; ++token) {
            const float inverse = inverse_step(Dtype::widen(scales[token]), zero_symbol);
            const int symbol = quantize(Dtype::widen(values[token * plane.token_stride]), inverse, zero_symbol);
            // Others come of values that are not finite, which find_scales reports.
            if (symbol >= 0 && symbol <= 2 * zero_symbol) ++block_counts[symbol >> low_bits][thread];
        }
    }
    for (int high = 0; high < kTableSize; ++high) {
        const uint32_t count = block_counts[high][thread];
        if (count != 0) atomicAdd(&counts[(plane.first_table + channel) * kTableSize + high], count);
    }
}

}  // namespace cuda
}  // namespace cachegen
