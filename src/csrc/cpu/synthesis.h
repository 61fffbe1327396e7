// The inverse transform in integers: quantized components times a matrix of bytes, turned by their positions, as values
// of the cache.
//
// A component is dense or sparse. Dense ones, the first, are mostly not zero: four of them at a time are multiplied
// with their rows. Of sparse ones, mostly zero, the rows of those that are not are added, one row for each unit. All
// sums are of integers, so that every path gives the same values, and no order of additions matters.
//
// Bytes are unsigned: entries of dense rows are integers within kDenseLimit of 0, plus kDenseBias; of sparse rows
// within kSparseLimit, plus kSparseBias, and a unit of theirs is two of the dense rows'. The first components may have
// fine rows, whose unit is a 256th. What the biases add is the same in all channels of a token, and is taken off at the
// end.

#pragma once

#include <cstdint>
#include <vector>

#include "quantization.h"

namespace cachegen {

constexpr int64_t kBlockChannels = 64;  // channels whose sums stay in registers; a block is of one plane
constexpr int64_t kSectionRows = 512;   // sparse rows of a block that stay in the first-level cache: 32 KiB
constexpr int64_t kSectionComponents = kSectionRows - 1;  // the last row of a section is zeros
constexpr int64_t kTileTokens = 126;                      // tokens whose sums stay in the second-level cache
constexpr int kQuad = 4;                                  // components that one instruction multiplies

constexpr int kDenseBias = 128, kSparseBias = 64;
constexpr int kFineShift = 8;    // sums are in units of fine rows
constexpr int kSparseShift = 9;  // of sparse rows, to the same
constexpr int kDigitShift = 7;   // a component is 128 high + low
constexpr int kMaxDigit = 64;    // products of two bytes and digits so large still fit 16 bits in pairs
constexpr int32_t kMaxDense = (kMaxDigit << kDigitShift) - kMaxDigit;
constexpr int64_t kMaxSectionUnits = 1023;  // of either sign, of a token
constexpr int64_t kRunQuads = 127;          // sums of the entries of so many quads of rows fit 16 bits
constexpr int64_t kMaxUnits = 60000;        // sums of so many entries fit 32 bits

// A plane of the output: [num_tokens, num_heads, head_dim] of 16-bit values, strides in elements; and how its heads are
// turned: pair j of dims by the angle whose cosine and sine are [token][j]. Pairs are dims offset + j and
// offset + num_pairs + j or, interleaved, offset + 2j and offset + 2j + 1. num_pairs may be 0.
struct SynthesisPlane {
    uint16_t* values = nullptr;
    int64_t token_stride = 0;
    int64_t head_stride = 0;
    int64_t num_heads = 0;
    int64_t head_dim = 0;
    const float* cosines = nullptr;
    const float* sines = nullptr;
    int64_t num_pairs = 0;
    int64_t offset = 0;
    bool is_interleaved = false;
    int64_t first_head = 0, first_token = 0;  // of the values; angles are of all tokens
    bool is_read_soon = false;                // the values are best kept in the caches

    int64_t num_blocks() const { return (num_heads * head_dim + kBlockChannels - 1) / kBlockChannels; }
    // The fewest heads that are whole blocks, or all.
    int64_t heads_of_unit() const {
        if (head_dim % kBlockChannels == 0) return 1;
        const int64_t heads = kBlockChannels % head_dim == 0 ? kBlockChannels / head_dim : num_heads;
        return heads < num_heads ? heads : num_heads;
    }
};

// A matrix as the kernels want it. Blocks follow each other, plane by plane; the last block of a plane is filled up.
struct SynthesisMatrix {
    int64_t num_components = 0;
    int64_t num_dense = 0;            // a multiple of 4
    int64_t num_fine = 0;             // a multiple of 4, at most num_dense
    const uint8_t* dense = nullptr;   // [block][num_dense / 4][channel][4]
    const uint8_t* fine = nullptr;    // [block][num_fine / 4][channel][4]
    const uint8_t* sparse = nullptr;  // [block][section][row][channel]: byte 4i + b is channel 16 v + i, v = 0, 2, 1, 3
    const float* factors = nullptr;   // [block][channel]: what a unit of the sums is worth
    const float* means = nullptr;     // [block][channel]

    int64_t num_sections() const {
        const int64_t num_sparse = num_components > num_dense ? num_components - num_dense : 0;
        return (num_sparse + kSectionComponents - 1) / kSectionComponents;
    }
};

// A tile of tokens: their components as the kernels want them.
struct TokenTile {
    int64_t first_token = 0;
    int64_t num_tokens = 0;
    std::vector<int8_t> low, high;     // [token][num_dense]: the digits of dense components
    std::vector<int32_t> high_quads;   // per token, behind which quad all high digits are zero
    std::vector<uint16_t> rows;        // byte offsets in a section, by fours: two to be added, two to be subtracted
    std::vector<uint32_t> row_starts;  // [section][token + 1], in fours
    std::vector<int32_t> corrections;  // per token, what the biases add to every sum
};

// What is known of each channel of some tokens: the largest size and the sum of all sizes, of differences from the mean
// or of errors.
struct ChannelSizes {
    std::vector<float> largest, sums;
};

// What decoded values of some heads miss those of the cache by, per channel; each array has room for 8 channels more.
struct ErrorsOfUnit {
    float* largest;
    float* sums;
    float least = 0, most = 0;
};

// What a path does in its own way.
struct SynthesisKernels {
    // Append 64 times the places of 32 components, `first` and on, to a list of those above 0 and one of those below;
    // both have room for 32 more. Returns which are beyond 1 and -1.
    uint32_t (*sort)(const int32_t* components, int64_t first, uint16_t* positive, int* num_positive,
                     uint16_t* negative, int* num_negative);

    // Fill sums [token][stride] of a block with the dense components' part.
    void (*multiply_dense)(const SynthesisMatrix& matrix, int64_t block, const TokenTile& tile, int32_t* sums,
                           int64_t stride);

    // Add the sparse components of a section.
    void (*add_sparse)(const uint8_t* section, const TokenTile& tile, const uint32_t* row_starts, int32_t* sums,
                       int64_t stride);

    // Turn sums into values of heads. factors and means are of the first head's first channel; row has room for as many
    // floats as the heads have channels, and 16 more.
    void (*finish)(const int32_t* sums, int64_t stride, const TokenTile& tile, const SynthesisPlane& plane,
                   int64_t first_head, int64_t num_heads, const float* factors, const float* means, Dtype dtype,
                   float* row);

    // Compare heads of a plane with decoded values [num_tokens][channels of these heads], and add what is found.
    void (*compare)(const SynthesisPlane& plane, int64_t first_head, int64_t num_heads, int64_t first_token,
                    int64_t num_tokens, const uint16_t* decoded, Dtype dtype, ErrorsOfUnit& errors);
};

// Join what is known of tiles of tokens, [num_tiles][width], in their order.
void join_sizes(const std::vector<float>& largest, const std::vector<float>& sums, int64_t num_tiles, int64_t width,
                int64_t num_channels, ChannelSizes& sizes);

// Heads of a plane whose sums are made together: whole blocks.
struct SynthesisUnit {
    const SynthesisPlane* plane;
    int64_t plane_index;
    int64_t first_head;
    int64_t num_heads;
    int64_t first_block;
    int64_t num_blocks;

    int64_t num_channels() const { return num_heads * plane->head_dim; }
};

// Write the values of tokens.
//
// components: [num_tokens][stride], of which the first num_components are read. misfits: [num_tokens], set to 1 for
// tokens whose components are beyond what the sums hold, and to 0 for all others; what is written for the former is of
// no use.
void synthesize(const SynthesisKernels& kernels, const SynthesisMatrix& matrix, const int32_t* components,
                int64_t stride, int64_t num_tokens, const std::vector<SynthesisPlane>& planes, Dtype dtype,
                int num_threads, uint8_t* misfits);

// Compare planes, whose values are read, with what components stand for, which is not kept. Fills in the sizes of the
// errors in each channel, and the least and the greatest decoded value, or 0. The other arguments are as above. What
// is found counts misfits, too, and is of no use where there are any.
void measure_synthesis(const SynthesisKernels& kernels, const SynthesisMatrix& matrix, const int32_t* components,
                       int64_t stride, int64_t num_tokens, const std::vector<SynthesisPlane>& planes, Dtype dtype,
                       int num_threads, uint8_t* misfits, ChannelSizes& sizes, float* least, float* most);

}  // namespace cachegen
