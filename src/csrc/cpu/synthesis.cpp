#include "cpu/synthesis.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/stream_batch.h"

namespace cachegen {
namespace {

// Heads of a plane whose sums are made together: whole blocks.
struct Unit {
    const SynthesisPlane* plane;
    int64_t first_head;
    int64_t num_heads;
    int64_t first_block;
    int64_t num_blocks;
};

std::vector<Unit> list_units(const std::vector<SynthesisPlane>& planes) {
    std::vector<Unit> units;
    int64_t first_block = 0;
    for (const SynthesisPlane& plane : planes) {
        const int64_t step = plane.heads_of_unit();
        for (int64_t head = 0; head < plane.num_heads; head += step) {
            const int64_t num_heads = std::min(step, plane.num_heads - head);
            const int64_t begin = head * plane.head_dim / kBlockChannels;
            const int64_t end = ((head + num_heads) * plane.head_dim + kBlockChannels - 1) / kBlockChannels;
            units.push_back({&plane, head, num_heads, first_block + begin, end - begin});
        }
        first_block += plane.num_blocks();
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

}  // namespace

void synthesize(const SynthesisKernels& kernels, const SynthesisMatrix& matrix, const int32_t* components,
                int64_t stride, int64_t num_tokens, const std::vector<SynthesisPlane>& planes, Dtype dtype,
                int num_threads, uint8_t* misfits) {
    const int64_t num_tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
    std::vector<TokenTile> tiles(num_tiles);
    parallel_for(num_tiles, num_threads, [&](int64_t index) {
        TokenTile& tile = tiles[index];
        tile.first_token = index * kTileTokens;
        tile.num_tokens = std::min(kTileTokens, num_tokens - tile.first_token);
        TileMaker(kernels, matrix, tile)
            .make(components + tile.first_token * stride, stride, misfits + tile.first_token);
    });
    const std::vector<Unit> units = list_units(planes);
    const int64_t num_sections = matrix.num_sections();
    parallel_for(static_cast<int64_t>(units.size()), num_threads, [&](int64_t index) {
        thread_local Scratch scratch;
        const Unit& unit = units[index];
        const int64_t width = unit.num_blocks * kBlockChannels;
        auto* const sums = reinterpret_cast<int32_t*>(scratch.reserve(4 * (kTileTokens + 2) * width));
        auto* const row = reinterpret_cast<float*>(sums + kTileTokens * width);
        for (const TokenTile& tile : tiles) {
            for (int64_t i = 0; i < unit.num_blocks; ++i) {
                const int64_t block = unit.first_block + i;
                kernels.multiply_dense(matrix, block, tile, sums + i * kBlockChannels, width);
                for (int64_t section = 0; section < num_sections; ++section)
                    kernels.add_sparse(matrix.sparse + (block * num_sections + section) * kSectionRows * kBlockChannels,
                                       tile, tile.row_starts.data() + section * (tile.num_tokens + 1),
                                       sums + i * kBlockChannels, width);
            }
            const int64_t first_channel = unit.first_block * kBlockChannels;
            kernels.finish(sums, width, tile, *unit.plane, unit.first_head, unit.num_heads,
                           matrix.factors + first_channel, matrix.means + first_channel, dtype, row);
        }
    });
}

}  // namespace cachegen
