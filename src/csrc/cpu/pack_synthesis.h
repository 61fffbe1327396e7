// A synthesis matrix of floats as the bytes that synthesis.h multiplies, and what rounding it loses.

#pragma once

#include <cstdint>
#include <vector>

#include "cpu/synthesis.h"

namespace cachegen {

// How many of the first components may have fine rows.
constexpr int64_t kFineChoices[] = {0, 4, 8, 16, 32, 64, 128};

// What is to be packed: the rows of the components that are coded, synthesis [num_components][num_channels], with the
// squares of their deviations, and for each channel its mean and the variance that all components have together. The
// matrix is integers times a power of two for each row and one for each channel, as a profile has it.
struct SynthesisRows {
    const int16_t* integers = nullptr;
    const float* row_factors = nullptr;
    const float* channel_factors = nullptr;
    const float* powers = nullptr;
    const float* means = nullptr;
    const float* variances = nullptr;
    int64_t num_channels = 0;
    int64_t num_components = 0;
    int64_t num_dense = 0;  // a multiple of 4, below num_components + 4
    float step = 0;
};

// What SynthesisMatrix points to.
struct PackedSynthesis {
    std::vector<uint8_t> dense, fine, sparse;
    std::vector<float> factors, means;
    int64_t num_fine = 0;
    double share = 0;  // of the error of quantizing, that rounding adds: the mean over channels
};

// Round each channel by a unit of its own. Of the first components as many get fine rows as the share needs to be at
// most max_share; if none does, it stays above it.
PackedSynthesis pack_synthesis(const SynthesisRows& rows, const std::vector<int64_t>& plane_channels, double max_share,
                               int num_threads);

}  // namespace cachegen
