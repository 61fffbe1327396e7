#include "cpu/synthesis.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/stream_batch.h"

namespace cachegen {
namespace {

std::vector<SynthesisUnit> list_units(const std::vector<SynthesisPlane>& planes) {
    std::vector<SynthesisUnit> units;
    int64_t first_block = 0, index = 0;
    for (const SynthesisPlane& plane : planes) {
        const int64_t step = plane.heads_of_unit();
        for (int64_t head = 0; head < plane.num_heads; head += step) {
            const int64_t num_heads = std::min(step, plane.num_heads - head);
            const int64_t begin = head * plane.head_dim / kBlockChannels;
            const int64_t end = ((head + num_heads) * plane.head_dim + kBlockChannels - 1) / kBlockChannels;
            units.push_back({&plane, index, head, num_heads, first_block + begin, end - begin});
        }
        first_block += plane.num_blocks();
        ++index;
    }
    return units;
}

// Sorts the components of a tile's tokens.
class TileMaker {
  public:
    TileMaker(const SynthesisKernels& kernels, const SynthesisMatrix& matrix, TokenTile& tile)
        : kernels_(kernels), matrix_(matrix), tile_(tile), num_sections_(matrix.num_sections()) {}

    void make(const int32_t* components, int64_t stride, uint8_t* misfits) {
        const int64_t num_tokens = tile_.num_tokens;
        tile_.low.assign(num_tokens * matrix_.num_dense, 0);
        tile_.high.assign(num_tokens * matrix_.num_dense, 0);
        tile_.high_quads.assign(num_tokens, 0);
        tile_.corrections.assign(num_tokens, 0);
        tile_.row_starts.assign(num_sections_ * (num_tokens + 1), 0);
        tile_.rows.clear();
        num_units_.assign(num_tokens, 0);
        for (int64_t token = 0; token < num_tokens; ++token) {
            misfits[token] = !split_dense(components + token * stride, token);
        }
        for (int64_t section = 0; section < num_sections_; ++section) {
            uint32_t* const starts = tile_.row_starts.data() + section * (num_tokens + 1);
            for (int64_t token = 0; token < num_tokens; ++token) {
                starts[token] = static_cast<uint32_t>(tile_.rows.size() / kQuad);
                if (!list_sparse(components + token * stride, section, token)) misfits[token] = 1;
            }
            starts[num_tokens] = static_cast<uint32_t>(tile_.rows.size() / kQuad);
        }
    }

  private:
    // Returns false where a component has too many digits.
    bool split_dense(const int32_t* components, int64_t token) {
        const int64_t count = std::min(matrix_.num_dense, matrix_.num_components);
        int8_t* const low = tile_.low.data() + token * matrix_.num_dense;
        int8_t* const high = tile_.high.data() + token * matrix_.num_dense;
        int32_t smallest = 0, largest = 0;
        for (int64_t c = 0; c < count; ++c) {
            smallest = std::min(smallest, components[c]);
            largest = std::max(largest, components[c]);
        }
        if (smallest < -kMaxDense || largest > kMaxDense) return false;
        int32_t low_sum = 0, fine_low_sum = 0, units = 0;
        for (int64_t c = 0; c < count; ++c) {
            const int32_t digit = (components[c] + kMaxDigit) >> kDigitShift;
            const int32_t rest = components[c] - digit * (1 << kDigitShift);
            low[c] = static_cast<int8_t>(rest);
            low_sum += rest;
            units += std::abs(components[c]);
        }
        for (int64_t c = 0; c < std::min(count, matrix_.num_fine); ++c) fine_low_sum += low[c];
        uint32_t correction = kDenseBias * ((static_cast<uint32_t>(low_sum) << kFineShift) + fine_low_sum);
        if (smallest < -kMaxDigit || largest >= kMaxDigit) {
            int32_t high_sum = 0, fine_high_sum = 0;
            for (int64_t c = 0; c < count; ++c) {
                const int32_t digit = (components[c] + kMaxDigit) >> kDigitShift;
                high[c] = static_cast<int8_t>(digit);
                high_sum += digit;
                if (c < matrix_.num_fine) fine_high_sum += digit;
                if (digit != 0) tile_.high_quads[token] = static_cast<int32_t>(c / kQuad + 1);
            }
            correction +=
                kDenseBias * (((static_cast<uint32_t>(high_sum) << kFineShift) + fine_high_sum) << kDigitShift);
        }
        tile_.corrections[token] = static_cast<int32_t>(correction);
        num_units_[token] = units;
        return units <= kMaxUnits;
    }

    // Returns false where there are too many units.
    bool list_sparse(const int32_t* components, int64_t section, int64_t token) {
        const int64_t begin = matrix_.num_dense + section * kSectionComponents;
        const int64_t count = std::min(kSectionComponents, matrix_.num_components - begin);
        int num_positive = 0, num_negative = 0;
        for (int64_t first = 0; first < count; first += 32) {
            alignas(64) int32_t rest[32];
            const int32_t* part = components + begin + first;
            if (count - first < 32) {
                std::memset(rest, 0, sizeof rest);
                std::memcpy(rest, part, sizeof(int32_t) * (count - first));
                part = rest;
            }
            uint32_t large = kernels_.sort(part, first, positive_, &num_positive, negative_, &num_negative);
            if (std::max(num_positive, num_negative) > kMaxSectionUnits) return false;
            // As often as they have units.
            for (; large != 0; large &= large - 1) {
                const int lane = __builtin_ctz(large);
                const int64_t units = std::abs(int64_t{part[lane]}) - 1;
                int& num = part[lane] > 0 ? num_positive : num_negative;
                uint16_t* const target = part[lane] > 0 ? positive_ : negative_;
                if (units > kMaxSectionUnits - num) return false;
                for (int64_t i = 0; i < units; ++i) target[num++] = static_cast<uint16_t>((first + lane) * 64);
            }
        }
        tile_.corrections[token] =
            static_cast<int32_t>(static_cast<uint32_t>(tile_.corrections[token]) +
                                 (static_cast<uint32_t>(kSparseBias * (num_positive - num_negative)) << kSparseShift));
        num_units_[token] += num_positive + num_negative;
        constexpr uint16_t kZeros = kSectionComponents * 64;
        const int num_pairs = (std::max(num_positive, num_negative) + 1) / 2;
        for (int i = num_positive; i < 2 * num_pairs; ++i) positive_[i] = kZeros;
        for (int i = num_negative; i < 2 * num_pairs; ++i) negative_[i] = kZeros;
        const size_t size = tile_.rows.size();
        tile_.rows.resize(size + kQuad * num_pairs);
        uint16_t* const rows = tile_.rows.data() + size;
        for (int i = 0; i < num_pairs; ++i) {
            std::memcpy(rows + kQuad * i, positive_ + 2 * i, 4);
            std::memcpy(rows + kQuad * i + 2, negative_ + 2 * i, 4);
        }
        return num_units_[token] <= kMaxUnits;
    }

    const SynthesisKernels& kernels_;
    const SynthesisMatrix& matrix_;
    TokenTile& tile_;
    const int64_t num_sections_;
    std::vector<int64_t> num_units_;
    uint16_t positive_[kMaxSectionUnits + 33], negative_[kMaxSectionUnits + 33];
};

// Make the sums of all tiles and units, and let finish(unit, tile, its index, sums, their stride, row) do the rest; row
// has room as SynthesisKernels::finish wants it.
template <class Finish>
void synthesize_units(const SynthesisKernels& kernels, const SynthesisMatrix& matrix, const int32_t* components,
                      int64_t stride, int64_t num_tokens, const std::vector<SynthesisUnit>& units, int num_threads,
                      uint8_t* misfits, Finish&& finish) {
    const int64_t num_tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
    std::vector<TokenTile> tiles(num_tiles);
    parallel_for(num_tiles, num_threads, [&](int64_t index) {
        TokenTile& tile = tiles[index];
        tile.first_token = index * kTileTokens;
        tile.num_tokens = std::min(kTileTokens, num_tokens - tile.first_token);
        TileMaker(kernels, matrix, tile)
            .make(components + tile.first_token * stride, stride, misfits + tile.first_token);
    });
    const int64_t num_sections = matrix.num_sections();
    parallel_for(static_cast<int64_t>(units.size()), num_threads, [&](int64_t index) {
        thread_local Scratch scratch;
        const SynthesisUnit& unit = units[index];
        const int64_t width = unit.num_blocks * kBlockChannels;
        auto* const sums = reinterpret_cast<int32_t*>(scratch.reserve(4 * (kTileTokens + 2) * width));
        auto* const row = reinterpret_cast<float*>(sums + kTileTokens * width);
        for (int64_t t = 0; t < num_tiles; ++t) {
            const TokenTile& tile = tiles[t];
            for (int64_t i = 0; i < unit.num_blocks; ++i) {
                const int64_t block = unit.first_block + i;
                kernels.multiply_dense(matrix, block, tile, sums + i * kBlockChannels, width);
                for (int64_t section = 0; section < num_sections; ++section)
                    kernels.add_sparse(matrix.sparse + (block * num_sections + section) * kSectionRows * kBlockChannels,
                                       tile, tile.row_starts.data() + section * (tile.num_tokens + 1),
                                       sums + i * kBlockChannels, width);
            }
            finish(unit, tile, t, sums, width, row);
        }
    });
}

}  // namespace

void join_sizes(const std::vector<float>& largest, const std::vector<float>& sums, int64_t num_tiles, int64_t width,
                int64_t num_channels, ChannelSizes& sizes) {
    sizes.largest.assign(num_channels, 0.0f);
    sizes.sums.assign(num_channels, 0.0f);
    for (int64_t tile = 0; tile < num_tiles; ++tile)
        for (int64_t c = 0; c < num_channels; ++c) {
            sizes.largest[c] = std::max(sizes.largest[c], largest[tile * width + c]);
            sizes.sums[c] += sums[tile * width + c];
        }
}

void synthesize(const SynthesisKernels& kernels, const SynthesisMatrix& matrix, const int32_t* components,
                int64_t stride, int64_t num_tokens, const std::vector<SynthesisPlane>& planes, Dtype dtype,
                int num_threads, uint8_t* misfits) {
    synthesize_units(
        kernels, matrix, components, stride, num_tokens, list_units(planes), num_threads, misfits,
        [&](const SynthesisUnit& unit, const TokenTile& tile, int64_t, const int32_t* sums, int64_t width, float* row) {
            const int64_t first_channel = unit.first_block * kBlockChannels;
            kernels.finish(sums, width, tile, *unit.plane, unit.first_head, unit.num_heads,
                           matrix.factors + first_channel, matrix.means + first_channel, dtype, row);
        });
}

void measure_synthesis(const SynthesisKernels& kernels, const SynthesisMatrix& matrix, const int32_t* components,
                       int64_t stride, int64_t num_tokens, const std::vector<SynthesisPlane>& planes, Dtype dtype,
                       int num_threads, uint8_t* misfits, ChannelSizes& sizes, float* least, float* most) {
    const std::vector<SynthesisUnit> units = list_units(planes);
    std::vector<int64_t> first_channels;  // of the planes
    int64_t num_channels = 0;
    for (const SynthesisPlane& plane : planes) {
        first_channels.push_back(num_channels);
        num_channels += plane.num_heads * plane.head_dim;
    }
    constexpr int64_t kPadding = 8;
    const int64_t num_tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
    std::vector<float> largest(num_tiles * num_channels), sums_of_sizes(num_tiles * num_channels);
    std::vector<float> ranges(2 * num_tiles * units.size(), 0.0f);
    synthesize_units(kernels, matrix, components, stride, num_tokens, units, num_threads, misfits,
                     [&](const SynthesisUnit& unit, const TokenTile& tile, int64_t t, const int32_t* sums,
                         int64_t width, float* row) {
                         thread_local Scratch scratch;
                         const int64_t count = unit.num_channels(), first_block = unit.first_block * kBlockChannels;
                         auto* const decoded = reinterpret_cast<uint16_t*>(scratch.reserve(2 * kTileTokens * count));
                         SynthesisPlane target = *unit.plane;
                         target.values = decoded;
                         target.token_stride = count;
                         target.head_stride = unit.plane->head_dim;
                         target.first_head = unit.first_head;
                         target.first_token = tile.first_token;
                         target.is_read_soon = true;
                         kernels.finish(sums, width, tile, target, unit.first_head, unit.num_heads,
                                        matrix.factors + first_block, matrix.means + first_block, dtype, row);
                         std::vector<float> found(2 * (count + kPadding), 0.0f);
                         ErrorsOfUnit errors{found.data(), found.data() + count + kPadding};
                         kernels.compare(*unit.plane, unit.first_head, unit.num_heads, tile.first_token,
                                         tile.num_tokens, decoded, dtype, errors);
                         const int64_t place = t * num_channels + first_channels[unit.plane_index] +
                                               unit.first_head * unit.plane->head_dim;
                         std::copy(errors.largest, errors.largest + count, largest.begin() + place);
                         std::copy(errors.sums, errors.sums + count, sums_of_sizes.begin() + place);
                         const int64_t index = 2 * (t * static_cast<int64_t>(units.size()) + (&unit - units.data()));
                         ranges[index] = errors.least;
                         ranges[index + 1] = errors.most;
                     });
    join_sizes(largest, sums_of_sizes, num_tiles, num_channels, num_channels, sizes);
    *least = *most = 0;
    for (size_t i = 0; i < ranges.size(); i += 2) {
        *least = std::min(*least, ranges[i]);
        *most = std::max(*most, ranges[i + 1]);
    }
}

}  // namespace cachegen
