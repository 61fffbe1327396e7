// Between the cache's memory and the coder: which stream a warp has, symbols staged in shared memory, and the
// sector-wide reads and writes of quantization and dequantization. Knows no coder.
//
// Surprise: the coder walks channel by channel and needs lane = token; memory lies token by token and wants
// neighbouring lanes on neighbouring channels. A warp's staged symbols, [channel of the group][token], are where
// the two meet.

#pragma once

#include "cuda/launch.h"
#include "cuda/simt.h"

namespace cachegen {
namespace cuda {

constexpr int kWarpsPerBlock = 8;  // streams of one plane, which share the tables in shared memory
constexpr int kThreadsPerBlock = kWarpsPerBlock * kNumLanes;
constexpr int kBlocksPerProcessor = 3;  // that the decoders' registers leave room for, and their shared memory
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kStagedRows = 128;    // rows of lanes, over all channels of a group, that a warp stages
constexpr int kGroupChannels = 16;  // at most, of streams of at most 8 rows: tokens of whole 32-byte sectors
constexpr int kTileChannels = 64;   // whose tables are in shared memory at a time
constexpr int kTableBytes = 4 * kTableSize;
constexpr int kNumLevels = 256;  // a staged symbol is a byte; the largest of all quantizers is 254
static_assert(kTileChannels % kGroupChannels == 0, "groups fill tiles");

// 16 bytes that are read or written in one instruction.
template <class Value>
struct alignas(16) Piece {
    static constexpr int kNumValues = 16 / sizeof(Value);
    Value values[kNumValues];
};

// The index of a warp in its block. From lane 0, so that nvcc knows it to be the same in all lanes, and branches on it
// not to diverge.
__device__ inline int find_warp() { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kNumLanes, 0); }

__device__ inline int64_t count_channels(const PlaneRecord& plane) { return plane.num_heads * plane.head_dim; }
__device__ inline int64_t count_channels(const GroupRecord& group) { return group.num_components; }

// The stream of a warp; without tokens where the plane has fewer streams. Tokens, rows and channels fit an int.
struct WarpStream {
    int index;        // in the plane
    int first_token;  // of the chunk
    int num_tokens;
    int num_channels;

    __device__ bool exists() const { return num_tokens > 0; }
    __device__ int num_rows() const { return (num_tokens + kNumLanes - 1) / kNumLanes; }
    __device__ StreamShape shape() const { return {num_tokens, num_channels}; }
    __device__ int64_t num_symbols() const { return int64_t{num_tokens} * num_channels; }
};

// Record: of a plane or of a group of layers.
template <class Record>
__device__ int count_streams(const Record& record, int num_tokens) {
    const int tokens_per_stream = static_cast<int>(record.tokens_per_stream);
    return (num_tokens + tokens_per_stream - 1) / tokens_per_stream;
}

template <class Record>
__device__ WarpStream find_stream(const Record& record, int num_tokens, int index) {
    const int64_t first_token = index * record.tokens_per_stream, rest = num_tokens - first_token;
    const int64_t count = rest < 0 ? 0 : rest < record.tokens_per_stream ? rest : record.tokens_per_stream;
    return {index, static_cast<int>(first_token), static_cast<int>(count), static_cast<int>(count_channels(record))};
}

// What a warp stages at a time: some channels of a run of rows, one symbol per lane.
struct Group {
    int first_channel;
    int num_channels;
    int first_row;
    int num_rows;
};

// Channels of a group of streams with so many rows, at most `num_channels`, a power of two, and one, so that groups
// fill tiles.
__device__ inline int channels_per_group(int num_rows, int num_channels = kGroupChannels,
                                         int staged_rows = kStagedRows) {
    while (num_channels > 1 && num_channels * num_rows > staged_rows) num_channels /= 2;
    return num_channels;
}

// Where a group's values lie in memory.
template <class Dtype>
struct GroupMemory {
    using Storage = typename Dtype::Storage;
    static constexpr int kPieceValues = Piece<Storage>::kNumValues;

    Storage* values;  // of the group's first token
    const Storage* scales;
    int64_t token_stride;
    int64_t head_stride;
    int head_dim;
    int first_head;  // of the group's first channel
    int first_dim;
    int num_tokens;  // of the group
    bool in_pieces;  // whether all of it is whole, aligned pieces

    __device__ GroupMemory(const PlaneRecord& plane, const WarpStream& stream, const Group& group) {
        const int skipped = group.first_row * kNumLanes, rest = stream.num_tokens - skipped;
        token_stride = plane.token_stride;
        head_stride = plane.head_stride;
        head_dim = static_cast<int>(plane.head_dim);
        first_head = group.first_channel / head_dim;
        first_dim = group.first_channel - first_head * head_dim;
        num_tokens = rest < group.num_rows * kNumLanes ? rest : group.num_rows * kNumLanes;
        const int64_t token = int64_t{stream.first_token} + skipped;
        values = reinterpret_cast<Storage*>(plane.values) + token * token_stride;
        scales = reinterpret_cast<const Storage*>(plane.scales) + token;
        CACHEGEN_ASSUME_GLOBAL(values);
        CACHEGEN_ASSUME_GLOBAL(scales);
        in_pieces = group.num_channels % kPieceValues == 0 && head_dim % kPieceValues == 0 &&
                    token_stride % kPieceValues == 0 && head_stride % kPieceValues == 0 && plane.values % 16 == 0;
    }

    // The address of a token's channel, both counted from the group's first.
    __device__ Storage* at(int token, int channel) const {
        int head = first_head, dim = first_dim + channel;
        for (; dim >= head_dim; dim -= head_dim) ++head;
        return values + token * token_stride + head * head_stride + dim;
    }
};

// Dequantize a group's staged symbols into the cache; all lanes of the warp.
//
// Neighbouring lanes write the neighbouring pieces of a token, so that a store fills whole sectors.
template <class Dtype>
__device__ void write_group(const PlaneRecord& plane, const WarpStream& stream, const Group& group,
                            const uint8_t* staged, const float* levels, int lane) {
    using Storage = typename Dtype::Storage;
    const GroupMemory<Dtype> memory(plane, stream, group);
    const int channel_step = group.num_rows * kNumLanes;  // of staged symbols
    const auto dequantize = [&](int symbol, float scale) { return Dtype::narrow(levels[symbol] * scale); };
    if (memory.in_pieces) {
        constexpr int kPieceValues = Piece<Storage>::kNumValues;
        const int pieces_per_token = group.num_channels / kPieceValues;
        const int shift = pieces_per_token >> 1;  // 1, 2 or 4 pieces: log2 of it
        for (int at = lane; at < memory.num_tokens << shift; at += kNumLanes) {
            const int token = at >> shift, first = (at & (pieces_per_token - 1)) * kPieceValues;
            const float scale = Dtype::widen(memory.scales[token]);
            const uint8_t* symbols = staged + first * channel_step + token;
            Piece<Storage> piece;
            for (int i = 0; i < kPieceValues; ++i) piece.values[i] = dequantize(symbols[i * channel_step], scale);
            CACHEGEN_STORE(reinterpret_cast<Piece<Storage>*>(memory.at(token, first)), piece);
        }
    } else {
        for (int token = lane; token < memory.num_tokens; token += kNumLanes) {
            const float scale = Dtype::widen(memory.scales[token]);
            for (int channel = 0; channel < group.num_channels; ++channel)
                CACHEGEN_STORE(memory.at(token, channel), dequantize(staged[channel * channel_step + token], scale));
        }
    }
}

// Quantize a group of the cache into staged symbols; all lanes of the warp. Returns whether this lane's values lay
// within their tokens' scales; symbols of those that do not are staged as zero.
template <class Dtype>
__device__ bool read_group(const PlaneRecord& plane, const WarpStream& stream, const Group& group, uint8_t* staged,
                           int lane) {
    using Storage = typename Dtype::Storage;
    const GroupMemory<Dtype> memory(plane, stream, group);
    const int zero_symbol = zero_symbol_of(static_cast<int>(plane.num_bins));
    bool in_range = true;
    const int channel_step = group.num_rows * kNumLanes;  // of staged symbols
    const auto to_symbol = [&](Storage value, float inverse) {
        const int symbol = quantize(Dtype::widen(value), inverse, zero_symbol);
        const bool is_symbol = symbol >= 0 && symbol <= 2 * zero_symbol;
        in_range &= is_symbol;
        return static_cast<uint8_t>(is_symbol ? symbol : zero_symbol);
    };
    if (memory.in_pieces) {
        constexpr int kPieceValues = Piece<Storage>::kNumValues;
        const int pieces_per_token = group.num_channels / kPieceValues;
        const int shift = pieces_per_token >> 1;
        for (int at = lane; at < memory.num_tokens << shift; at += kNumLanes) {
            const int token = at >> shift, first = (at & (pieces_per_token - 1)) * kPieceValues;
            const float inverse = inverse_step(Dtype::widen(memory.scales[token]), zero_symbol);
            const Piece<Storage> piece = *reinterpret_cast<const Piece<Storage>*>(memory.at(token, first));
            uint8_t* symbols = staged + first * channel_step + token;
            for (int i = 0; i < kPieceValues; ++i) symbols[i * channel_step] = to_symbol(piece.values[i], inverse);
        }
    } else {
        for (int token = lane; token < memory.num_tokens; token += kNumLanes) {
            const float inverse = inverse_step(Dtype::widen(memory.scales[token]), zero_symbol);
            for (int channel = 0; channel < group.num_channels; ++channel)
                staged[channel * channel_step + token] = to_symbol(*memory.at(token, channel), inverse);
        }
    }
    return in_range;
}

// A frequency table as the kernels keep it, in the words of FrequencyTable.
struct PackedTable {
    const uint32_t* entries;

    __device__ uint32_t start_of(int symbol) const { return TableEntry::unpack(entries[symbol]).start; }
    __device__ uint32_t frequency_of(int symbol) const { return TableEntry::unpack(entries[symbol]).frequency; }
};

// Bring the tables [first, last) of a plane into shared memory; all threads of the block.
__device__ inline void load_tables(uint32_t* staged, const uint32_t* tables, int first, int last) {
    const auto* source = reinterpret_cast<const Piece<uint32_t>*>(tables + int64_t{first} * kTableSize);
    auto* target = reinterpret_cast<Piece<uint32_t>*>(staged);
    const int num_pieces = (last - first) * (kTableSize / Piece<uint32_t>::kNumValues);
    for (int i = static_cast<int>(threadIdx.x); i < num_pieces; i += kThreadsPerBlock) target[i] = source[i];
}

}  // namespace cuda
}  // namespace cachegen
