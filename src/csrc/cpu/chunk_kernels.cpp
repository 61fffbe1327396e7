#include "cpu/chunk_kernels.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/arithmetic_portable.h"
#include "cpu/checksum.h"
#include "cpu/decode_planes.h"
#include "cpu/parallel.h"

namespace cachegen {
namespace {

void require_known(Dtype dtype) {
    if (!with_dtype(dtype, [](auto) {}))
        throw std::invalid_argument("unknown dtype " + std::to_string(static_cast<int>(dtype)));
}

Failure first_failure(const std::vector<Status>& statuses) {
    for (size_t i = 0; i < statuses.size(); ++i)
        if (statuses[i] != Status::kOk) return {static_cast<int64_t>(i), statuses[i]};
    return {};
}

uint32_t checksum_block(const TokenBytes& plane, int64_t first_token, int64_t num_tokens) {
    const uint8_t* values = plane.values + first_token * plane.token_stride;
    const int64_t token_bytes = plane.num_heads * plane.head_bytes;
    const bool has_whole_tokens = plane.num_heads == 1 || plane.head_stride == plane.head_bytes;
    if (has_whole_tokens && plane.token_stride == token_bytes) return checksum(values, num_tokens * token_bytes);
    // Gathered in the first-level cache: a checksum of many bytes takes less time than as many of few.
    constexpr int64_t kGatheredBytes = 24 << 10;
    uint8_t gathered[kGatheredBytes];
    int64_t num_gathered = 0;
    uint32_t found = 0;
    for (int64_t token = 0; token < num_tokens; ++token, values += plane.token_stride)
        for (int64_t head = 0; head < plane.num_heads; ++head) {
            const uint8_t* const bytes = values + head * plane.head_stride;
            if (num_gathered + plane.head_bytes > kGatheredBytes) {
                found = checksum(gathered, num_gathered, found);
                num_gathered = 0;
            }
            if (plane.head_bytes > kGatheredBytes) {
                found = checksum(bytes, plane.head_bytes, found);
            } else {
                std::memcpy(gathered + num_gathered, bytes, plane.head_bytes);
                num_gathered += plane.head_bytes;
            }
        }
    return checksum(gathered, num_gathered, found);
}

}  // namespace

void measure_chunk(const std::vector<Plane>& planes, Dtype dtype, int64_t num_tokens, int num_threads,
                   const CpuKernels& kernels, uint32_t* counts, std::vector<int64_t>& bad_tokens) {
    std::vector<int64_t> first_rows(planes.size() + 1, 0);
    for (size_t i = 0; i < planes.size(); ++i) first_rows[i + 1] = first_rows[i] + planes[i].num_channels();
    require_known(dtype);
    parallel_for(static_cast<int64_t>(planes.size()), num_threads, [&](int64_t i) {
        bad_tokens[i] = kernels.measure_plane(planes[i], dtype, num_tokens, counts + first_rows[i] * kTableSize);
    });
}

EncodedStreams encode_chunk(const std::vector<Plane>& planes, Dtype dtype, const std::vector<StreamRef>& streams,
                            int num_threads, const CpuKernels& kernels) {
    require_known(dtype);
    return encode_planes(planes, streams, dtype, kernels, num_threads);
}

void join_streams(EncodedStreams& encoded, const std::vector<int64_t>& offsets, int num_threads, uint8_t* payload) {
    parallel_for(static_cast<int64_t>(encoded.streams.size()), num_threads, [&](int64_t i) {
        EncodedStream& stream = encoded.streams[i];
        if (stream.bytes) std::memcpy(payload + offsets[i], stream.bytes.get(), stream.padded_bytes());
        stream.bytes.reset();
    });
}

Failure decode_chunk(const std::vector<Plane>& planes, Dtype dtype, const std::vector<StreamRef>& streams,
                     int64_t num_tokens, const uint8_t* payload, int64_t payload_bytes, int num_threads,
                     const CpuKernels& kernels) {
    std::vector<Status> statuses(streams.size(), Status::kOk);
    require_known(dtype);
    decode_planes(planes, streams, dtype, num_tokens, payload, payload_bytes, kernels, num_threads, statuses);
    return first_failure(statuses);
}

void checksum_parts(const uint8_t* payload, const std::vector<int64_t>& offsets, int num_threads, uint32_t* checksums) {
    parallel_for(static_cast<int64_t>(offsets.size()) - 1, num_threads, [&](int64_t i) {
        checksums[i] = checksum(payload + offsets[i], static_cast<size_t>(offsets[i + 1] - offsets[i]));
    });
}

void checksum_tokens(const std::vector<TokenBytes>& planes, int64_t num_tokens, int64_t tokens_per_block,
                     int num_threads, uint32_t* checksums) {
    const int64_t num_blocks = count_blocks(num_tokens, tokens_per_block);
    parallel_for(static_cast<int64_t>(planes.size()) * num_blocks, num_threads, [&](int64_t i) {
        const int64_t first = i % num_blocks * tokens_per_block;
        checksums[i] = checksum_block(planes[i / num_blocks], first, std::min(tokens_per_block, num_tokens - first));
    });
}

Status encode_symbol_stream(const uint16_t* symbols, const StreamShape& shape, const PlaneCoding& coding,
                            std::vector<uint8_t>& output, uint32_t* num_words) {
    const int64_t symbol_stride = shape.num_rows() * kNumLanes;
    std::vector<uint16_t> padded(shape.num_channels * symbol_stride, 0);
    for (int64_t channel = 0; channel < shape.num_channels; ++channel)
        std::memcpy(padded.data() + channel * symbol_stride, symbols + channel * shape.num_tokens,
                    2 * shape.num_tokens);
    StreamWorkspace workspace;
    const auto encode = coding.is_arithmetic ? encode_arithmetic_stream : encode_stream;
    return encode(padded.data(), symbol_stride, shape, coding, workspace, output, num_words);
}

Status decode_symbol_stream(const uint8_t* bytes, int64_t num_bytes, uint32_t num_words, const StreamShape& shape,
                            const PlaneCoding& coding, uint16_t* symbols) {
    const auto copy = [&](int64_t first_channel, int64_t count, const uint16_t* tile, int64_t symbol_stride) {
        for (int64_t channel = 0; channel < count; ++channel)
            std::memcpy(symbols + (first_channel + channel) * shape.num_tokens, tile + channel * symbol_stride,
                        2 * shape.num_tokens);
    };
    StreamWorkspace workspace;
    return coding.is_arithmetic ? decode_arithmetic_stream(bytes, num_bytes, num_words, shape, coding, workspace, copy)
                                : decode_stream(bytes, num_bytes, num_words, shape, coding, workspace, copy);
}

EncodedStreams encode_component_streams(const ComponentRows<const int32_t>& fine,
                                        const ComponentRows<const int32_t>& coarse, const ComponentCoding& coding,
                                        int64_t tokens_per_stream, int num_threads, const CpuKernels& kernels) {
    return encode_components(fine, coarse, coding, tokens_per_stream, kernels, num_threads);
}

Failure decode_component_streams(const std::vector<ComponentStreamRef>& streams, const uint8_t* payload,
                                 int64_t payload_bytes, int num_threads, const CpuKernels& kernels) {
    std::vector<Status> statuses(streams.size(), Status::kOk);
    decode_components(streams, payload, payload_bytes, kernels, num_threads, statuses);
    return first_failure(statuses);
}

}  // namespace cachegen
