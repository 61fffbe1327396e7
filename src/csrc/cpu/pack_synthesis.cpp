#include "cpu/pack_synthesis.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "cpu/parallel.h"

namespace cachegen {
namespace {

constexpr int kNumChoices = std::size(kFineChoices);
constexpr int kDenseLimit = 126, kSparseLimit = 63, kFineLimit = 127;
constexpr float kFineUnits = 1 << kFineShift;
// 1.5 * 2^23: adding it rounds to an integer, and subtracting it leaves that.
constexpr float kRounder = 12582912.0f;

float rounded(float value) { return (value + kRounder) - kRounder; }

// Channels of one plane that are packed together.
struct Block {
    int64_t first_channel;
    int64_t num_channels;
};

std::vector<Block> list_blocks(const std::vector<int64_t>& plane_channels) {
    std::vector<Block> blocks;
    int64_t first = 0;
    for (const int64_t width : plane_channels) {
        for (int64_t done = 0; done < width; done += kBlockChannels)
            blocks.push_back({first + done, std::min(kBlockChannels, width - done)});
        first += width;
    }
    return blocks;
}

// The place of a channel's byte in a sparse row.
int64_t sparse_place(int64_t channel) {
    constexpr int64_t kPlaces[] = {0, 2, 1, 3};
    return 4 * (channel % 16) + kPlaces[channel / 16];
}

class BlockPacker {
  public:
    BlockPacker(const SynthesisRows& rows, const Block& block)
        : rows_(rows), block_(block), values_(rows.num_components * kBlockChannels, 0.0f) {
        for (int64_t k = 0; k < rows.num_components; ++k) read_row(k);
        float largest[kBlockChannels] = {};
        for (int64_t k = 0; k < rows.num_components; ++k) {
            const float* const row = row_of(k);
            for (int64_t c = 0; c < kBlockChannels; ++c) largest[c] = std::max(largest[c], std::fabs(row[c]));
        }
        for (int64_t c = 0; c < kBlockChannels; ++c) {
            unit_[c] = largest[c] > 0 ? largest[c] / kDenseLimit : 1.0f;
            inverse_[c] = 1.0f / unit_[c];
            // Of a channel that is next to nothing.
            if (!std::isfinite(inverse_[c])) inverse_[c] = 0;
        }
    }

    // Pack the rows but the fine ones. shares: of each choice of fine rows, summed over channels.
    void pack(uint8_t* dense, uint8_t* sparse, double shares[kNumChoices]) const {
        // errors[i]: of the components between two choices.
        float explained[kBlockChannels] = {}, lost[kBlockChannels] = {};
        float errors[kNumChoices][kBlockChannels] = {}, sparse_error[kBlockChannels] = {};
        const float most = rows_.step * rows_.step / 12;
        int choice = 0;
        for (int64_t k = 0; k < rows_.num_components; ++k) {
            const float* const row = row_of(k);
            const float power = rows_.powers[k], quantized = std::min(power, most);
            for (int64_t c = 0; c < kBlockChannels; ++c) {
                explained[c] += row[c] * row[c] * power;
                lost[c] += row[c] * row[c] * quantized;
            }
            while (choice + 1 < kNumChoices && k >= kFineChoices[choice + 1]) ++choice;
            float scaled[kBlockChannels];
            for (int64_t c = 0; c < kBlockChannels; ++c) scaled[c] = row[c] * inverse_[c];
            if (k < rows_.num_dense) {
                uint8_t* const bytes = dense + k / kQuad * kQuad * kBlockChannels + k % kQuad;
                for (int64_t c = 0; c < kBlockChannels; ++c) {
                    const float integer = rounded(scaled[c]), error = scaled[c] - integer;
                    errors[choice][c] += error * error * power;
                    bytes[kQuad * c] = static_cast<uint8_t>(static_cast<int>(integer) + kDenseBias);
                }
                continue;
            }
            const int64_t place = k - rows_.num_dense;
            uint8_t* const bytes =
                sparse + (place / kSectionComponents * kSectionRows + place % kSectionComponents) * kBlockChannels;
            uint8_t ordered[kBlockChannels];
            for (int64_t c = 0; c < kBlockChannels; ++c) {
                const float integer = rounded(scaled[c] * 0.5f), error = scaled[c] - 2 * integer;
                sparse_error[c] += error * error * power;
                ordered[c] = static_cast<uint8_t>(static_cast<int>(integer) + kSparseBias);
            }
            for (int64_t c = 0; c < kBlockChannels; ++c) bytes[sparse_place(c)] = ordered[c];
        }
        for (int64_t c = 0; c < block_.num_channels; ++c) {
            double error = sparse_error[c];
            for (int i = kNumChoices - 1; i >= 0; --i) {
                error += errors[i][c];
                // What is not coded is lost altogether.
                const float variance = rows_.variances[block_.first_channel + c];
                const float all_lost = lost[c] + std::max(variance - explained[c], 0.0f);
                if (all_lost > 0) shares[i] += error * unit_[c] * unit_[c] / all_lost;
            }
        }
    }

    void pack_fine(uint8_t* fine, int64_t num_fine) const {
        for (int64_t k = 0; k < num_fine; ++k) {
            uint8_t* const bytes = fine + k / kQuad * kQuad * kBlockChannels + k % kQuad;
            for (int64_t c = 0; c < kBlockChannels; ++c) {
                float rest = 0;
                if (k < rows_.num_components) {
                    const float scaled = row_of(k)[c] * inverse_[c];
                    rest = rounded((scaled - rounded(scaled)) * kFineUnits);
                }
                const float within = std::min<float>(std::max<float>(rest, -kFineLimit), kFineLimit);
                bytes[kQuad * c] = static_cast<uint8_t>(static_cast<int>(within) + kDenseBias);
            }
        }
    }

    void scale(float* factors, float* means) const {
        for (int64_t c = 0; c < block_.num_channels; ++c) {
            factors[c] = unit_[c] * rows_.step / kFineUnits;
            means[c] = rows_.means[block_.first_channel + c];
        }
    }

  private:
    // What is behind the block's last channel stays zero.
    void read_row(int64_t k) {
        float* const row = values_.data() + k * kBlockChannels;
        const int64_t begin = k * rows_.num_channels + block_.first_channel;
        const float* const of_channels = rows_.channel_factors + block_.first_channel;
        for (int64_t c = 0; c < block_.num_channels; ++c)
            row[c] = static_cast<float>(rows_.integers[begin + c]) * rows_.row_factors[k] * of_channels[c];
    }

    const float* row_of(int64_t k) const { return values_.data() + k * kBlockChannels; }

    const SynthesisRows& rows_;
    const Block& block_;
    std::vector<float> values_;
    float unit_[kBlockChannels], inverse_[kBlockChannels];
};

}  // namespace

PackedSynthesis pack_synthesis(const SynthesisRows& rows, const std::vector<int64_t>& plane_channels, double max_share,
                               int num_threads) {
    const std::vector<Block> blocks = list_blocks(plane_channels);
    const auto num_blocks = static_cast<int64_t>(blocks.size());
    SynthesisMatrix sizes;
    sizes.num_components = rows.num_components;
    sizes.num_dense = rows.num_dense;
    const int64_t num_sections = sizes.num_sections();
    PackedSynthesis packed;
    const int64_t dense_bytes = rows.num_dense * kBlockChannels;
    const int64_t sparse_bytes = num_sections * kSectionRows * kBlockChannels;
    // What is behind the last component stands for nothing: with its bias in dense rows, which are always multiplied.
    packed.dense.assign(num_blocks * dense_bytes, kDenseBias);
    packed.sparse.assign(num_blocks * sparse_bytes, 0);
    packed.factors.assign(num_blocks * kBlockChannels, 0.0f);
    packed.means.assign(num_blocks * kBlockChannels, 0.0f);
    std::vector<double> shares(num_blocks * kNumChoices, 0.0);
    // As many as any choice has: rows are read once.
    const int64_t most_fine = std::min(kFineChoices[kNumChoices - 1], rows.num_dense);
    std::vector<uint8_t> fine(num_blocks * most_fine * kBlockChannels);
    parallel_for(num_blocks, num_threads, [&](int64_t i) {
        const BlockPacker packer(rows, blocks[i]);
        packer.pack(packed.dense.data() + i * dense_bytes, packed.sparse.data() + i * sparse_bytes,
                    shares.data() + i * kNumChoices);
        packer.pack_fine(fine.data() + i * most_fine * kBlockChannels, most_fine);
        packer.scale(packed.factors.data() + i * kBlockChannels, packed.means.data() + i * kBlockChannels);
    });
    for (int choice = 0; choice < kNumChoices; ++choice) {
        packed.num_fine = std::min(kFineChoices[choice], rows.num_dense);
        packed.share = 0;
        for (int64_t i = 0; i < num_blocks; ++i) packed.share += shares[i * kNumChoices + choice];
        packed.share /= static_cast<double>(std::max<int64_t>(rows.num_channels, 1));
        if (packed.share <= max_share || packed.num_fine == rows.num_dense) break;
    }
    packed.fine.reserve(num_blocks * packed.num_fine * kBlockChannels);
    for (int64_t i = 0; i < num_blocks; ++i) {
        const auto first = fine.begin() + i * most_fine * kBlockChannels;
        packed.fine.insert(packed.fine.end(), first, first + packed.num_fine * kBlockChannels);
    }
    return packed;
}

}  // namespace cachegen
