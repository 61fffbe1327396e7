// The coder of method `lossless`: every value's bits, given a prediction from values that are decoded before it.
//
// Everything here is integer arithmetic, so that all machines predict, and therefore decode, the same. docs/lossless.md
// describes the steps and the bytes.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "quantization.h"
#include "rans.h"

namespace cachegen::lossless {

constexpr int64_t kBlockTokens = 256;  // of a stream: tokens do not predict each other
constexpr int kNumLanes = 16;          // rANS states of a stream; token t has lane t % 16
constexpr int kNumSymbols = 64;        // steps from the prediction: -31 to 31, and the escape
constexpr int kEscape = 63;
constexpr int64_t kMaxContext = 4096;  // channels that a prediction uses; with kMaxHistory its sum fits 31 bits
constexpr int32_t kMaxHistory = 4096;
constexpr int kMaxStep = 1023;  // so that a step's positions have frequencies of at least 1 in 4096

// How one channel is coded. A value v counts floor(|v| 2^exponent) units, with its sign.
struct Channel {
    int32_t mean;        // in units, the rotation undone
    int32_t multiplier;  // of the weighted sum of the context
    int shift;           // the product's
    int exponent;
    int history_shift;  // from units to what predicts other channels
    int step;           // units
    int64_t distance;   // to the second channel of its rotated pair; 0: it is in no pair; -1: it is a second one
    int64_t turn;       // of the pair, in `Model::turns`
};

// A layer's keys and values.
struct Layer {
    int64_t first_channel;  // in the order of layers, keys before values
    int64_t num_channels;
    int64_t context_begin;  // the first channel that predicts; the last one is the one before the predicted
    const int8_t* weights;  // [num_channels][first_channel - context_begin + num_channels]; null: none
    int64_t num_key_channels;
    const uint16_t* frequencies;  // [2][64], of keys and values
};

struct Model {
    std::vector<Channel> channels;
    std::vector<Layer> layers;
    std::vector<uint64_t> turns;  // rotations of pairs from token to token, in 2^-64 turns
    bool is_float16;              // else bfloat16
};

// A chunk's values [num_tokens][num_channels], bits of the dtype.
struct Values {
    uint16_t* bits;
    int64_t num_tokens;
    int64_t num_channels;
    int64_t first_token;
};

inline int64_t num_blocks(int64_t num_tokens) { return (num_tokens + kBlockTokens - 1) / kBlockTokens; }

// Encode one chunk: for each block of tokens a stream per layer.
void encode(const Model& model, const Values& values, int num_threads, std::vector<std::vector<uint8_t>>& streams);

// Count the symbols of a chunk: counts [num_layers][2][64] are added to.
void count(const Model& model, const Values& values, uint32_t* counts);

// What became of decoding: the first stream that failed, if one did.
struct Outcome {
    int64_t stream;
    Status status;
};
Outcome decode(const Model& model, const std::vector<std::pair<const uint8_t*, int64_t>>& streams, int num_threads,
               Values& values);

}  // namespace cachegen::lossless
