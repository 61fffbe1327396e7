// Measuring, encoding and decoding the streams of a chunk, whatever its dtype: what the bindings call. The kernels
// that these choose from are compiled apart from the bindings, which need no optimization and take long with it.

#pragma once

#include <cstdint>
#include <vector>

#include "cpu/components.h"
#include "cpu/cpu_kernels.h"
#include "cpu/decode_components.h"
#include "cpu/encode_components.h"
#include "cpu/encode_planes.h"
#include "cpu/planes.h"
#include "quantization.h"
#include "stream_layout.h"

namespace cachegen {

// The first of several that went wrong.
struct Failure {
    int64_t index = -1;
    Status status = Status::kOk;
};

// Fill the planes' scales and count symbols.
//
// counts: zeros [sum of channels][32]. bad_tokens: per plane, the first token that is not finite, or -1.
void measure_chunk(const std::vector<Plane>& planes, Dtype dtype, int64_t num_tokens, int num_threads,
                   const CpuKernels& kernels, uint32_t* counts, std::vector<int64_t>& bad_tokens);

// Quantize and encode all planes.
EncodedStreams encode_chunk(const std::vector<Plane>& planes, Dtype dtype, const std::vector<StreamRef>& streams,
                            int num_threads, const CpuKernels& kernels);

// Copy the streams to where they begin in a payload, and free them.
void join_streams(EncodedStreams& encoded, const std::vector<int64_t>& offsets, int num_threads, uint8_t* payload);

// Decode all planes from a payload, within which the streams must lie.
Failure decode_chunk(const std::vector<Plane>& planes, Dtype dtype, const std::vector<StreamRef>& streams,
                     int64_t num_tokens, const uint8_t* payload, int64_t payload_bytes, int num_threads,
                     const CpuKernels& kernels);

// The checksums of parts of a payload: part i begins at offsets[i] and ends where the next begins.
void checksum_parts(const uint8_t* payload, const std::vector<int64_t>& offsets, int num_threads, uint32_t* checksums);

// The values of tokens in memory: [num_tokens][num_heads][head_bytes], strides in bytes.
struct TokenBytes {
    const uint8_t* values;
    int64_t token_stride;
    int64_t head_stride;
    int64_t num_heads;
    int64_t head_bytes;
};

// The checksums of the planes' values, token after token, in blocks of tokens: [num_planes][num_blocks].
void checksum_tokens(const std::vector<TokenBytes>& planes, int64_t num_tokens, int64_t tokens_per_block,
                     int num_threads, uint32_t* checksums);

// How many blocks; a plane without tokens has an empty one.
inline int64_t count_blocks(int64_t num_tokens, int64_t tokens_per_block) {
    return num_tokens == 0 ? 1 : (num_tokens + tokens_per_block - 1) / tokens_per_block;
}

// Encode one stream of symbols [num_channels][num_tokens], appending it to `output`.
Status encode_symbol_stream(const uint16_t* symbols, const StreamShape& shape, const PlaneCoding& coding,
                            std::vector<uint8_t>& output, uint32_t* num_words);

// The inverse.
Status decode_symbol_stream(const uint8_t* bytes, int64_t num_bytes, uint32_t num_words, const StreamShape& shape,
                            const PlaneCoding& coding, uint16_t* symbols);

// Encode the components of one group of layers at one level; `coarse` has the level before's.
EncodedStreams encode_component_streams(const ComponentRows<const int32_t>& fine,
                                        const ComponentRows<const int32_t>& coarse, const ComponentCoding& coding,
                                        int64_t tokens_per_stream, int num_threads, const CpuKernels& kernels);

// Decode the components of groups, in place.
Failure decode_component_streams(const std::vector<ComponentStreamRef>& streams, const uint8_t* payload,
                                 int64_t payload_bytes, int num_threads, const CpuKernels& kernels);

}  // namespace cachegen
