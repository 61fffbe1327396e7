// The planes of a chunk and their streams, and the coding of one stream in portable C++.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/rans_portable.h"
#include "quantization.h"

namespace cachegen {

// One plane, a layer's keys or values: a tensor [num_tokens, num_heads, head_dim] in the caller's memory, the last
// dimension contiguous, and how it is quantized and coded.
struct Plane {
    uint8_t* values = nullptr;
    int64_t token_stride = 0;  // in elements
    int64_t head_stride = 0;
    int64_t num_heads = 0;
    int64_t head_dim = 0;
    uint8_t* scales = nullptr;  // [num_tokens], the cache's dtype
    int num_bins = 0;
    int64_t tokens_per_stream = 0;  // a multiple of 32
    PlaneCoding coding;

    int64_t num_channels() const { return num_heads * head_dim; }
};

// One stream of a chunk: which tokens of which plane, and where its bytes are.
struct StreamRef {
    int64_t plane = 0;
    int64_t first_token = 0;
    StreamShape shape{};
    int64_t offset = 0;  // bytes from the start of the payload
    uint32_t num_bytes = 0;
    uint32_t num_words = 0;
};

// The streams of planes, plane by plane and token by token: the order of the chunk's index.
inline std::vector<StreamRef> list_streams(const std::vector<Plane>& planes, int64_t num_tokens) {
    std::vector<StreamRef> streams;
    for (size_t plane = 0; plane < planes.size(); ++plane) {
        const int64_t step = planes[plane].tokens_per_stream;
        for (int64_t first = 0; first < num_tokens; first += step) {
            StreamRef stream;
            stream.plane = static_cast<int64_t>(plane);
            stream.first_token = first;
            stream.shape = {std::min(step, num_tokens - first), planes[plane].num_channels()};
            streams.push_back(stream);
        }
    }
    return streams;
}

// Quantize and encode one stream, whatever its coder, and append it to `output`; fills in the stream's sizes.
//
// The scales must be those of CpuKernels::measure_plane: where a value lies outside its token's, which happens only
// when the cache changed in between, it gives Status::kNotFinite.
Status encode_plane_stream(const Plane& plane, Dtype dtype, StreamRef& stream, StreamWorkspace& workspace,
                           std::vector<uint8_t>& output);

// Decode one stream into the cache.
Status decode_plane_stream(const Plane& plane, Dtype dtype, const StreamRef& stream, const uint8_t* payload,
                           StreamWorkspace& workspace);

}  // namespace cachegen
