// Quantizing and encoding: warp = stream, lane = token of a row. The bytes are those of cpu/rans_portable.h.
//
// How long a stream gets is known only at its end, so that encoding takes two launches: each stream goes into a slot
// that none can outgrow, what precedes the words at its beginning and the words at its end; with the lengths the caller
// makes the offsets, and compaction moves the streams there.

#pragma once

#include "cuda/planes.cuh"

namespace cachegen {
namespace cuda {

// A lane's state, and the words that the lanes of its warp write from the end of the slot downwards.
struct LaneEncoder {
    uint32_t state;
    uint16_t* words;
    uint32_t first_word;  // written so far; a word per symbol fits below the end

    // Encode one high part in each live lane, all with one table. Returns false in a lane whose high part has no
    // frequency.
    __device__ bool encode(const uint32_t* table, uint32_t high, bool is_live, uint32_t lower_lanes) {
        const TableEntry entry = TableEntry::unpack(is_live && high < kTableSize ? table[high] : 0);
        const bool is_coded = entry.frequency != 0;
        const bool gives_word = is_coded && encode_gives_word(state, entry.frequency);
        const uint32_t giving = __ballot_sync(kAllLanes, gives_word);
        first_word -= __popc(giving);
        if (gives_word) {
            words[first_word + __popc(giving & lower_lanes)] = static_cast<uint16_t>(state);
            state >>= kWordBits;
        }
        if (is_coded) state = encode_step(state, entry.start, entry.frequency);
        return is_coded || !is_live;
    }
};

// What a warp needs to encode its stream into its slot.
struct StreamEncoder {
    LaneEncoder lane_encoder;
    StreamParts parts;
    uint8_t* slot;
    int low_bits;
    bool in_range;
    bool has_frequencies;

    __device__ void open(const PlaneRecord& plane, const WarpStream& stream, bool has_tables, uint8_t* slots,
                         int lane) {
        low_bits = static_cast<int>(plane.low_bits);
        const int64_t num_symbols = stream.num_symbols();
        parts = lay_out_parts(stream.shape(), has_tables, num_symbols * low_bits);
        const StreamShape full{plane.tokens_per_stream, stream.num_channels};
        slot = slots + plane.workspace + stream.index * slot_bytes(full, low_bits, has_tables);
        lane_encoder = {kStateLow, reinterpret_cast<uint16_t*>(slot + parts.words), static_cast<uint32_t>(num_symbols)};
        in_range = has_frequencies = true;
        // Full rows store whole words; the bits of a shorter last row are set one by one in what is zero before.
        const int64_t full_rows_bytes = int64_t{stream.num_tokens} / kNumLanes * 4 * stream.num_channels * low_bits;
        auto* tail = reinterpret_cast<uint32_t*>(slot + parts.low_bits + full_rows_bytes);
        const int64_t tail_words = (parts.words - parts.low_bits - full_rows_bytes) / 4;
        for (int64_t i = lane; i < tail_words; i += kNumLanes) tail[i] = 0;
        __syncwarp();
    }

    // Encode a group's staged symbols, backwards. `tables` are those of the group's first channel and on.
    __device__ void encode_group(const WarpStream& stream, const Group& group, const uint32_t* tables, bool has_tables,
                                 const uint8_t* staged, int lane) {
        const uint32_t lower_lanes = (1u << lane) - 1;
        staged += (group.num_channels * group.num_rows - 1) * kNumLanes + lane;
        tables += (group.num_channels - 1) * kTableSize;
        for (int i = group.num_channels - 1; i >= 0; --i, tables -= kTableSize) {
            for (int row = group.first_row + group.num_rows - 1; row >= group.first_row; --row, staged -= kNumLanes) {
                const bool is_live = row * kNumLanes + lane < stream.num_tokens;
                const uint32_t symbol = is_live ? *staged : 0;
                if (low_bits > 0) write_low_bits(stream, row, group.first_channel + i, symbol, lane);
                if (has_tables)
                    has_frequencies &= lane_encoder.encode(tables, symbol >> low_bits, is_live, lower_lanes);
            }
        }
    }

    __device__ void write_low_bits(const WarpStream& stream, int row, int channel, uint32_t symbol, int lane) {
        const int live_lanes = stream.shape().live_lanes(row);
        const int64_t row_position = int64_t{row} * kNumLanes * stream.num_channels * low_bits;
        for (int bit = 0; bit < low_bits; ++bit) {
            const uint32_t bits = __ballot_sync(kAllLanes, (symbol >> bit & 1u) != 0);
            const int64_t position = row_position + (int64_t{channel} * low_bits + bit) * live_lanes;
            if (lane != 0) continue;
            if (live_lanes == kNumLanes)
                *reinterpret_cast<uint32_t*>(slot + parts.low_bits + position / 8) = bits;
            else
                write_bits(slot + parts.low_bits, position, live_lanes, bits);
        }
    }

    // Write the states and say how long the stream is.
    __device__ Status finish(const WarpStream& stream, bool has_tables, StreamRecord* record, int lane) const {
        const bool all_in_range = __ballot_sync(kAllLanes, !in_range) == 0;
        const bool all_have_frequencies = __ballot_sync(kAllLanes, !has_frequencies) == 0;
        if (has_tables && lane < stream.num_tokens) reinterpret_cast<uint32_t*>(slot)[lane] = lane_encoder.state;
        const int64_t num_words = has_tables ? stream.num_symbols() - lane_encoder.first_word : 0;
        if (lane == 0) {
            record->num_bytes = parts.words + 2 * num_words;
            record->num_words = num_words;
        }
        if (!all_in_range) return Status::kNotFinite;
        return all_have_frequencies ? Status::kOk : Status::kNoFrequency;
    }
};

// Grid: x = planes, y = blocks of eight streams of a plane, as many as there are or fewer.
template <class Dtype>
__global__ void __launch_bounds__(kThreadsPerBlock)
    encode_kernel(const PlaneRecord* planes, int num_tokens, const uint32_t* tables, uint8_t* slots,
                  StreamRecord* streams, int32_t* statuses) {
    alignas(16) __shared__ uint32_t staged_tables[kTileChannels * kTableSize];
    __shared__ uint8_t staged_symbols[kWarpsPerBlock][kStagedRows * kNumLanes];
    const int lane = static_cast<int>(threadIdx.x) % kNumLanes, warp = find_warp();
    const PlaneRecord& plane = planes[blockIdx.x];
    const bool has_tables = tables != nullptr;
    const int num_channels = static_cast<int>(plane.num_heads * plane.head_dim);
    const int last_tile = (num_channels - 1) / kTileChannels * kTileChannels;

    const int num_streams = count_streams(plane, num_tokens);
    for (int first_stream = static_cast<int>(blockIdx.y) * kWarpsPerBlock; first_stream < num_streams;
         first_stream += static_cast<int>(gridDim.y) * kWarpsPerBlock) {
        const WarpStream stream = find_stream(plane, num_tokens, first_stream + warp);
        const int64_t index = plane.first_stream + stream.index;
        StreamEncoder encoder;
        if (stream.exists()) encoder.open(plane, stream, has_tables, slots, lane);
        const int num_rows = stream.num_rows(), group_channels = channels_per_group(num_rows);
        const int last_row = (num_rows - 1) / kStagedRows * kStagedRows;
        for (int tile = last_tile; tile >= 0; tile -= kTileChannels) {
            const int tile_end = tile + kTileChannels < num_channels ? tile + kTileChannels : num_channels;
            __syncthreads();  // nobody reads the tables of the tile before any more
            if (has_tables) load_tables(staged_tables, tables + plane.first_table * kTableSize, tile, tile_end);
            __syncthreads();
            if (!stream.exists()) continue;
            const int last_group = tile + (tile_end - tile - 1) / group_channels * group_channels;
            for (int first = last_group; first >= tile; first -= group_channels) {
                const int count = tile_end - first < group_channels ? tile_end - first : group_channels;
                for (int row = last_row; row >= 0; row -= kStagedRows) {
                    const Group group{first, count, row, num_rows - row < kStagedRows ? num_rows - row : kStagedRows};
                    encoder.in_range &= read_group<Dtype>(plane, stream, group, staged_symbols[warp], lane);
                    __syncwarp();  // lanes read what other lanes have staged
                    encoder.encode_group(stream, group, staged_tables + (first - tile) * kTableSize, has_tables,
                                         staged_symbols[warp], lane);
                    __syncwarp();  // and are done before it is staged over
                }
            }
        }
        if (!stream.exists()) continue;
        const Status status = encoder.finish(stream, has_tables, &streams[index], lane);
        if (lane == 0) statuses[index] = static_cast<int32_t>(status);
    }
}

// Move what precedes a stream's words and its words together, zeros after them, to a multiple of 4 bytes; all threads
// of those that share the work.
__device__ inline void compact_stream(const uint8_t* slot, int64_t words_at, const uint16_t* words, int64_t num_words,
                                      uint32_t* target, int64_t num_bytes, int thread, int num_threads) {
    for (int64_t at = 4 * int64_t{thread}; at < num_bytes; at += 4 * num_threads) {
        if (at < words_at) {
            target[at / 4] = *reinterpret_cast<const uint32_t*>(slot + at);
            continue;
        }
        const int64_t word = (at - words_at) / 2;
        const uint32_t low = word < num_words ? words[word] : 0u;
        const uint32_t high = word + 1 < num_words ? words[word + 1] : 0u;
        target[at / 4] = low | high << kWordBits;
    }
}

// Grid: x = planes, y = streams of a plane, as many as there are or fewer. Streams that would leave the payload stay.
static __global__ void __launch_bounds__(kThreadsPerBlock)
    compact_kernel(const PlaneRecord* planes, int num_tokens, bool has_tables, const uint8_t* slots,
                   const StreamRecord* streams, uint8_t* payload, int64_t payload_bytes) {
    const PlaneRecord& plane = planes[blockIdx.x];
    const int num_streams = count_streams(plane, num_tokens);
    const StreamShape full{plane.tokens_per_stream, plane.num_heads * plane.head_dim};
    for (int i = static_cast<int>(blockIdx.y); i < num_streams; i += static_cast<int>(gridDim.y)) {
        const WarpStream stream = find_stream(plane, num_tokens, i);
        const StreamRecord record = streams[plane.first_stream + i];
        const int64_t padded_bytes = round_up(record.num_bytes, kStreamAlignment);
        if (record.offset < 0 || padded_bytes > payload_bytes - record.offset) continue;
        const uint8_t* slot = slots + plane.workspace + i * slot_bytes(full, plane.low_bits, has_tables);
        const int64_t num_symbols = stream.num_symbols();
        const int64_t words_at = lay_out_parts(stream.shape(), has_tables, num_symbols * plane.low_bits).words;
        const auto* words = reinterpret_cast<const uint16_t*>(slot + words_at) + num_symbols - record.num_words;
        auto* target = reinterpret_cast<uint32_t*>(payload + record.offset);
        compact_stream(slot, words_at, words, record.num_words, target, padded_bytes, static_cast<int>(threadIdx.x),
                       kThreadsPerBlock);
    }
}

}  // namespace cuda
}  // namespace cachegen
