// From the streams of a chunk to batches for the vector kernels.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/planes.h"
#include "cpu/stream_batch.h"

namespace cachegen {

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
          is_uniform(!plane.coding.is_arithmetic && plane.coding.table_indices == nullptr &&
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

// keeps_together: whether the kernels take batches; otherwise every stream goes alone.
inline BatchPlan plan_batches(const std::vector<Plane>& planes, const std::vector<StreamRef>& streams, int num_threads,
                              bool keeps_together) {
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
        const size_t size = !keeps_together || !keys[group].is_uniform ? 1 : share >= 8 ? 8 : share >= 3 ? 4 : share;
        for (size_t begin = 0; begin < members[group].size(); begin += size) {
            const size_t end = std::min(begin + size, members[group].size());
            plan.order.insert(plan.order.end(), members[group].begin() + begin, members[group].begin() + end);
            plan.begins.push_back(plan.order.size());
        }
    }
    return plan;
}

// A batch without streams yet, for streams like this one.
inline StreamBatch describe_batch(const Plane& plane, const StreamShape& shape) {
    StreamBatch batch;
    batch.shape = shape;
    batch.low_bits = plane.coding.low_bits;
    batch.head_dim = plane.head_dim;
    batch.is_coded = plane.coding.tables != nullptr;
    return batch;
}

// A stream's tables and its tokens in the cache.
inline BatchStream describe_stream(const Plane& plane, const StreamRef& stream, int64_t value_bytes) {
    BatchStream described;
    described.tables = plane.coding.tables;
    described.table_traits = plane.coding.table_traits;
    described.values = plane.values + stream.first_token * plane.token_stride * value_bytes;
    described.token_stride = plane.token_stride;
    described.head_stride = plane.head_stride;
    described.scales = plane.scales + stream.first_token * value_bytes;
    described.num_bins = plane.num_bins;
    return described;
}

// Find the parts of a uniform stream, whose sizes must add up.
inline Status open_stream(const PlaneCoding& coding, const StreamRef& stream, const uint8_t* payload,
                          BatchStream* opened) {
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
    return Status::kOk;
}

}  // namespace cachegen
