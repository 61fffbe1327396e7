// The streams of components: warp = stream, lane = token of a row. The integers and bytes are those of
// cpu/components.h.
//
// As with planes, the coder walks component by component and memory lies token by token: a warp's staged symbols,
// [component of the group][token], are where the two meet. Escapes lie token by token; the warp puts them in when all
// else is decoded, and the encoder's compaction finds them again.

#pragma once

#include "component_streams.h"
#include "cuda/rans_decode.cuh"
#include "cuda/rans_encode.cuh"

namespace cachegen {
namespace cuda {

constexpr int kStagedComponents = kNumLanes;  // of a group, at most: neighbouring lanes on neighbouring components
constexpr int kStagePadding = 2;          // symbols, so that neighbouring components of a token lie in different banks
constexpr int kStagedComponentRows = 64;  // as kStagedRows
constexpr int kComponentStage = kStagedComponentRows * kNumLanes + kStagedComponents * kStagePadding;

// From a staged component to the next one.
__device__ inline int stage_stride(const Group& group) { return group.num_rows * kNumLanes + kStagePadding; }

// Call visit(token of the group, component of the group) for all of a group; all lanes of the warp, neighbouring lanes
// on neighbouring components. A lane stays with one component, whose ComponentRecord begin(component) may keep.
template <class Begin, class Visit>
__device__ void walk_group(const WarpStream& stream, const Group& group, int lane, Begin&& begin, Visit&& visit) {
    int width = 1;  // lanes of a token
    while (width < group.num_channels) width *= 2;
    const int component = lane & (width - 1);
    if (component >= group.num_channels) return;
    begin(component);
    const int first_token = group.first_row * kNumLanes, rest = stream.num_tokens - first_token;
    const int num_tokens = rest < group.num_rows * kNumLanes ? rest : group.num_rows * kNumLanes;
    for (int token = lane / width; token < num_tokens; token += kNumLanes / width) visit(token, component);
}

// Where the low bits of a row's component begin, in bits.
__device__ inline int64_t low_bits_position(const GroupRecord& record, const ComponentRecord& component, int row,
                                            int live_lanes) {
    return int64_t{row} * kNumLanes * record.low_bits + int64_t{component.low_bits_before} * live_lanes;
}

// What a warp needs to decode its stream.
struct ComponentDecoder {
    LaneDecoder lane_decoder;
    const uint8_t* low_bits;
    const Escape* escapes;
    int64_t num_escapes;

    // Take the stream apart, making every check that keeps the warp inside its bytes.
    __device__ Status open(const GroupRecord& record, const WarpStream& stream, const uint8_t* payload,
                           int64_t payload_bytes, const StreamRecord& stream_record, uint32_t* ring, int lane) {
        if (stream_record.offset < 0 || stream_record.num_bytes < 0 || stream_record.num_words < 0 ||
            stream_record.num_bytes > payload_bytes - stream_record.offset)
            return Status::kTruncated;
        const uint8_t* bytes = payload + stream_record.offset;
        const StreamParts parts = lay_out_parts(stream.shape(), true, stream.num_tokens * record.low_bits);
        EscapeList list;
        const Status found = list.find(parts.words + 2 * stream_record.num_words, stream_record.num_bytes);
        if (found != Status::kOk) return found;
        low_bits = bytes + parts.low_bits;
        escapes = reinterpret_cast<const Escape*>(bytes + list.begin);
        num_escapes = list.count;
        lane_decoder.open(bytes, parts.words, stream_record.num_words, ring, stream.shape().num_lanes(), lane);
        return Status::kOk;
    }

    // Decode a group's symbols into a warp's staging. `components` are those of the group's first and on.
    __device__ void decode_group(const GroupRecord& record, const WarpStream& stream, const Group& group,
                                 const uint32_t* tables, const ComponentRecord* components, uint16_t* staged,
                                 int lane) {
        for (int i = 0; i < group.num_channels; ++i, staged += stage_stride(group)) {
            const ComponentRecord component = components[i];
            const SearchedTable table(tables + component.table * kTableSize);
            for (int row = 0; row < group.num_rows; ++row) {
                const int live_lanes = stream.shape().live_lanes(group.first_row + row);
                const bool is_live = lane < live_lanes;
                uint32_t symbol = lane_decoder.decode(table, is_live, lane) << component.low_bits;
                if (component.low_bits > 0 && is_live)
                    symbol |= read_low_bits(record, component, group.first_row + row, live_lanes, lane);
                staged[row * kNumLanes + lane] = static_cast<uint16_t>(symbol);
            }
        }
    }

    __device__ uint32_t read_low_bits(const GroupRecord& record, const ComponentRecord& component, int row,
                                      int live_lanes, int lane) const {
        const int64_t position = low_bits_position(record, component, row, live_lanes);
        uint32_t symbol = 0;
        if (live_lanes == kNumLanes) {  // whole words, all lanes the same
            const auto* words = reinterpret_cast<const uint32_t*>(low_bits) + position / 32;
            for (int bit = 0; bit < component.low_bits; ++bit) symbol |= (words[bit] >> lane & 1u) << bit;
        } else {
            for (int bit = 0; bit < component.low_bits; ++bit)
                symbol |= read_bits(low_bits, position + bit * live_lanes + lane, 1) << bit;
        }
        return symbol;
    }

    // What became of the stream, once all of it is decoded.
    __device__ Status finish(const GroupRecord& record, const WarpStream& stream, int lane) const {
        const Status status = lane_decoder.finish();
        return status == Status::kOk ? apply_escapes(record, stream, lane) : status;
    }

    // Put the escapes in their places; each is checked against the one before it.
    __device__ Status apply_escapes(const GroupRecord& record, const WarpStream& stream, int lane) const {
        const auto num_components = static_cast<uint32_t>(record.num_components);
        auto* const values = reinterpret_cast<int32_t*>(record.components) + stream.first_token * record.token_stride;
        bool is_valid = true;
        for (int64_t i = lane; i < num_escapes; i += kNumLanes) {
            const Escape escape = escapes[i];
            const int64_t place_before = i > 0 ? int64_t{escapes[i - 1].place} : -1;
            if (escape.is_valid(place_before, stream.num_tokens, num_components,
                                static_cast<uint32_t>(record.num_refined)))
                values[escape.place / num_components * record.token_stride + escape.place % num_components] =
                    escape.component;
            else
                is_valid = false;
        }
        return __ballot_sync(kAllLanes, !is_valid) == 0 ? Status::kOk : Status::kCorrupt;
    }
};

// Turn a group's staged symbols into components; all lanes of the warp.
__device__ inline void write_components(const GroupRecord& record, const WarpStream& stream, const Group& group,
                                        const ComponentRecord* components, const uint16_t* staged, int lane) {
    auto* const values = reinterpret_cast<int32_t*>(record.components) +
                         (int64_t{stream.first_token} + int64_t{group.first_row} * kNumLanes) * record.token_stride +
                         group.first_channel;
    CACHEGEN_ASSUME_GLOBAL(values);
    const int stride = stage_stride(group);
    bool is_refined = false;
    int32_t zero_symbol = 0;
    const auto begin = [&](int component) {
        is_refined = group.first_channel + component < record.num_refined;
        zero_symbol = zero_component_symbol(components[component].low_bits);
    };
    walk_group(stream, group, lane, begin, [&](int token, int component) {
        const int32_t symbol = staged[component * stride + token];
        int32_t* const value = values + token * record.token_stride + component;
        CACHEGEN_STORE(value, is_refined ? refine(*value, symbol) : symbol - zero_symbol);
    });
}

// Bring all tables into shared memory; all threads of the block.
__device__ inline void load_component_tables(uint32_t* staged, const uint32_t* tables, int num_tables) {
    load_tables(staged, tables, 0, num_tables);
    __syncthreads();
}

// Decode a stream into the group's components; all lanes of the warp. `components` are the group's.
__device__ inline Status decode_component_stream(const GroupRecord& record, const WarpStream& stream,
                                                 const ComponentRecord* components, const uint32_t* tables,
                                                 const uint8_t* payload, int64_t payload_bytes,
                                                 const StreamRecord& stream_record, uint16_t* staged, uint32_t* ring,
                                                 int lane) {
    ComponentDecoder decoder;
    const Status opened = decoder.open(record, stream, payload, payload_bytes, stream_record, ring, lane);
    if (opened != Status::kOk) return opened;
    const int num_rows = stream.num_rows(),
              group_components = channels_per_group(num_rows, kStagedComponents, kStagedComponentRows);
    for (int first = 0; first < stream.num_channels; first += group_components) {
        const int rest = stream.num_channels - first, count = rest < group_components ? rest : group_components;
        for (int row = 0; row < num_rows; row += kStagedComponentRows) {
            const Group group{first, count, row,
                              num_rows - row < kStagedComponentRows ? num_rows - row : kStagedComponentRows};
            decoder.decode_group(record, stream, group, tables, components + first, staged, lane);
            __syncwarp();  // lanes read what other lanes have staged
            write_components(record, stream, group, components + first, staged, lane);
            __syncwarp();  // and are done before it is staged over
        }
    }
    return decoder.finish(record, stream, lane);
}

// Grid: x = groups of layers, y = blocks of eight streams of a group, as many as there are or fewer.
static __global__ void __launch_bounds__(kThreadsPerBlock, kBlocksPerProcessor)
    decode_components_kernel(const GroupRecord* groups, int num_tokens, const ComponentRecord* components,
                             const uint32_t* tables, int num_tables, const uint8_t* payload, int64_t payload_bytes,
                             const StreamRecord* streams, int32_t* statuses) {
    alignas(kTableBytes) __shared__ uint32_t staged_tables[kMaxComponentTables * kTableSize];
    __shared__ uint16_t staged_symbols[kWarpsPerBlock][kComponentStage];
    __shared__ uint32_t rings[kWarpsPerBlock][WordRing::kNumWords / 2];
    const int lane = static_cast<int>(threadIdx.x) % kNumLanes, warp = find_warp();
    const GroupRecord record = groups[blockIdx.x];
    load_component_tables(staged_tables, tables, num_tables);

    const int num_streams = count_streams(record, num_tokens);
    for (int i = static_cast<int>(blockIdx.y) * kWarpsPerBlock + warp; i < num_streams;
         i += static_cast<int>(gridDim.y) * kWarpsPerBlock) {
        const WarpStream stream = find_stream(record, num_tokens, i);
        const int64_t index = record.first_stream + i;
        const Status status =
            decode_component_stream(record, stream, components + record.first_component, staged_tables, payload,
                                    payload_bytes, streams[index], staged_symbols[warp], rings[warp], lane);
        if (lane == 0) statuses[index] = static_cast<int32_t>(status);
    }
}

// Find the ranges of all tables, once they are in shared memory; all threads of the block.
__device__ inline void find_ranges(SymbolRange* ranges, const uint32_t* tables, int num_tables) {
    for (int i = static_cast<int>(threadIdx.x); i < num_tables; i += kThreadsPerBlock)
        ranges[i] = SymbolRange::of(PackedTable{tables + i * kTableSize});
    __syncthreads();
}

// The symbol of a component. Tokens are the chunk's; `ranges` of all tables.
__device__ inline ComponentSymbol code_component(const GroupRecord& record, int64_t token, int64_t component,
                                                 const ComponentRecord& coding, const SymbolRange* ranges) {
    const int32_t value = reinterpret_cast<const int32_t*>(record.components)[token * record.token_stride + component];
    if (component >= record.num_refined) return anew_symbol(value, ranges[coding.table], coding.low_bits);
    return refinement_symbol(reinterpret_cast<const int32_t*>(record.coarse)[token * record.coarse_stride + component],
                             value);
}

// What a warp needs to encode its stream into its slot.
struct ComponentEncoder {
    LaneEncoder lane_encoder;
    StreamParts parts;
    uint8_t* slot;
    uint32_t num_escapes;  // that this lane has met
    bool is_codable;

    __device__ void open(const GroupRecord& record, const WarpStream& stream, uint8_t* slots, int lane) {
        const StreamShape full{record.tokens_per_stream, stream.num_channels};
        parts = lay_out_parts(stream.shape(), true, stream.num_tokens * record.low_bits);
        slot = slots + record.workspace + stream.index * component_slot_bytes(full, record.low_bits);
        lane_encoder = {kStateLow, reinterpret_cast<uint16_t*>(slot + parts.words),
                        static_cast<uint32_t>(stream.num_symbols())};
        num_escapes = 0;
        is_codable = true;
        // Full rows store whole words; the bits of a shorter last row are set one by one in what is zero before.
        const int64_t full_rows_bytes = int64_t{stream.num_tokens} / kNumLanes * 4 * record.low_bits;
        auto* tail = reinterpret_cast<uint32_t*>(slot + parts.low_bits + full_rows_bytes);
        const int64_t tail_words = (parts.words - parts.low_bits - full_rows_bytes) / 4;
        for (int64_t i = lane; i < tail_words; i += kNumLanes) tail[i] = 0;
        __syncwarp();
    }

    // Turn a group's components into staged symbols; all lanes of the warp.
    __device__ void read_group(const GroupRecord& record, const WarpStream& stream, const Group& group,
                               const SymbolRange* ranges, const ComponentRecord* components, uint16_t* staged,
                               int lane) {
        const int64_t first_token = int64_t{stream.first_token} + int64_t{group.first_row} * kNumLanes;
        const int stride = stage_stride(group);
        ComponentRecord coding{};
        const auto begin = [&](int component) { coding = components[component]; };
        walk_group(stream, group, lane, begin, [&](int token, int component) {
            const ComponentSymbol coded =
                code_component(record, first_token + token, group.first_channel + component, coding, ranges);
            is_codable &= coded.is_codable;
            num_escapes += coded.is_escape;
            staged[component * stride + token] = static_cast<uint16_t>(coded.symbol);
        });
    }

    // Encode a group's staged symbols, backwards. `components` are those of the group's first and on.
    __device__ void encode_group(const GroupRecord& record, const WarpStream& stream, const Group& group,
                                 const uint32_t* tables, const ComponentRecord* components, const uint16_t* staged,
                                 int lane) {
        const uint32_t lower_lanes = (1u << lane) - 1;
        for (int i = group.num_channels - 1; i >= 0; --i) {
            const ComponentRecord component = components[i];
            const uint32_t* table = tables + component.table * kTableSize;
            for (int row = group.num_rows - 1; row >= 0; --row) {
                const int live_lanes = stream.shape().live_lanes(group.first_row + row);
                const bool is_live = lane < live_lanes;
                const uint32_t symbol = is_live ? staged[i * stage_stride(group) + row * kNumLanes + lane] : 0;
                const int64_t position = low_bits_position(record, component, group.first_row + row, live_lanes);
                for (int bit = 0; bit < component.low_bits; ++bit)
                    write_low_bit(position + bit * live_lanes, live_lanes, (symbol >> bit & 1u) != 0, lane);
                is_codable &= lane_encoder.encode(table, symbol >> component.low_bits, is_live, lower_lanes);
            }
        }
    }

    // Write one bit of each live lane.
    __device__ void write_low_bit(int64_t position, int live_lanes, bool is_set, int lane) {
        const uint32_t bits = __ballot_sync(kAllLanes, is_set);
        if (lane != 0) return;
        if (live_lanes == kNumLanes)
            *reinterpret_cast<uint32_t*>(slot + parts.low_bits + position / 8) = bits;
        else
            write_bits(slot + parts.low_bits, position, live_lanes, bits);
    }

    // Write the states and say how long the stream is.
    __device__ Status finish(const WarpStream& stream, StreamRecord* record, int lane) {
        if (lane < stream.num_tokens) reinterpret_cast<uint32_t*>(slot)[lane] = lane_encoder.state;
        for (int distance = kNumLanes / 2; distance > 0; distance /= 2)
            num_escapes += __shfl_xor_sync(kAllLanes, num_escapes, distance);
        const int64_t num_words = stream.num_symbols() - lane_encoder.first_word;
        if (lane == 0) {
            record->num_bytes = bytes_with_escapes(parts.words + 2 * num_words, num_escapes);
            record->num_words = num_words;
        }
        return __ballot_sync(kAllLanes, !is_codable) == 0 ? Status::kOk : Status::kNoFrequency;
    }
};

// Grid: x = groups of layers, y = blocks of eight streams of a group, as many as there are or fewer.
static __global__ void __launch_bounds__(kThreadsPerBlock)
    encode_components_kernel(const GroupRecord* groups, int num_tokens, const ComponentRecord* components,
                             const uint32_t* tables, int num_tables, uint8_t* slots, StreamRecord* streams,
                             int32_t* statuses) {
    alignas(16) __shared__ uint32_t staged_tables[kMaxComponentTables * kTableSize];
    __shared__ SymbolRange ranges[kMaxComponentTables];
    __shared__ uint16_t staged_symbols[kWarpsPerBlock][kComponentStage];
    const int lane = static_cast<int>(threadIdx.x) % kNumLanes, warp = find_warp();
    const GroupRecord& record = groups[blockIdx.x];
    load_component_tables(staged_tables, tables, num_tables);
    find_ranges(ranges, staged_tables, num_tables);

    const int num_streams = count_streams(record, num_tokens);
    for (int i = static_cast<int>(blockIdx.y) * kWarpsPerBlock + warp; i < num_streams;
         i += static_cast<int>(gridDim.y) * kWarpsPerBlock) {
        const WarpStream stream = find_stream(record, num_tokens, i);
        const int64_t index = record.first_stream + i;
        ComponentEncoder encoder;
        encoder.open(record, stream, slots, lane);
        const int num_rows = stream.num_rows(),
                  group_components = channels_per_group(num_rows, kStagedComponents, kStagedComponentRows);
        const int last_row = (num_rows - 1) / kStagedComponentRows * kStagedComponentRows;
        const int last_group = (stream.num_channels - 1) / group_components * group_components;
        for (int first = stream.num_channels > 0 ? last_group : -1; first >= 0; first -= group_components) {
            const int rest = stream.num_channels - first, count = rest < group_components ? rest : group_components;
            const ComponentRecord* group_records = components + record.first_component + first;
            for (int row = last_row; row >= 0; row -= kStagedComponentRows) {
                const Group group{first, count, row,
                                  num_rows - row < kStagedComponentRows ? num_rows - row : kStagedComponentRows};
                uint16_t* staged = staged_symbols[warp];
                encoder.read_group(record, stream, group, ranges, group_records, staged, lane);
                __syncwarp();  // lanes encode what other lanes have staged
                encoder.encode_group(record, stream, group, staged_tables, group_records, staged, lane);
                __syncwarp();  // and are done before it is staged over
            }
        }
        const Status status = encoder.finish(stream, &streams[index], lane);
        if (lane == 0) statuses[index] = static_cast<int32_t>(status);
    }
}

// List a stream's escapes as they ascend, token by token; all lanes of the warp.
__device__ inline void list_escapes(const GroupRecord& record, const WarpStream& stream,
                                    const ComponentRecord* components, const SymbolRange* ranges, Escape* escapes,
                                    int lane) {
    for (int token = 0; token < stream.num_tokens; ++token) {
        const int64_t chunk_token = int64_t{stream.first_token} + token;
        const auto* values = reinterpret_cast<const int32_t*>(record.components) + chunk_token * record.token_stride;
        for (int64_t first = record.num_refined; first < record.num_components; first += kNumLanes) {
            const int64_t component = first + lane, place = token * record.num_components + component;
            const bool is_escape =
                component < record.num_components &&
                code_component(record, chunk_token, component, components[component], ranges).is_escape;
            const uint32_t escaping = __ballot_sync(kAllLanes, is_escape);
            if (is_escape)
                escapes[__popc(escaping & ((1u << lane) - 1))] = {static_cast<uint32_t>(place), values[component]};
            escapes += __popc(escaping);
        }
    }
}

// Grid: x = groups of layers, y = blocks of eight streams of a group, as many as there are or fewer. Streams that would
// leave the payload stay.
static __global__ void __launch_bounds__(kThreadsPerBlock)
    compact_components_kernel(const GroupRecord* groups, int num_tokens, const ComponentRecord* components,
                              const uint32_t* tables, int num_tables, const uint8_t* slots, const StreamRecord* streams,
                              uint8_t* payload, int64_t payload_bytes) {
    alignas(16) __shared__ uint32_t staged_tables[kMaxComponentTables * kTableSize];
    __shared__ SymbolRange ranges[kMaxComponentTables];
    const int lane = static_cast<int>(threadIdx.x) % kNumLanes, warp = find_warp();
    const GroupRecord& record = groups[blockIdx.x];
    load_component_tables(staged_tables, tables, num_tables);
    find_ranges(ranges, staged_tables, num_tables);
    const StreamShape full{record.tokens_per_stream, record.num_components};

    const int num_streams = count_streams(record, num_tokens);
    for (int i = static_cast<int>(blockIdx.y) * kWarpsPerBlock + warp; i < num_streams;
         i += static_cast<int>(gridDim.y) * kWarpsPerBlock) {
        const WarpStream stream = find_stream(record, num_tokens, i);
        const StreamRecord found = streams[record.first_stream + i];
        const int64_t padded_bytes = round_up(found.num_bytes, kStreamAlignment);
        if (found.offset < 0 || padded_bytes > payload_bytes - found.offset) continue;
        const uint8_t* slot = slots + record.workspace + i * component_slot_bytes(full, record.low_bits);
        const int64_t num_symbols = stream.num_symbols();
        const int64_t words_at = lay_out_parts(stream.shape(), true, stream.num_tokens * record.low_bits).words;
        const auto* words = reinterpret_cast<const uint16_t*>(slot + words_at) + num_symbols - found.num_words;
        EscapeList escapes;
        if (escapes.find(words_at + 2 * found.num_words, found.num_bytes) != Status::kOk) continue;
        auto* target = reinterpret_cast<uint32_t*>(payload + found.offset);
        const int64_t compacted = escapes.count > 0 ? escapes.begin : padded_bytes;
        compact_stream(slot, words_at, words, found.num_words, target, compacted, lane, kNumLanes);
        if (escapes.count == 0) continue;
        auto* listed = reinterpret_cast<Escape*>(payload + found.offset + escapes.begin);
        list_escapes(record, stream, components + record.first_component, ranges, listed, lane);
        for (int64_t at = found.num_bytes / 4 + lane; at < padded_bytes / 4; at += kNumLanes) target[at] = 0;
    }
}

}  // namespace cuda
}  // namespace cachegen
