// Quantizing and encoding the planes of a chunk: streams of one shape are put together in batches, threads take
// batches.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/cpu_kernels.h"
#include "cpu/parallel.h"
#include "cpu/planes.h"
#include "cpu/stream_batch.h"
#include "cpu/stream_planning.h"

namespace cachegen {

// The encoding of all streams; `checksums` has one CRC-32C per stream, of its bytes with their padding.
struct EncodedStreams {
    std::vector<EncodedStream> streams;
    std::vector<uint32_t> checksums;
};

inline void encode_portably(const Plane& plane, StreamRef stream, Dtype dtype, EncodedStream* encoded) {
    thread_local StreamWorkspace workspace;
    thread_local std::vector<uint8_t> output;
    output.clear();
    encoded->status = encode_plane_stream(plane, dtype, stream, workspace, output);
    if (encoded->status != Status::kOk) return;
    encoded->num_words = stream.num_words;
    std::memcpy(encoded->allocate(static_cast<int64_t>(output.size())), output.data(), output.size());
}

inline EncodedStreams encode_planes(const std::vector<Plane>& planes, const std::vector<StreamRef>& streams,
                                    Dtype dtype, const CpuKernels& kernels, int num_threads) {
    const BatchPlan plan = plan_batches(planes, streams, num_threads, kernels.takes_batches());
    EncodedStreams result;
    result.streams.resize(streams.size());
    result.checksums.resize(streams.size());
    parallel_for(plan.num_batches(), num_threads, [&](int64_t index) {
        const int64_t* members = &plan.order[plan.begins[index]];
        const int num_members = static_cast<int>(plan.begins[index + 1] - plan.begins[index]);
        EncodedStream encoded[kMaxBatch];
        const StreamRef& first = streams[members[0]];
        if (kernels.takes_batches() && BatchKey(planes[first.plane], first.shape).is_uniform) {
            thread_local Scratch scratch;
            StreamBatch batch = describe_batch(planes[first.plane], first.shape);
            for (; batch.num_streams < num_members; ++batch.num_streams) {
                const StreamRef& stream = streams[members[batch.num_streams]];
                batch.streams[batch.num_streams] = describe_stream(planes[stream.plane], stream, value_bytes_of(dtype));
            }
            kernels.encode_batch(batch, dtype, scratch, encoded);
        } else {
            for (int i = 0; i < num_members; ++i) {
                const StreamRef& stream = streams[members[i]];
                encode_portably(planes[stream.plane], stream, dtype, &encoded[i]);
            }
        }
        for (int i = 0; i < num_members; ++i) {
            // While the bytes are in the cache.
            result.checksums[members[i]] = checksum(encoded[i].bytes.get(), encoded[i].padded_bytes());
            result.streams[members[i]] = std::move(encoded[i]);
        }
    });
    return result;
}

}  // namespace cachegen
