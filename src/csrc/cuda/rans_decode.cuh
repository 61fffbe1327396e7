// Decoding and dequantizing: warp = stream, lane = token of a row. The bytes are those of cpu/rans_portable.h.

#pragma once

#include "cuda/planes.cuh"

namespace cachegen {
namespace cuda {

// The words of a warp's stream on their way to its lanes: a ring in shared memory, which the warp refills with one load
// of 128 bytes per kRefillWords. What a refill stores was loaded a refill ahead, so that no lane waits for memory.
//
// Bounds are checked here alone. Words behind the last one read as zero: lanes may ask for any, and finish() tells.
struct WordRing {
    static constexpr uint32_t kRefillWords = 2 * kNumLanes;  // two per lane; at most one refill per row
    static constexpr uint32_t kNumWords = 2 * kRefillWords;  // a row never takes more than kNumLanes

    const uint16_t* words;  // of the stream, 4-byte aligned
    uint32_t num_words;
    uint32_t* pairs;       // in shared memory, kNumWords / 2
    uint32_t refill_at;    // the next word from which on the ring must hold more
    uint32_t loaded_pair;  // of the next refill

    // Begin a stream; all lanes of the warp.
    __device__ void open(const uint16_t* stream_words, int64_t count, uint32_t* ring, int lane) {
        words = stream_words;
        num_words = static_cast<uint32_t>(count);
        pairs = ring;
        refill_at = kRefillWords;
        __syncwarp();  // no lane reads words of the stream before any more
        pairs[lane] = load_pair(0, lane);
        pairs[kNumLanes + lane] = load_pair(kRefillWords, lane);
        loaded_pair = load_pair(2 * kRefillWords, lane);
        __syncwarp();  // lanes read what other lanes have stored
    }

    __device__ uint32_t at(uint32_t word) const { return reinterpret_cast<const uint16_t*>(pairs)[word % kNumWords]; }

    // Store the loaded words over those before refill_at; all lanes of the warp, once the next word is at or behind it.
    __device__ void refill(int lane) {
        __syncwarp();  // no lane reads the words that are stored over any more
        pairs[(refill_at - kRefillWords) % kNumWords / 2 + lane] = loaded_pair;
        refill_at += kRefillWords;
        loaded_pair = load_pair(refill_at + kRefillWords, lane);
        __syncwarp();  // lanes read what other lanes have stored
    }

    // Load a lane's two of the words from `first` on, a multiple of two.
    __device__ uint32_t load_pair(uint32_t first, int lane) const {
        const uint32_t word = first + 2 * lane;
        if (word + 1 < num_words) return reinterpret_cast<const uint32_t*>(words)[word / 2];
        return word < num_words ? words[word] : 0;
    }
};

// A table in shared memory, and those of its entries that every search looks at.
struct SearchedTable {
    const uint32_t* entries;  // 128-byte aligned
    uint32_t middle, low_middle, high_middle;

    __device__ explicit SearchedTable(const uint32_t* table)
        : entries(table),
          middle(table[kTableSize / 2]),
          low_middle(table[kTableSize / 4]),
          high_middle(table[kTableSize / 2 + kTableSize / 4]) {}

    // The last entry that is at most `largest`: a step is a load, a comparison and an addition.
    __device__ const uint32_t* find(uint32_t largest) const {
        const bool is_high = middle <= largest;
        const uint32_t* found = is_high ? entries + kTableSize / 2 : entries;
        if ((is_high ? high_middle : low_middle) <= largest) found += kTableSize / 4;
        for (int step = kTableSize / 8; step > 0; step /= 2)
            if (found[step] <= largest) found += step;
        return found;
    }

    // The symbol of an entry, from its address: entries - found would be arithmetic with 64 bits.
    __device__ static uint32_t symbol_of(const uint32_t* found) {
        return (CACHEGEN_SHARED_ADDRESS(found) & (kTableBytes - 1)) / sizeof(uint32_t);
    }
};

// A lane's state, and the words that the lanes of its warp take turns in reading.
struct LaneDecoder {
    uint32_t state;
    WordRing ring;
    uint32_t next_word;  // beyond the ring's num_words once they have run out

    // Begin a stream, whose words lie behind the states of its lanes; all lanes of the warp.
    __device__ void open(const uint8_t* stream, int64_t words_at, int64_t num_words, uint32_t* shared_ring,
                         int num_states, int lane) {
        ring.open(reinterpret_cast<const uint16_t*>(stream + words_at), num_words, shared_ring, lane);
        state = lane < num_states ? reinterpret_cast<const uint32_t*>(stream)[lane] : kStateLow;
        next_word = 0;
    }

    // Decode one symbol in each live lane, all with one table; returns the high part.
    __device__ uint32_t decode(const SearchedTable& table, bool is_live, int lane) {
        const uint32_t* found = table.find(TableEntry::largest_at(state));
        const TableEntry entry = TableEntry::unpack(*found);
        if (is_live) state = decode_step(state, entry.start, entry.frequency);
        const bool needs_word = is_live && decode_needs_word(state);
        const uint32_t needing = __ballot_sync(kAllLanes, needs_word);
        if (needs_word) state = decode_take_word(state, ring.at(next_word + __popc(needing & ((1u << lane) - 1))));
        next_word += __popc(needing);
        if (next_word >= ring.refill_at) ring.refill(lane);
        return SearchedTable::symbol_of(found);
    }

    // What became of the stream's words and states, once all of it is decoded.
    __device__ Status finish() const {
        const uint32_t unfinished = __ballot_sync(kAllLanes, state != kStateLow);
        if (next_word > ring.num_words) return Status::kTruncated;
        if (next_word < ring.num_words || unfinished != 0) return Status::kCorrupt;
        return Status::kOk;
    }
};

// What a warp needs to decode its stream.
struct StreamDecoder {
    LaneDecoder lane_decoder;
    const uint8_t* low_bits;
    int num_low_bits;  // of a symbol

    // Take the stream apart, making every check that keeps the warp inside its bytes.
    __device__ Status open(const PlaneRecord& plane, const WarpStream& stream, bool has_tables, const uint8_t* payload,
                           int64_t payload_bytes, const StreamRecord& record, uint32_t* ring, int lane) {
        if (record.offset < 0 || record.num_bytes < 0 || record.num_bytes > payload_bytes - record.offset)
            return Status::kTruncated;
        const StreamShape shape = stream.shape();
        const uint8_t* bytes = payload + record.offset;
        num_low_bits = static_cast<int>(plane.low_bits);
        const StreamParts parts = lay_out_parts(shape, has_tables, stream.num_symbols() * plane.low_bits);
        if (record.num_words < 0 || parts.words + 2 * record.num_words != record.num_bytes) return Status::kTruncated;
        if (!has_tables && record.num_words != 0) return Status::kCorrupt;
        low_bits = bytes + parts.low_bits;
        lane_decoder.open(bytes, parts.words, record.num_words, ring, has_tables ? shape.num_lanes() : 0, lane);
        return Status::kOk;
    }

    // Whether symbols are nothing but high parts, each with the table of its channel: the short way through a group.
    __device__ bool has_high_parts_only(bool has_tables) const { return has_tables && num_low_bits == 0; }

    // Decode a group's symbols into a warp's staging where they have high parts only. `tables` are those of the group's
    // first channel and on.
    __device__ void decode_high_parts(const WarpStream& stream, const Group& group, const uint32_t* tables,
                                      uint8_t* staged, int lane) {
        const int last_row = group.first_row + group.num_rows, full_rows = stream.num_tokens / kNumLanes;
        const int last_full_row = last_row < full_rows ? last_row : full_rows;
        staged += lane;
        for (int i = 0; i < group.num_channels; ++i, tables += kTableSize) {
            const SearchedTable table(tables);
            for (int row = group.first_row; row < last_full_row; ++row, staged += kNumLanes)
                *staged = static_cast<uint8_t>(lane_decoder.decode(table, true, lane));
            if (last_full_row == last_row) continue;
            const bool is_live = full_rows * kNumLanes + lane < stream.num_tokens;
            *staged = static_cast<uint8_t>(lane_decoder.decode(table, is_live, lane));
            staged += kNumLanes;
        }
    }

    // The same for any symbols.
    __device__ void decode_group(const WarpStream& stream, const Group& group, const uint32_t* tables, bool has_tables,
                                 uint8_t* staged, int lane) {
        staged += lane;
        for (int i = 0; i < group.num_channels; ++i, tables += kTableSize) {
            const int channel = group.first_channel + i;
            for (int row = group.first_row; row < group.first_row + group.num_rows; ++row, staged += kNumLanes) {
                const bool is_live = row * kNumLanes + lane < stream.num_tokens;
                const int live_lanes = stream.shape().live_lanes(row);
                uint32_t symbol = 0;
                if (has_tables) symbol = lane_decoder.decode(SearchedTable(tables), is_live, lane) << num_low_bits;
                const int64_t before = int64_t{row} * kNumLanes * stream.num_channels + int64_t{channel} * live_lanes;
                for (int bit = 0; bit < num_low_bits && is_live; ++bit) {
                    const int64_t position = before * num_low_bits + bit * live_lanes + lane;
                    symbol |= read_bits(low_bits, position, 1) << bit;
                }
                *staged = static_cast<uint8_t>(symbol);
            }
        }
    }
};

// Grid: x = planes, y = blocks of eight streams of a plane, as many as there are or fewer.
template <class Dtype>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksPerProcessor)
    decode_kernel(const PlaneRecord* planes, int num_tokens, const uint32_t* tables, const uint8_t* payload,
                  int64_t payload_bytes, const StreamRecord* streams, int32_t* statuses) {
    alignas(kTableBytes) __shared__ uint32_t staged_tables[kTileChannels * kTableSize];
    __shared__ float levels[kNumLevels];
    __shared__ uint8_t staged_symbols[kWarpsPerBlock][kStagedRows * kNumLanes];
    __shared__ uint32_t rings[kWarpsPerBlock][WordRing::kNumWords / 2];
    const int lane = static_cast<int>(threadIdx.x) % kNumLanes, warp = find_warp();
    const PlaneRecord& plane = planes[blockIdx.x];
    const bool has_tables = tables != nullptr;
    const int num_channels = static_cast<int>(plane.num_heads * plane.head_dim);
    const int zero_symbol = zero_symbol_of(static_cast<int>(plane.num_bins));
    for (int symbol = static_cast<int>(threadIdx.x); symbol < kNumLevels; symbol += kThreadsPerBlock)
        levels[symbol] = level_of(symbol, zero_symbol);

    const int num_streams = count_streams(plane, num_tokens);
    for (int first_stream = static_cast<int>(blockIdx.y) * kWarpsPerBlock; first_stream < num_streams;
         first_stream += static_cast<int>(gridDim.y) * kWarpsPerBlock) {
        const WarpStream stream = find_stream(plane, num_tokens, first_stream + warp);
        const int64_t index = plane.first_stream + stream.index;
        StreamDecoder decoder;
        Status status = Status::kOk;
        if (stream.exists())
            status = decoder.open(plane, stream, has_tables, payload, payload_bytes, streams[index], rings[warp], lane);
        const bool is_active = stream.exists() && status == Status::kOk;
        const int num_rows = stream.num_rows(), group_channels = channels_per_group(num_rows);
        for (int tile = 0; tile < num_channels; tile += kTileChannels) {
            const int tile_end = tile + kTileChannels < num_channels ? tile + kTileChannels : num_channels;
            __syncthreads();  // nobody reads the tables of the tile before any more
            if (has_tables) load_tables(staged_tables, tables + plane.first_table * kTableSize, tile, tile_end);
            __syncthreads();
            if (!is_active) continue;
            for (int first = tile; first < tile_end; first += group_channels) {
                const int count = tile_end - first < group_channels ? tile_end - first : group_channels;
                for (int row = 0; row < num_rows; row += kStagedRows) {
                    const Group group{first, count, row, num_rows - row < kStagedRows ? num_rows - row : kStagedRows};
                    const uint32_t* group_tables = staged_tables + (first - tile) * kTableSize;
                    if (decoder.has_high_parts_only(has_tables))
                        decoder.decode_high_parts(stream, group, group_tables, staged_symbols[warp], lane);
                    else
                        decoder.decode_group(stream, group, group_tables, has_tables, staged_symbols[warp], lane);
                    __syncwarp();  // lanes read what other lanes have staged
                    write_group<Dtype>(plane, stream, group, staged_symbols[warp], levels, lane);
                    __syncwarp();  // and are done before it is staged over
                }
            }
        }
        if (is_active) status = decoder.lane_decoder.finish();
        if (stream.exists() && lane == 0) statuses[index] = static_cast<int32_t>(status);
    }
}

}  // namespace cuda
}  // namespace cachegen
