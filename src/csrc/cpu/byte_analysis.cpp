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

int64_t filled(int64_t num_channels) { return (num_channels + kQuad - 1) / kQuad * kQuad; }

}  // namespace

void gather_bytes(const ByteAnalysisKernels& kernels, const std::vector<SynthesisPlane>& planes, Dtype dtype,
                  int64_t num_tokens, const float* means, const float* inverses, const std::vector<int32_t>& copies,
                  bool has_low, uint8_t* rows, int64_t stride, int num_threads, ChannelSizes& sizes,
                  std::vector<Excess>& excess) {
    int64_t num_channels = 0;
    for (const SynthesisPlane& plane : planes) num_channels += plane.num_heads * plane.head_dim;
    const int64_t first_copy = filled(num_channels);
    const int64_t first_low = first_copy + static_cast<int64_t>(copies.size());
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
            if (has_low) target.low_rows = target.rows + first_low;
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
        for (int64_t token = 0; token < count; ++token) {
            uint8_t* const row = rows + (first_token + token) * stride;
            std::fill(row + num_channels, row + first_copy, static_cast<uint8_t>(kByteBias));
            for (size_t i = 0; i < copies.size(); ++i) row[first_copy + i] = copies[i] < 0 ? kByteBias : row[copies[i]];
            if (has_low) std::fill(row + first_low + num_channels, row + stride, static_cast<uint8_t>(kByteBias));
        }
    });
    join_sizes(largest, sums, num_tiles, width, num_channels, sizes);
    for (const std::vector<Excess>& part : found) excess.insert(excess.end(), part.begin(), part.end());
    std::vector<std::vector<int32_t>> copies_of(num_channels);
    for (size_t i = 0; i < copies.size(); ++i)
        if (copies[i] >= 0) copies_of[copies[i]].push_back(static_cast<int32_t>(first_copy + i));
    const size_t num_excess = excess.size();
    for (size_t i = 0; i < num_excess; ++i)
        for (const int32_t place : copies_of[excess[i].channel])
            excess.push_back({excess[i].token, place, excess[i].units});
}

void multiply_bytes(const ByteAnalysisKernels& kernels, const uint8_t* rows, int64_t num_tokens,
                    const std::vector<Excess>& excess, const ByteAnalysisMatrix& matrix, int64_t max_square,
                    const std::vector<LevelComponents>& levels, int num_threads, uint8_t* misfits) {
    const int64_t stride = matrix.stride();
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
            if (kernels.square(rows + token * stride, filled(matrix.num_channels)) > max_square) misfits[token] = 1;
        // Of unwanted components, too.
        alignas(64) int32_t sums[kMultiplyTokens * kAnalysisComponents] = {};
        alignas(64) int32_t low_sums[kMultiplyTokens * kAnalysisComponents] = {};
        for (int64_t first = 0; first < num_components; first += kAnalysisComponents) {
            const bool is_fine = first < matrix.num_fine;
            const int8_t* const entries = matrix.entries + first * kQuad * matrix.num_quads;
            const int8_t* const low_entries = matrix.low_entries + (is_fine ? first * stride : 0);
            const int64_t wanted = std::min(kAnalysisComponents, num_components - first);
            for (int64_t part = begin; part < end; ++part) {
                const int64_t first_token = part * kMultiplyTokens;
                const int64_t count = std::min(kMultiplyTokens, num_tokens - first_token);
                const uint8_t* const part_rows = rows + first_token * stride;
                kernels.multiply(part_rows, stride, count, matrix.num_quads, entries, wanted, sums);
                if (is_fine)
                    kernels.multiply(part_rows, stride, count, matrix.num_low_quads, low_entries, wanted, low_sums);
                for (const Excess& one : of_parts[part]) {
                    const int64_t place = (one.token - first_token) * kAnalysisComponents;
                    const int64_t quad = one.channel / kQuad * kQuad * kAnalysisComponents;
                    kernels.add_excess(entries + quad, one.channel % kQuad, one.units, sums + place);
                    if (is_fine)
                        kernels.add_excess(low_entries + quad, one.channel % kQuad, one.units, low_sums + place);
                }
                for (int64_t token = 0; token < count; ++token) {
                    int32_t* const low = is_fine ? low_sums + token * kAnalysisComponents : nullptr;
                    for (int64_t k = 0; is_fine && k < wanted; ++k) low[k] -= matrix.low_corrections[first + k];
                    kernels.round(sums + token * kAnalysisComponents, low, matrix.scales + first,
                                  matrix.corrections + first, first, wanted, first_token + token, levels);
                }
            }
        }
    });
}

PackedAnalysis pack_analysis(const float* analysis, int64_t num_channels, int64_t num_components,
                             const float* channel_units, const std::vector<int32_t>& copies, int64_t num_fine,
                             int num_threads) {
    const int64_t num_blocks = (num_components + kAnalysisComponents - 1) / kAnalysisComponents;
    const int64_t first_copy = filled(num_channels), first_low = first_copy + static_cast<int64_t>(copies.size());
    const int64_t width = first_low, whole_width = first_low + first_copy;
    PackedAnalysis packed;
    packed.entries.assign(num_blocks * width * kAnalysisComponents, 0);
    packed.units.assign(num_blocks * kAnalysisComponents, 0.0f);
    packed.corrections.assign(num_blocks * kAnalysisComponents, 0);
    packed.low_entries.assign(num_fine * whole_width, 0);
    packed.low_corrections.assign(num_fine, 0);
    std::vector<std::vector<int64_t>> places(num_channels);
    for (int64_t c = 0; c < num_channels; ++c) places[c].push_back(c);
    for (size_t i = 0; i < copies.size(); ++i)
        if (copies[i] >= 0) places[copies[i]].push_back(first_copy + static_cast<int64_t>(i));
    parallel_for(num_components, num_threads, [&](int64_t k) {
        const float* const row = analysis + k * num_channels;
        const bool is_fine = k < num_fine;
        const auto num_places = [&](int64_t c) { return is_fine ? 1 : static_cast<int>(places[c].size()); };
        float largest = 0;
        for (int64_t c = 0; c < num_channels; ++c)
            largest = std::max(largest, std::fabs(row[c] * channel_units[c]) / static_cast<float>(num_places(c)));
        const float inverse = kEntryLimit / largest;
        if (!std::isfinite(inverse)) return;
        const auto block_of = [&](std::vector<int8_t>& entries, int64_t row_width) {
            return entries.data() + k / kAnalysisComponents * row_width * kAnalysisComponents +
                   k % kAnalysisComponents * kQuad;
        };
        const auto place_of = [](int64_t c) { return c / kQuad * kQuad * kAnalysisComponents + c % kQuad; };
        int8_t* const entries = block_of(packed.entries, width);
        int8_t* const low = is_fine ? block_of(packed.low_entries, whole_width) : nullptr;
        int32_t total = 0, low_total = 0;
        for (int64_t c = 0; c < num_channels; ++c) {
            const float scaled = row[c] * channel_units[c] * inverse;
            const auto entry = static_cast<int32_t>(std::lrint(scaled));
            total += entry;
            // As equal parts as integers are.
            int32_t left = entry;
            for (int i = num_places(c); i > 0; --i) {
                const int32_t part = left / i;
                entries[place_of(places[c][i - 1])] = static_cast<int8_t>(part);
                left -= part;
            }
            if (!is_fine) continue;
            const auto digit =
                static_cast<int32_t>(std::lrint((scaled - static_cast<float>(entry)) * (1 << kLowShift)));
            low[place_of(c)] = static_cast<int8_t>(digit);
            low[place_of(first_low + c)] = static_cast<int8_t>(entry);
            low_total += digit + entry;
        }
        packed.units[k] = largest / kEntryLimit;
        packed.corrections[k] = kByteBias * total;
        if (is_fine) packed.low_corrections[k] = kByteBias * low_total;
    });
    return packed;
}

}  // namespace cachegen
