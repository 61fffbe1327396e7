// Decoding the components of groups of layers: streams of as many tokens are put together in batches, threads take
// batches.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/component_batch.h"
#include "cpu/components.h"
#include "cpu/cpu_kernels.h"
#include "cpu/parallel.h"
#include "cpu/stream_planning.h"

namespace cachegen {

// Components [num_tokens][stride] in memory.
template <class Value>
struct ComponentRows {
    Value* values;
    int64_t num_tokens;
    int64_t stride;
};

// The components of one group of layers at one level: where they go, and how they are coded.
struct ComponentGroup {
    ComponentRows<int32_t> components;
    ComponentCoding coding;
    int64_t tokens_per_stream;

    int64_t num_streams() const { return (components.num_tokens + tokens_per_stream - 1) / tokens_per_stream; }
};

// One stream of groups.
struct ComponentStreamRef {
    const ComponentGroup* group;
    int64_t first_token;
    StreamShape shape;
    int64_t offset;  // bytes from the start of the payload
    uint32_t num_bytes;
    uint32_t num_words;

    int32_t* components() const { return group->components.values + first_token * group->components.stride; }
};

// The streams of groups, group by group and token by token: the order of the chunk's index, [num_streams][3].
inline std::vector<ComponentStreamRef> list_streams(const std::vector<ComponentGroup>& groups,
                                                    const std::vector<int64_t>& offsets, const uint32_t* index) {
    std::vector<ComponentStreamRef> streams;
    for (const ComponentGroup& group : groups)
        for (int64_t first = 0; first < group.components.num_tokens; first += group.tokens_per_stream) {
            const size_t i = streams.size();
            const int64_t num_tokens = std::min(group.tokens_per_stream, group.components.num_tokens - first);
            streams.push_back(
                {&group, first, {num_tokens, group.coding.num_components}, offsets[i], index[3 * i], index[3 * i + 1]});
        }
    return streams;
}

// Batches of streams of as many tokens, those of more components first.
inline BatchPlan plan_batches(const std::vector<ComponentStreamRef>& streams, int num_threads, bool keeps_together) {
    const auto can_share = [&](const StreamShape& shape) {
        return keeps_together && shape.num_rows() <= kMaxBatchRows;
    };
    BatchPlan plan;
    plan.order.resize(streams.size());
    std::iota(plan.order.begin(), plan.order.end(), 0);
    std::stable_sort(plan.order.begin(), plan.order.end(), [&](int64_t a, int64_t b) {
        const StreamShape &first = streams[a].shape, &second = streams[b].shape;
        return first.num_tokens != second.num_tokens ? first.num_tokens > second.num_tokens
                                                     : first.num_channels > second.num_channels;
    });
    // No more streams in flight than leave every thread something to do.
    const size_t share = (streams.size() + num_threads - 1) / std::max(num_threads, 1);
    const size_t largest = share >= 8 ? 8 : share >= 3 ? 4 : std::max<size_t>(share, 1);
    for (size_t begin = 0; begin < streams.size();) {
        plan.begins.push_back(begin);
        const StreamShape& shape = streams[plan.order[begin]].shape;
        size_t end = begin + 1;
        while (can_share(shape) && end < streams.size() && end - begin < largest &&
               streams[plan.order[end]].shape.num_tokens == shape.num_tokens)
            ++end;
        begin = end;
    }
    plan.begins.push_back(streams.size());
    return plan;
}

// Find the parts of a stream, whose sizes must add up.
inline Status open_stream(const ComponentStreamRef& stream, const uint8_t* payload, LowBits& low_bits,
                          ComponentStream* opened, EscapeList* escapes) {
    const PlaneCoding coding = stream.group->coding.plane_coding();
    const Status built = low_bits.build(stream.shape, coding);
    if (built != Status::kOk) return built;
    const StreamParts parts = lay_out(stream.shape, coding, low_bits);
    const int64_t words_end = parts.words + 2 * int64_t{stream.num_words};
    const Status found = escapes->find(words_end, stream.num_bytes);
    if (found != Status::kOk) return found;
    const uint8_t* const bytes = payload + stream.offset;
    opened->states = bytes;
    opened->low_bits = bytes + parts.low_bits;
    opened->words = bytes + parts.words;
    opened->words_end = bytes + words_end;
    opened->coding = &stream.group->coding;
    opened->low_bits_layout = &low_bits;
    opened->components = stream.components();
    opened->stride = stream.group->components.stride;
    return Status::kOk;
}

// Memory of a worker, kept from batch to batch.
struct ComponentWorkspace {
    LowBits low_bits[kMaxBatch];
    Scratch scratch;
    StreamWorkspace portable;
};

// Decode a batch; one status per stream.
inline void decode_in_step(const std::vector<ComponentStreamRef>& streams, const int64_t* members, int num_members,
                           const uint8_t* payload, int64_t payload_bytes, const NarrowTable* tables,
                           const CpuKernels& kernels, ComponentWorkspace& workspace, std::vector<Status>& statuses) {
    ComponentBatch batch;
    batch.shape = streams[members[0]].shape;
    batch.readable_end = payload + payload_bytes;
    batch.tables = tables;
    EscapeList escapes[kMaxBatch];
    int64_t indices[kMaxBatch];
    for (int i = 0; i < num_members; ++i) {
        const int s = batch.num_streams;
        statuses[members[i]] =
            open_stream(streams[members[i]], payload, workspace.low_bits[s], &batch.streams[s], &(escapes[s] = {}));
        if (statuses[members[i]] == Status::kOk) indices[batch.num_streams++] = members[i];
    }
    Status found[kMaxBatch];
    kernels.decode_components(batch, workspace.scratch, found);
    for (int s = 0; s < batch.num_streams; ++s) {
        const ComponentStreamRef& stream = streams[indices[s]];
        if (found[s] == Status::kOk)
            found[s] =
                apply_escapes(payload + stream.offset + escapes[s].begin, escapes[s].count, stream.shape.num_tokens,
                              stream.group->coding, stream.components(), stream.group->components.stride);
        statuses[indices[s]] = found[s];
    }
}

// Decode streams, whose offsets and sizes must lie within the payload, in place; one status per stream. The groups'
// codings have the same tables.
inline void decode_components(const std::vector<ComponentStreamRef>& streams, const uint8_t* payload,
                              int64_t payload_bytes, const CpuKernels& kernels, int num_threads,
                              std::vector<Status>& statuses) {
    if (streams.empty()) return;
    const BatchPlan plan = plan_batches(streams, num_threads, kernels.decode_components != nullptr);
    const ComponentCoding& coding = streams[0].group->coding;
    std::vector<NarrowTable> tables(kernels.decode_components != nullptr ? coding.num_tables : 0);
    for (size_t i = 0; i < tables.size(); ++i) tables[i].make(coding.tables[i]);
    parallel_for(plan.num_batches(), num_threads, [&](int64_t index) {
        // Kept from call to call, as in decode_planes.
        thread_local ComponentWorkspace workspace;
        const int64_t* members = &plan.order[plan.begins[index]];
        const int num_members = static_cast<int>(plan.begins[index + 1] - plan.begins[index]);
        const ComponentStreamRef& first = streams[members[0]];
        if (kernels.decode_components != nullptr && first.shape.num_rows() <= kMaxBatchRows) {
            decode_in_step(streams, members, num_members, payload, payload_bytes, tables.data(), kernels, workspace,
                           statuses);
            return;
        }
        statuses[members[0]] = decode_components(payload + first.offset, first.num_bytes, first.num_words,
                                                 first.shape.num_tokens, first.group->coding, workspace.portable,
                                                 first.components(), first.group->components.stride);
    });
}

}  // namespace cachegen
