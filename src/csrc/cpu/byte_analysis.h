// The forward transform in bytes: values of a cache, their rotations undone, less their means, as integers of seven
// bits in units of their channel's; their products with an analysis matrix of bytes; and these, rounded to steps.
//
// All sums are of integers, so that AVX2 and AVX-512 find the same components, whatever the order of additions. A byte
// is unsigned: an integer plus kByteBias, so that two products of a byte and an entry fit 16 bits. What is beyond an
// integer of seven bits is kept apart, as an excess, and its product is added to the sums.

#pragma once

#include <cstdint>
#include <vector>

#include "component_streams.h"
#include "cpu/analysis.h"
#include "cpu/synthesis.h"
#include "quantization.h"

namespace cachegen {

constexpr int32_t kByteBias = 64;
constexpr int32_t kMaxInteger = 63, kMinInteger = -64;
constexpr int kEntryLimit = 127;
constexpr int64_t kMaxByteChannels = 1 << 16;  // sums of so many products fit 32 bits, with kMaxExcess entries more
constexpr int64_t kMaxExcess = 1 << 22;        // of a token, in all
constexpr int64_t kGatherTokens = 64;          // whose rows one thread gathers
constexpr int64_t kMultiplyTokens = 96;        // whose sums of a block stay in the first-level cache

// A matrix as the kernels want it. The last block is filled up with zeros, and so is the last quad of channels.
struct ByteAnalysisMatrix {
    int64_t num_quads = 0;                 // of channels
    int64_t num_blocks = 0;                // of 64 components
    const int8_t* entries = nullptr;       // [block][quad][64][4]
    const float* scales = nullptr;         // [block][64]: what a unit of the sums is worth, in steps of the first level
    const int32_t* corrections = nullptr;  // [block][64]: what the bias adds to a sum
};

// What an integer of seven bits lacks of a value.
struct Excess {
    int32_t token;
    int32_t channel;
    int32_t units;
};

// Where components of a level go, and how many of them: int32 [num_tokens][num_components], in steps that are the
// first level's over `ratio`.
struct LevelComponents {
    float ratio = 1.0f;
    int64_t num_components = 0;
    int32_t* components = nullptr;
};

// Where the values of one plane go.
struct ByteRows {
    uint8_t* rows = nullptr;  // of the first token and of the plane's first channel
    int64_t stride = 0;
    const float* means = nullptr;     // of the plane's first channel, and so are the others
    const float* inverses = nullptr;  // of the channels' units
    float* largest = nullptr;
    float* sums = nullptr;
    int32_t first_channel = 0;
    std::vector<Excess>* excess = nullptr;
};

// What a path does in its own way.
struct ByteAnalysisKernels {
    // Gather some tokens of a plane. means, inverses, largest and sums have room for 8 channels more than the plane
    // has.
    void (*gather)(const SynthesisPlane& plane, Dtype dtype, int64_t first_token, int64_t num_tokens,
                   const ByteRows& target);

    // Fill sums [num_tokens][64] of a block, of which the first num_components are wanted, 1 to 64.
    void (*multiply)(const uint8_t* rows, int64_t num_tokens, int64_t num_quads, const int8_t* entries,
                     int64_t num_components, int32_t* sums);

    // Return the sum of the squares of a token's integers.
    int64_t (*square)(const uint8_t* row, int64_t num_channels);

    // Round a token's sums of a block to the steps of all levels; a component that the level before has is refined by
    // at most 1. first: the block's first component, of which num_components are wanted.
    void (*round)(const int32_t* sums, const float* scales, const int32_t* corrections, int64_t first,
                  int64_t num_components, int64_t token, const std::vector<LevelComponents>& levels);
};

// Fill rows uint8 [num_tokens][4 num_quads], means and inverses being of all channels.
void gather_bytes(const ByteAnalysisKernels& kernels, const std::vector<SynthesisPlane>& planes, Dtype dtype,
                  int64_t num_tokens, const float* means, const float* inverses, uint8_t* rows, int64_t stride,
                  int num_threads, ChannelSizes& sizes, std::vector<Excess>& excess);

// Fill in the components of all levels. misfits: [num_tokens], set to 1 for tokens whose squares sum to more than
// max_square or whose excesses are too large, and to 0 for all others; the former's components are of no use.
void multiply_bytes(const ByteAnalysisKernels& kernels, const uint8_t* rows, int64_t num_tokens,
                    const std::vector<Excess>& excess, const ByteAnalysisMatrix& matrix, int64_t max_square,
                    const std::vector<LevelComponents>& levels, int num_threads, uint8_t* misfits);

// An analysis matrix, float32 with the components of a channel side by side, in bytes.
struct PackedAnalysis {
    std::vector<int8_t> entries;
    std::vector<float> units;  // of the components: what a unit of the sums is worth
    std::vector<int32_t> corrections;
};

// Round a matrix, analysis [num_components][num_channels]: of each component's entries times their channels' units,
// the largest becomes kEntryLimit.
PackedAnalysis pack_analysis(const float* analysis, int64_t num_channels, int64_t num_components,
                             const float* channel_units, int num_threads);

}  // namespace cachegen
