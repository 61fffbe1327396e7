// Coder `ac`: a block per stream, a thread per channel. The bytes are those of cpu/arithmetic_portable.h.
//
// Codes of neighbouring channels have no common step, so that there is nothing for a warp to share; what threads do
// together is to find where each channel's code begins. As with rans, encoding takes two launches: every code goes into
// a slot that it cannot outgrow, then compaction moves the codes together.

#pragma once

#include "arithmetic_coder.h"
#include "cuda/planes.cuh"

namespace cachegen {
namespace cuda {

__device__ inline PackedTable table_of(const PlaneRecord& plane, const uint32_t* tables, int channel) {
    return {tables + (plane.first_table + channel) * kTableSize};
}

// The values of one channel of a stream.
template <class Dtype>
struct ChannelMemory {
    using Storage = typename Dtype::Storage;

    Storage* values;  // of the stream's first token
    const Storage* scales;
    int64_t token_stride;

    __device__ ChannelMemory(const PlaneRecord& plane, const WarpStream& stream, int channel) {
        const int head_dim = static_cast<int>(plane.head_dim), head = channel / head_dim;
        const int64_t first_token = stream.first_token;
        token_stride = plane.token_stride;
        values = reinterpret_cast<Storage*>(plane.values) + first_token * token_stride + head * plane.head_stride +
                 (channel - head * head_dim);
        scales = reinterpret_cast<const Storage*>(plane.scales) + first_token;
        CACHEGEN_ASSUME_GLOBAL(values);
        CACHEGEN_ASSUME_GLOBAL(scales);
    }

    // The symbol of a token, or -1 where its value lies outside its token's scale.
    __device__ int symbol_at(int token, int zero_symbol) const {
        const float inverse = inverse_step(Dtype::widen(scales[token]), zero_symbol);
        const int symbol = quantize(Dtype::widen(values[token * token_stride]), inverse, zero_symbol);
        return symbol >= 0 && symbol <= 2 * zero_symbol ? symbol : -1;
    }
};

// 32 bits of a stream's low bits, the word of index `word`; bits beyond the last are zero.
template <class Dtype>
__device__ uint32_t gather_low_bits(const PlaneRecord& plane, const WarpStream& stream, int64_t word) {
    const int64_t low_bits = plane.low_bits, row_bits = kNumLanes * stream.num_channels * low_bits;
    const int zero_symbol = zero_symbol_of(static_cast<int>(plane.num_bins));
    const int64_t num_bits = stream.num_symbols() * low_bits;
    uint32_t bits = 0;
    for (int i = 0; i < 32 && word * 32 + i < num_bits; ++i) {
        const int64_t position = word * 32 + i;
        const int row = static_cast<int>(position / row_bits), live_lanes = stream.shape().live_lanes(row);
        const int64_t within = position - row * row_bits;
        const int channel = static_cast<int>(within / (low_bits * live_lanes));
        const int rest = static_cast<int>(within - channel * low_bits * live_lanes);
        const int token = row * kNumLanes + rest % live_lanes;
        const int symbol = ChannelMemory<Dtype>(plane, stream, channel).symbol_at(token, zero_symbol);
        bits |= (static_cast<uint32_t>(symbol) >> (rest / live_lanes) & 1u) << i;
    }
    return bits;
}

// Walks a stream's channels, as many at a time as the block has threads, and finds where their codes begin.
class CodeWalk {
  public:
    // `lengths` are the channels' u16 lengths; `shared` has room for one per thread.
    __device__ CodeWalk(const uint8_t* lengths, int num_channels, uint32_t* shared)
        : lengths_(lengths), num_channels_(num_channels), shared_(shared) {}

    // The length of the code of channel first + threadIdx.x, and in *offset the bytes of all codes before it; all
    // threads of the block, for first = 0, then kThreadsPerBlock, ... Threads beyond the last channel get length 0.
    __device__ uint32_t next(int first, int64_t* offset) {
        const int thread = static_cast<int>(threadIdx.x), channel = first + thread;
        const uint8_t* length = lengths_ + kCodeLengthBytes * int64_t{channel};
        __syncthreads();  // nobody sums the lengths before any more
        shared_[thread] = channel < num_channels_ ? static_cast<uint32_t>(length[0] | length[1] << 8) : 0;
        __syncthreads();
        *offset = before_;
        for (int other = 0; other < kThreadsPerBlock; ++other) {
            if (other < thread) *offset += shared_[other];
            before_ += shared_[other];
        }
        return shared_[thread];
    }

    // The bytes of all codes walked over.
    __device__ int64_t num_bytes() const { return before_; }

  private:
    const uint8_t* lengths_;
    int num_channels_;
    uint32_t* shared_;
    int64_t before_ = 0;
};

// Grid: x = planes, y = streams of a plane, as many as there are or fewer. `statuses` starts as zero; where threads
// meet different problems, the largest stays.
template <class Dtype>
__global__ void __launch_bounds__(kThreadsPerBlock)
    encode_codes_kernel(const PlaneRecord* planes, int num_tokens, const uint32_t* tables, uint8_t* slots,
                        StreamRecord* streams, int32_t* statuses) {
    __shared__ uint32_t lengths[kThreadsPerBlock];
    const PlaneRecord& plane = planes[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x), low_bits = static_cast<int>(plane.low_bits);
    const int zero_symbol = zero_symbol_of(static_cast<int>(plane.num_bins));
    const int64_t capacity = max_code_bytes(plane.tokens_per_stream);
    const int num_streams = count_streams(plane, num_tokens);
    for (int i = static_cast<int>(blockIdx.y); i < num_streams; i += static_cast<int>(gridDim.y)) {
        const WarpStream stream = find_stream(plane, num_tokens, i);
        const CodeParts parts = lay_out_codes(stream.shape(), plane.low_bits);
        const StreamShape full{plane.tokens_per_stream, stream.num_channels};
        uint8_t* slot = slots + plane.workspace + i * code_slot_bytes(full, plane.low_bits);
        for (int64_t word = thread; word < parts.lengths / 4; word += kThreadsPerBlock)
            reinterpret_cast<uint32_t*>(slot)[word] = gather_low_bits<Dtype>(plane, stream, word);
        for (int64_t at = parts.lengths + kCodeLengthBytes * int64_t{stream.num_channels} + thread; at < parts.codes;
             at += kThreadsPerBlock)
            slot[at] = 0;
        Status status = Status::kOk;
        for (int channel = thread; channel < stream.num_channels; channel += kThreadsPerBlock) {
            const ChannelMemory<Dtype> memory(plane, stream, channel);
            const PackedTable table = table_of(plane, tables, channel);
            ArithmeticEncoder encoder(slot + parts.codes + channel * capacity, capacity);
            for (int token = 0; token < stream.num_tokens; ++token) {
                const int symbol = memory.symbol_at(token, zero_symbol), high = symbol >> low_bits;
                if (symbol < 0) {
                    status = Status::kNotFinite;
                } else if (high >= kTableSize || table.frequency_of(high) == 0) {
                    if (status == Status::kOk) status = Status::kNoFrequency;
                } else {
                    encoder.encode(table.start_of(high), table.frequency_of(high));
                }
            }
            const int64_t num_bytes = encoder.finish();
            uint8_t* length = slot + parts.lengths + kCodeLengthBytes * channel;
            length[0] = static_cast<uint8_t>(num_bytes);
            length[1] = static_cast<uint8_t>(num_bytes >> 8);
        }
        const int64_t index = plane.first_stream + i;
        if (status != Status::kOk)
            atomicMax(reinterpret_cast<uint32_t*>(&statuses[index]), static_cast<uint32_t>(status));
        __syncthreads();  // all lengths are there
        CodeWalk walk(slot + parts.lengths, stream.num_channels, lengths);
        int64_t offset;
        for (int first = 0; first < stream.num_channels; first += kThreadsPerBlock) walk.next(first, &offset);
        if (thread == 0) {
            streams[index].num_bytes = parts.codes + walk.num_bytes();
            streams[index].num_words = 0;
        }
    }
}

// Grid: as above. Streams that would leave the payload stay.
static __global__ void __launch_bounds__(kThreadsPerBlock)
    compact_codes_kernel(const PlaneRecord* planes, int num_tokens, const uint8_t* slots, const StreamRecord* streams,
                         uint8_t* payload, int64_t payload_bytes) {
    __shared__ uint32_t lengths[kThreadsPerBlock];
    const PlaneRecord& plane = planes[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x), num_streams = count_streams(plane, num_tokens);
    const int64_t capacity = max_code_bytes(plane.tokens_per_stream);
    for (int i = static_cast<int>(blockIdx.y); i < num_streams; i += static_cast<int>(gridDim.y)) {
        const WarpStream stream = find_stream(plane, num_tokens, i);
        const CodeParts parts = lay_out_codes(stream.shape(), plane.low_bits);
        const StreamShape full{plane.tokens_per_stream, stream.num_channels};
        const uint8_t* slot = slots + plane.workspace + i * code_slot_bytes(full, plane.low_bits);
        const StreamRecord record = streams[plane.first_stream + i];
        const int64_t padded_bytes = round_up(record.num_bytes, kStreamAlignment);
        if (record.offset < 0 || padded_bytes > payload_bytes - record.offset) continue;
        uint8_t* target = payload + record.offset;
        for (int64_t at = thread; at < parts.codes; at += kThreadsPerBlock) target[at] = slot[at];
        for (int64_t at = record.num_bytes + thread; at < padded_bytes; at += kThreadsPerBlock) target[at] = 0;
        CodeWalk walk(slot + parts.lengths, stream.num_channels, lengths);
        for (int first = 0; first < stream.num_channels; first += kThreadsPerBlock) {
            int64_t offset;
            const int64_t num_bytes = walk.next(first, &offset);
            const uint8_t* code = slot + parts.codes + (first + thread) * capacity;
            for (int64_t at = 0; at < num_bytes; ++at) target[parts.codes + offset + at] = code[at];
        }
    }
}

// Grid: as above. `statuses` starts as zero.
template <class Dtype>
__global__ void __launch_bounds__(kThreadsPerBlock)
    decode_codes_kernel(const PlaneRecord* planes, int num_tokens, const uint32_t* tables, const uint8_t* payload,
                        int64_t payload_bytes, const StreamRecord* streams, int32_t* statuses) {
    __shared__ uint32_t lengths[kThreadsPerBlock];
    const PlaneRecord& plane = planes[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x), low_bits = static_cast<int>(plane.low_bits);
    const int zero_symbol = zero_symbol_of(static_cast<int>(plane.num_bins));
    const int num_streams = count_streams(plane, num_tokens);
    for (int i = static_cast<int>(blockIdx.y); i < num_streams; i += static_cast<int>(gridDim.y)) {
        const WarpStream stream = find_stream(plane, num_tokens, i);
        const CodeParts parts = lay_out_codes(stream.shape(), plane.low_bits);
        const int64_t index = plane.first_stream + i;
        const StreamRecord record = streams[index];
        // The same in all threads of the block, which walk on together.
        Status status = Status::kOk;
        if (record.offset < 0 || record.num_bytes < parts.codes || record.num_bytes > payload_bytes - record.offset)
            status = Status::kTruncated;
        const uint8_t* bytes = payload + record.offset;
        if (status == Status::kOk) {
            CodeWalk walk(bytes + parts.lengths, stream.num_channels, lengths);
            int64_t offset;
            for (int first = 0; first < stream.num_channels; first += kThreadsPerBlock) walk.next(first, &offset);
            if (parts.codes + walk.num_bytes() != record.num_bytes)
                status = Status::kTruncated;
            else if (record.num_words != 0)
                status = Status::kCorrupt;
        }
        if (status != Status::kOk) {
            if (thread == 0) statuses[index] = static_cast<int32_t>(status);
            continue;
        }
        CodeWalk walk(bytes + parts.lengths, stream.num_channels, lengths);
        for (int first = 0; first < stream.num_channels; first += kThreadsPerBlock) {
            int64_t offset;
            const int64_t num_bytes = walk.next(first, &offset);
            const int channel = first + thread;
            if (channel >= stream.num_channels) continue;
            const ChannelMemory<Dtype> memory(plane, stream, channel);
            const PackedTable table = table_of(plane, tables, channel);
            ArithmeticDecoder decoder(bytes + parts.codes + offset, num_bytes);
            for (int token = 0; token < stream.num_tokens; ++token) {
                int symbol = decoder.decode(table) << low_bits;
                const int row = token / kNumLanes, live_lanes = stream.shape().live_lanes(row);
                const int64_t position =
                    (int64_t{row} * kNumLanes * stream.num_channels + int64_t{channel} * live_lanes) * low_bits +
                    token % kNumLanes;
                for (int bit = 0; bit < low_bits; ++bit)
                    symbol |= static_cast<int>(read_bits(bytes, position + bit * live_lanes, 1)) << bit;
                const float scale = Dtype::widen(memory.scales[token]);
                memory.values[token * memory.token_stride] = Dtype::narrow(level_of(symbol, zero_symbol) * scale);
            }
            if (!decoder.is_at_end())
                atomicMax(reinterpret_cast<uint32_t*>(&statuses[index]), static_cast<uint32_t>(Status::kCorrupt));
        }
    }
}

}  // namespace cuda
}  // namespace cachegen
