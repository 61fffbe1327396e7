#include "cpu/byte_analysis.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "cpu/parallel.h"

namespace cachegen {
namespace {

constexpr int64_t kPadding = 8;  // that vectors may read and write behind the last channel

std::vector<float> padded(const float* values, int64_t count) {
    std::vector<float> made(values, values + count);
    made.resize(count + kPadding, 0.0f);
    return made;
}

// Add to a token's sums of a block what an excess comes to.
void add_excess(const Excess& excess, const int8_t* entries, int32_t* sums) {
    const int8_t* const quad = entries + excess.channel / kQuad * kQuad * kAnalysisComponents + excess.channel % kQuad;
    for (int64_t k = 0; k < kAnalysisComponents; ++k) sums[k] += excess.units * quad[kQuad * k];
}

}  // namespace

void gather_bytes(const ByteAnalysisKernels& kernels, const std::vector<SynthesisPlane>& planes, Dtype dtype,
                  int64_t num_tokens, const float* means, const float* inverses, uint8_t* rows, int64_t stride,
                  int num_threads, ChannelSizes& sizes, std::vector<Excess>& excess) {
    int64_t num_channels = 0;
    for (const SynthesisPlane& plane : planes) num_channels += plane.num_heads * plane.head_dim;
    const std::vector<float> all_means = padded(means, num_channels), all_inverses = padded(inverses, num_channels);
    const int64_t num_tiles = (num_tokens + kGatherTokens - 1) / kGatherTokens, width = num_channels + kPadding;
    std::vector<float> largest(num_tiles * width, 0.0f), sums(num_tiles * width, 0.0f);
    std::vector<std::vector<Excess>> found(num_tiles);
    parallel_for(num_tiles, num_threads, [&](int64_t tile) {
        const int64_t first_token = tile * kGatherTokens;
        const int64_t count = std::min(kGatherTokens, num_tokens - first_token);
        int64_t channel = 0;
        for (const SynthesisPlane& plane : planes) {
            ByteRows target;
            target.rows = rows + first_token * stride + channel;
            target.stride = stride;
            target.means = all_means.data() + channel;
            target.inverses = all_inverses.data() + channel;
            target.largest = largest.data() + tile * width + channel;
            target.sums = sums.data() + tile * width + channel;
            target.first_channel = static_cast<int32_t>(channel);
            target.excess = &found[tile];
            kernels.gather(plane, dtype, first_token, count, target);
            channel += plane.num_heads * plane.head_dim;
        }
        for (int64_t token = 0; token < count; ++token)
            std::fill(rows + (first_token + token) * stride + num_channels, rows + (first_token + token + 1) * stride,
                      static_cast<uint8_t>(kByteBias));
    });
    join_sizes(largest, sums, num_tiles, width, num_channels, sizes);
    for (const std::vector<Excess>& part : found) excess.insert(excess.end(), part.begin(), part.end());
}

void multiply_bytes(const ByteAnalysisKernels& kernels, const uint8_t* rows, int64_t num_tokens,
                    const std::vector<Excess>& excess, const ByteAnalysisMatrix& matrix, int64_t max_square,
                    const std::vector<LevelComponents>& levels, int num_threads, uint8_t* misfits) {
    const int64_t stride = kQuad * matrix.num_quads, num_tiles = (num_tokens + kMultiplyTokens - 1) / kMultiplyTokens;
    std::vector<int64_t> totals(num_tokens, 0);
    for (const Excess& one : excess) totals[one.token] += std::abs(int64_t{one.units});
    for (int64_t token = 0; token < num_tokens; ++token) misfits[token] = totals[token] > kMaxExcess ? 1 : 0;
    std::vector<std::vector<Excess>> of_tiles(num_tiles);
    for (const Excess& one : excess)
        if (misfits[one.token] == 0) of_tiles[one.token / kMultiplyTokens].push_back(one);
    int64_t num_components = 0;
    for (const LevelComponents& level : levels) num_components = std::max(num_components, level.num_components);
    const int64_t num_blocks = (num_components + kAnalysisComponents - 1) / kAnalysisComponents;
    parallel_for(num_tiles, num_threads, [&](int64_t tile) {
        const int64_t first_token = tile * kMultiplyTokens;
        const int64_t count = std::min(kMultiplyTokens, num_tokens - first_token);
        const uint8_t* const first_row = rows + first_token * stride;
        for (int64_t token = 0; token < count; ++token) {
            int64_t square = kernels.square(first_row + token * stride, stride);
            if (square > max_square) misfits[first_token + token] = 1;
        }
        alignas(64) int32_t sums[kMultiplyTokens * kAnalysisComponents];
        for (int64_t block = 0; block < num_blocks; ++block) {
            const int8_t* const entries = matrix.entries + block * matrix.num_quads * kQuad * kAnalysisComponents;
            const int64_t first = block * kAnalysisComponents;
            kernels.multiply(first_row, count, matrix.num_quads, entries, sums);
            for (const Excess& one : of_tiles[tile])
                add_excess(one, entries, sums + (one.token - first_token) * kAnalysisComponents);
            for (int64_t token = 0; token < count; ++token)
                kernels.round(sums + token * kAnalysisComponents, matrix.scales + first, matrix.corrections + first,
                              first, first_token + token, levels);
        }
    });
}

PackedAnalysis pack_analysis(const float* analysis, int64_t num_channels, int64_t num_components,
                             const float* channel_units, int num_threads) {
    const int64_t num_blocks = (num_components + kAnalysisComponents - 1) / kAnalysisComponents;
    const int64_t num_quads = (num_channels + kQuad - 1) / kQuad;
    PackedAnalysis packed;
    packed.entries.assign(num_blocks * num_quads * kQuad * kAnalysisComponents, 0);
    packed.units.assign(num_blocks * kAnalysisComponents, 0.0f);
    packed.corrections.assign(num_blocks * kAnalysisComponents, 0);
    parallel_for(num_components, num_threads, [&](int64_t k) {
        const float* const row = analysis + k * num_channels;
        float largest = 0;
        for (int64_t c = 0; c < num_channels; ++c) largest = std::max(largest, std::fabs(row[c] * channel_units[c]));
        const float inverse = kEntryLimit / largest;
        if (!std::isfinite(inverse)) return;
        int8_t* const entries = packed.entries.data() + (k / kAnalysisComponents) * num_quads * kQuad *
                                                             kAnalysisComponents +
                                k % kAnalysisComponents * kQuad;
        int32_t total = 0;
        for (int64_t c = 0; c < num_channels; ++c) {
            const auto entry = static_cast<int32_t>(std::lrint(row[c] * channel_units[c] * inverse));
            entries[c / kQuad * kQuad * kAnalysisComponents + c % kQuad] = static_cast<int8_t>(entry);
            total += entry;
        }
        packed.units[k] = largest / kEntryLimit;
        packed.corrections[k] = kByteBias * total;
    });
    return packed;
}

}  // namespace cachegen
