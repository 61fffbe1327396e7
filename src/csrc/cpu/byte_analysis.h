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
constexpr int kLowShift = 7;                   // a unit of low digits is a 128th
constexpr int64_t kMaxExcess = 1 << 22;        // of a token, in all
constexpr int64_t kGatherTokens = 64;          // whose rows one thread gathers
constexpr int64_t kMultiplyTokens = 96;        // whose sums of a block stay in the first-level cache

// A matrix as the kernels want it. The last block is filled up with zeros.
//
// A row of values is [bytes of all channels, filled up to whole quads][copies of some][low bytes of all, filled up].
// Channels with large entries are there several times, each with a part of the entry. The first components are finer:
// their entries and the values have a second digit, whose unit is a 128th. Their low entries are of whole rows: those
// of the bytes are low digits, those of the low bytes are the high digits once more.
struct ByteAnalysisMatrix {
    int64_t num_channels = 0;
    int64_t num_quads = 0;                     // of bytes and copies
    int64_t num_low_quads = 0;                 // of whole rows; 0 where no component is finer
    int64_t num_blocks = 0;                    // of 64 components
    int64_t num_fine = 0;                      // components, a multiple of 64, at most all
    const int8_t* entries = nullptr;           // [block][quad][64][4]
    const int8_t* low_entries = nullptr;       // [fine block][quad of whole rows][64][4]
    const float* scales = nullptr;             // [block][64]: what a unit of the sums is worth, in steps of level 1
    const int32_t* corrections = nullptr;      // [block][64]: what the bias adds to a sum
    const int32_t* low_corrections = nullptr;  // [fine block][64]

    int64_t stride() const { return kQuad * (num_fine != 0 ? num_low_quads : num_quads); }
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
    uint8_t* rows = nullptr;      // of the first token and of the plane's first channel
    uint8_t* low_rows = nullptr;  // the same of low bytes; null where there are none
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
    void (*multiply)(const uint8_t* rows, int64_t stride, int64_t num_tokens, int64_t num_quads, const int8_t* entries,
                     int64_t num_components, int32_t* sums);

    // Add to a token's sums of a block what an excess comes to; entries are those of its quad of channels.
    void (*add_excess)(const int8_t* entries, int place, int32_t units, int32_t* sums);

    // Return the sum of the squares of a token's integers.
    int64_t (*square)(const uint8_t* row, int64_t num_channels);

    // Round a token's sums of a block to the steps of all levels; a component that the level before has is refined by
    // at most 1. first: the block's first component, of which num_components are wanted.
    // low_sums: of low digits, less their corrections; or null.
    void (*round)(const int32_t* sums, const int32_t* low_sums, const float* scales, const int32_t* corrections,
                  int64_t first, int64_t num_components, int64_t token, const std::vector<LevelComponents>& levels);
};

// Fill rows uint8 [num_tokens][stride]; copies: the channels that are there once more, filled up to whole quads with
// -1. An excess of a copied channel is there for each of its places.
void gather_bytes(const ByteAnalysisKernels& kernels, const std::vector<SynthesisPlane>& planes, Dtype dtype,
                  int64_t num_tokens, const float* means, const float* inverses, const std::vector<int32_t>& copies,
                  bool has_low, uint8_t* rows, int64_t stride, int num_threads, ChannelSizes& sizes,
                  std::vector<Excess>& excess);

// Fill in the components of all levels. misfits: [num_tokens], set to 1 for tokens whose squares sum to more than
// max_square or whose excesses are too large, and to 0 for all others; the former's components are of no use.
void multiply_bytes(const ByteAnalysisKernels& kernels, const uint8_t* rows, int64_t num_tokens,
                    const std::vector<Excess>& excess, const ByteAnalysisMatrix& matrix, int64_t max_square,
                    const std::vector<LevelComponents>& levels, int num_threads, uint8_t* misfits);

// What ByteAnalysisMatrix points to.
struct PackedAnalysis {
    std::vector<int8_t> entries, low_entries;
    std::vector<float> units;  // of the components: what a unit of the sums is worth
    std::vector<int32_t> corrections, low_corrections;
};

// Round a matrix, analysis [num_components][num_channels]: of each component's entries times their channels' units,
// over the number of their places, the largest becomes kEntryLimit. copies as above.
PackedAnalysis pack_analysis(const float* analysis, int64_t num_channels, int64_t num_components,
                             const float* channel_units, const std::vector<int32_t>& copies, int64_t num_fine,
                             int num_threads);

}  // namespace cachegen
