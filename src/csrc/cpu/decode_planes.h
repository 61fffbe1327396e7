// Decoding the planes of a chunk: streams of one shape are put together in batches, threads take batches.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/cpu_kernels.h"
#include "cpu/parallel.h"
#include "cpu/planes.h"
#include "cpu/stream_batch.h"
#include "cpu/stream_planning.h"

namespace cachegen {

// Above this many bytes of output, whole cache lines go past the caches: the values will not be read from there.
constexpr int64_t kBypassBytes = int64_t{1} << 23;

inline bool allows_bypass(const Plane& plane, Dtype dtype) {
    const int64_t line = 64 / value_bytes_of(dtype);
    return reinterpret_cast<uintptr_t>(plane.values) % 64 == 0 && plane.token_stride % line == 0 &&
           plane.head_stride % line == 0 && plane.head_dim % line == 0;
}

// Decode a batch of uniform streams.
inline void decode_in_step(const std::vector<Plane>& planes, const std::vector<StreamRef>& streams, Dtype dtype,
                           const int64_t* members, int num_members, const uint8_t* payload, int64_t payload_bytes,
                           bool bypasses_caches, const CpuKernels& kernels, Scratch& scratch,
                           std::vector<Status>& statuses) {
    StreamBatch batch = describe_batch(planes[streams[members[0]].plane], streams[members[0]].shape);
    batch.stores_bypass_caches = bypasses_caches;
    batch.readable_end = payload + payload_bytes;
    int64_t indices[kMaxBatch];
    for (int i = 0; i < num_members; ++i) {
        const StreamRef& stream = streams[members[i]];
        const Plane& plane = planes[stream.plane];
        BatchStream& opened = batch.streams[batch.num_streams];
        opened = describe_stream(plane, stream, value_bytes_of(dtype));
        statuses[members[i]] = open_stream(plane.coding, stream, payload, &opened);
        if (statuses[members[i]] != Status::kOk) continue;
        batch.stores_bypass_caches &= allows_bypass(plane, dtype);
        indices[batch.num_streams++] = members[i];
    }
    Status found[kMaxBatch];
    kernels.decode_batch(batch, dtype, scratch, found);
    for (int i = 0; i < batch.num_streams; ++i) statuses[indices[i]] = found[i];
}

// Decode streams, whose offsets and sizes must lie within the payload; one status per stream.
inline void decode_planes(const std::vector<Plane>& planes, const std::vector<StreamRef>& streams, Dtype dtype,
                          int64_t num_tokens, const uint8_t* payload, int64_t payload_bytes, const CpuKernels& kernels,
                          int num_threads, std::vector<Status>& statuses) {
    const BatchPlan plan = plan_batches(planes, streams, num_threads, kernels.takes_batches());
    int64_t num_values = 0;
    for (const Plane& plane : planes) num_values += num_tokens * plane.num_channels();
    const bool is_large = num_values * value_bytes_of(dtype) >= kBypassBytes;
    parallel_for(plan.num_batches(), num_threads, [&](int64_t index) {
        // Kept from call to call: fresh memory would cost a page fault per 4096 bytes.
        thread_local StreamWorkspace workspace;
        thread_local Scratch scratch;
        const int64_t* members = &plan.order[plan.begins[index]];
        const int num_members = static_cast<int>(plan.begins[index + 1] - plan.begins[index]);
        const StreamRef& first = streams[members[0]];
        if (kernels.takes_batches() && BatchKey(planes[first.plane], first.shape).is_uniform) {
            decode_in_step(planes, streams, dtype, members, num_members, payload, payload_bytes, is_large, kernels,
                           scratch, statuses);
            return;
        }
        for (int i = 0; i < num_members; ++i) {
            const StreamRef& stream = streams[members[i]];
            statuses[members[i]] = decode_plane_stream(planes[stream.plane], dtype, stream, payload, workspace);
        }
    });
}

}  // namespace cachegen
