// Decoding the planes of a chunk: streams of one shape are put together in batches, threads take batches.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/cpu_path.h"
#include "cpu/parallel.h"
#include "cpu/planes.h"
#include "cpu/stream_batch.h"

namespace cachegen {

// Above this many bytes of output, whole cache lines go past the caches: the values will not be read from there.
constexpr int64_t kBypassBytes = int64_t{1} << 20;

// A longer stream's tile would not fit the caches.
constexpr int64_t kMaxBatchRows = 256;

// Streams that can share a batch agree in all of this.
struct BatchKey {
    int64_t num_channels, num_tokens, head_dim;
    int low_bits;
    bool is_coded, is_uniform;

    BatchKey(const Plane& plane, const StreamShape& shape)
        : num_channels(shape.num_channels),
          num_tokens(shape.num_tokens),
          head_dim(plane.head_dim),
          low_bits(plane.coding.low_bits),
          is_coded(plane.coding.tables != nullptr),
          is_uniform(!plane.coding.has_band_map && plane.coding.table_indices == nullptr &&
                     shape.num_rows() <= kMaxBatchRows) {}

    bool operator==(const BatchKey& other) const {
        return num_channels == other.num_channels && num_tokens == other.num_tokens && head_dim == other.head_dim &&
               low_bits == other.low_bits && is_coded == other.is_coded && is_uniform == other.is_uniform;
    }
};

// Indices of streams, batch by batch.
struct BatchPlan {
    std::vector<int64_t> order;
    std::vector<size_t> begins;  // into `order`; one more than there are batches

    int64_t num_batches() const { return static_cast<int64_t>(begins.size()) - 1; }
};

inline BatchPlan plan_batches(const std::vector<Plane>& planes, const std::vector<StreamRef>& streams,
                              int num_threads) {
    std::vector<BatchKey> keys;
    std::vector<std::vector<int64_t>> members;
    for (size_t i = 0; i < streams.size(); ++i) {
        const BatchKey key(planes[streams[i].plane], streams[i].shape);
        size_t group = std::find(keys.begin(), keys.end(), key) - keys.begin();
        if (group == keys.size()) {
            keys.push_back(key);
            members.emplace_back();
        }
        members[group].push_back(static_cast<int64_t>(i));
    }
    BatchPlan plan;
    plan.order.reserve(streams.size());
    plan.begins.push_back(0);
    for (size_t group = 0; group < keys.size(); ++group) {
        // No more streams in flight than leave every thread something to do.
        const size_t share = (members[group].size() + num_threads - 1) / std::max(num_threads, 1);
        const size_t size = !keys[group].is_uniform ? 1 : share >= 8 ? 8 : share >= 3 ? 4 : share;
        for (size_t begin = 0; begin < members[group].size(); begin += size) {
            const size_t end = std::min(begin + size, members[group].size());
            plan.order.insert(plan.order.end(), members[group].begin() + begin, members[group].begin() + end);
            plan.begins.push_back(plan.order.size());
        }
    }
    return plan;
}

template <class Dtype>
bool allows_bypass(const Plane& plane) {
    constexpr int64_t kLine = 64 / sizeof(typename Dtype::Storage);
    return reinterpret_cast<uintptr_t>(plane.values) % 64 == 0 && plane.token_stride % kLine == 0 &&
           plane.head_stride % kLine == 0 && plane.head_dim % kLine == 0;
}

// Find the parts of a uniform stream, whose sizes must add up.
inline Status open_stream(const Plane& plane, const StreamRef& stream, const uint8_t* payload, size_t value_bytes,
                          BatchStream* opened) {
    const PlaneCoding& coding = plane.coding;
    const bool is_coded = coding.tables != nullptr;
    const int64_t low_bits_at = is_coded ? stream.shape.states_bytes() : 0;
    const int64_t num_low_bits = stream.shape.num_tokens * stream.shape.num_channels * coding.low_bits;
    const int64_t words_at = low_bits_at + round_up((num_low_bits + 7) / 8, 4);
    if (words_at + 2 * int64_t{stream.num_words} != stream.num_bytes) return Status::kTruncated;
    if (!is_coded && stream.num_words != 0) return Status::kCorrupt;
    const uint8_t* bytes = payload + stream.offset;
    opened->states = bytes;
    opened->low_bits = bytes + low_bits_at;
    opened->words = bytes + words_at;
    opened->words_end = bytes + stream.num_bytes;
    opened->tables = coding.tables;
    opened->table_traits = coding.table_traits;
    opened->values = plane.values + stream.first_token * plane.token_stride * static_cast<int64_t>(value_bytes);
    opened->token_stride = plane.token_stride;
    opened->head_stride = plane.head_stride;
    opened->scales = plane.scales + stream.first_token * static_cast<int64_t>(value_bytes);
    opened->num_bins = plane.num_bins;
    return Status::kOk;
}

#if CACHEGEN_X86
// Decode a batch of uniform streams with vector instructions.
template <class Dtype>
void decode_with_vectors(const std::vector<Plane>& planes, const std::vector<StreamRef>& streams, const int64_t* members,
                         int num_members, const uint8_t* payload, int64_t payload_bytes, bool bypasses_caches,
                         CpuPath path, Scratch& scratch, std::vector<Status>& statuses) {
    const Plane& first_plane = planes[streams[members[0]].plane];
    StreamBatch batch;
    batch.shape = streams[members[0]].shape;
    batch.low_bits = first_plane.coding.low_bits;
    batch.head_dim = first_plane.head_dim;
    batch.is_coded = first_plane.coding.tables != nullptr;
    batch.stores_bypass_caches = bypasses_caches;
    batch.readable_end = payload + payload_bytes;
    int64_t indices[kMaxBatch];
    for (int i = 0; i < num_members; ++i) {
        const StreamRef& stream = streams[members[i]];
        const Plane& plane = planes[stream.plane];
        statuses[members[i]] =
            open_stream(plane, stream, payload, sizeof(typename Dtype::Storage), &batch.streams[batch.num_streams]);
        if (statuses[members[i]] != Status::kOk) continue;
        batch.stores_bypass_caches &= allows_bypass<Dtype>(plane);
        indices[batch.num_streams++] = members[i];
    }
    Status found[kMaxBatch];
    (void)path;
    decode_batch_avx512(batch, Dtype::kDtype, scratch, found);
    for (int i = 0; i < batch.num_streams; ++i) statuses[indices[i]] = found[i];
}
#endif

// Decode streams, whose offsets and sizes must lie within the payload; one status per stream.
template <class Dtype>
void decode_planes(const std::vector<Plane>& planes, const std::vector<StreamRef>& streams, int64_t num_tokens,
                   const uint8_t* payload, int64_t payload_bytes, CpuPath path, int num_threads,
                   std::vector<Status>& statuses) {
    const BatchPlan plan = plan_batches(planes, streams, path == CpuPath::kPortable ? 1 << 30 : num_threads);
    int64_t num_values = 0;
    for (const Plane& plane : planes) num_values += num_tokens * plane.num_channels();
    const bool is_large = num_values * static_cast<int64_t>(sizeof(typename Dtype::Storage)) >= kBypassBytes;
    parallel_for(plan.num_batches(), num_threads, [&](int64_t index) {
        // Kept from call to call: fresh memory would cost a page fault per 4096 bytes.
        thread_local StreamWorkspace workspace;
        thread_local Scratch scratch;
        const int64_t* members = &plan.order[plan.begins[index]];
        const int num_members = static_cast<int>(plan.begins[index + 1] - plan.begins[index]);
        const StreamRef& first = streams[members[0]];
        const Plane& plane = planes[first.plane];
#if CACHEGEN_X86
        if (path != CpuPath::kPortable && BatchKey(plane, first.shape).is_uniform) {
            decode_with_vectors<Dtype>(planes, streams, members, num_members, payload, payload_bytes, is_large, path,
                                       scratch, statuses);
            return;
        }
#endif
        for (int i = 0; i < num_members; ++i)
            statuses[members[i]] = decode_plane_stream<Dtype>(plane, streams[members[i]], payload, workspace);
    });
}

}  // namespace cachegen
