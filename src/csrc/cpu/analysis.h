// The forward transform's passes over a cache: its values with their rotations undone, less their means, as rows of a
// matrix; the product with an analysis matrix in bf16; and what decoded values miss the cache's by.
//
// An encoder's floats need not be those of any other: what it makes of them are integers, which travel.

#pragma once

#include <cstdint>
#include <vector>

#include "cpu/synthesis.h"
#include "quantization.h"

namespace cachegen {

constexpr int64_t kAnalysisComponents = 64;  // whose sums stay in registers

// Whether this processor runs the first and the last of these functions, and the one between.
bool can_gather();
bool can_multiply_bf16();

// Fill rows [num_tokens][stride] with values less their means, fp32 or bf16. A plane's `values` are read here; its
// cosines and sines are those that undo: divided by the attention scaling.
void gather_rows(const std::vector<SynthesisPlane>& planes, Dtype dtype, int64_t num_tokens, const float* means,
                 bool is_bf16, void* rows, int64_t stride, int num_threads, ChannelSizes& sizes);

// Fill components fp32 [num_tokens][64 num_blocks] with rows bf16 [num_tokens][2 num_pairs] times a matrix bf16
// [num_blocks][num_pairs][64][2].
void multiply_bf16(const uint16_t* rows, int64_t num_tokens, int64_t num_pairs, const uint16_t* matrix,
                   int64_t num_blocks, float* components, int num_threads);

// Compare planes with what they decode to, [num_tokens][channels of all planes] of their dtype. Returns the decoded
// values' range in `least` and `most`.
void measure_errors(const std::vector<SynthesisPlane>& planes, Dtype dtype, int64_t num_tokens, const uint16_t* decoded,
                    int num_threads, ChannelSizes& sizes, float* least, float* most);

}  // namespace cachegen
