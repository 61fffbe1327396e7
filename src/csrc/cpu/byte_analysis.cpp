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
void add_excess(const Excess& excess, const int8_t* entries, int64_t num_components, int32_t* sums) {
    const int8_t* const quad = entries + excess.channel / kQuad * kQuad * kAnalysisComponents + excess.channel % kQuad;
    for (int64_t k = 0; k < num_components; ++k) sums[k] += excess.units * quad[kQuad * k];
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
    const int64_t stride = kQuad * matrix.num_quads;
    std::vector<int64_t> totals(num_tokens, 0);
    for (const Excess& one : excess) totals[one.token] += std::abs(int64_t{one.units});
    for (int64_t token = 0; token < num_tokens; ++token) misfits[token] = totals[token] > kMaxExcess ? 1 : 0;
    std::vector<std::vector<Excess>> of_parts((num_tokens + kMultiplyTokens - 1) / kMultiplyTokens);
    for (const Excess& one : excess)
        if (misfits[one.token] == 0) of_parts[one.token / kMultiplyTokens].push_back(one);
    int64_t num_components = 0;
    for (const LevelComponents& level : levels) num_components = std::max(num_components, level.num_components);
    // A thread takes as many tokens as it can: a block of the matrix is then read from memory once.
    const auto num_parts = static_cast<int64_t>(of_parts.size());
    const int64_t num_tiles = std::max<int64_t>(std::min<int64_t>(num_threads, num_parts), 1);
    parallel_for(num_tiles, num_threads, [&](int64_t tile) {
        const int64_t begin = num_parts * tile / num_tiles, end = num_parts * (tile + 1) / num_tiles;
        for (int64_t token = begin * kMultiplyTokens; token < std::min(end * kMultiplyTokens, num_tokens); ++token)
            if (kernels.square(rows + token * stride, stride) > max_square) misfits[token] = 1;
        alignas(64) int32_t sums[kMultiplyTokens * kAnalysisComponents] = {};  // of unwanted components, too
        for (int64_t first = 0; first < num_components; first += kAnalysisComponents) {
            const int8_t* const entries = matrix.entries + first * stride;
            const int64_t wanted = std::min(kAnalysisComponents, num_components - first);
            for (int64_t part = begin; part < end; ++part) {
                const int64_t first_token = part * kMultiplyTokens;
                const int64_t count = std::min(kMultiplyTokens, num_tokens - first_token);
                kernels.multiply(rows + first_token * stride, count, matrix.num_quads, entries, wanted, sums);
                for (const Excess& one : of_parts[part])
                    add_excess(one, entries, wanted, sums + (one.token - first_token) * kAnalysisComponents);
                for (int64_t token = 0; token < count; ++token)
                    kernels.round(sums + token * kAnalysisComponents, matrix.scales + first, matrix.corrections + first,
                                  first, wanted, first_token + token, levels);
            }
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
        int8_t* const entries = packed.entries.data() +
                                (k / kAnalysisComponents) * num_quads * kQuad * kAnalysisComponents +
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
