// Streams that are coded together: vector kernels keep several in flight, because one stream alone waits for itself.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "quantization.h"
#include "rans.h"

namespace cachegen {

constexpr int kMaxBatch = 8;       // streams in flight
constexpr int kTileChannels = 32;  // channels between two transpositions; 64 bytes of fp16

// Where the lanes of a tile lie in its tensor: runs of channels that are contiguous, because they share a head.
struct HeadRun {
    uint32_t mask;   // of the tile's 32 channels
    int64_t offset;  // elements from the token's first value to where channel 0 of the tile would be
};

struct TileRuns {
    HeadRun runs[kTileChannels];
    int num_runs = 0;

    TileRuns() = default;
    // Once per tile: not worth a copy in each kernel.
    __attribute__((noinline)) TileRuns(int64_t first_channel, int num_channels, int64_t head_dim, int64_t head_stride) {
        for (int done = 0; done < num_channels; ++num_runs) {
            const int64_t head = (first_channel + done) / head_dim, dim = (first_channel + done) % head_dim;
            const int64_t rest = num_channels - done, in_head = head_dim - dim;
            const int count = static_cast<int>(rest < in_head ? rest : in_head);
            const uint32_t ones = count == 32 ? ~0u : (1u << count) - 1;
            runs[num_runs] = {ones << done, head * head_stride + dim - done};
            done += count;
        }
    }
    bool is_whole() const { return num_runs == 1 && runs[0].mask == ~0u; }
};

// One stream of a batch: its parts in memory, its tables, and its tokens in the cache.
struct BatchStream {
    const uint8_t* states = nullptr;
    const uint8_t* low_bits = nullptr;
    const uint8_t* words = nullptr;
    const uint8_t* words_end = nullptr;
    const FrequencyTable* tables = nullptr;  // of channel 0; null: coder `packed`
    const uint8_t* table_traits = nullptr;   // of channel 0
    uint8_t* values = nullptr;               // of the stream's first token
    int64_t token_stride = 0;                // in elements
    int64_t head_stride = 0;
    const uint8_t* scales = nullptr;  // of the stream's first token
    int num_bins = 0;
};

// Streams of one shape. They may belong to different planes: tables, scales and strides are each stream's own.
struct StreamBatch {
    int num_streams = 0;
    StreamShape shape{};
    int low_bits = 0;
    int64_t head_dim = 0;
    bool is_coded = true;  // false: coder `packed`
    bool stores_bypass_caches = false;
    const uint8_t* readable_end = nullptr;  // of the buffer that holds the streams
    BatchStream streams[kMaxBatch];
};

// Memory of a worker, kept from batch to batch.
class Scratch {
  public:
    // At least `num_bytes` bytes at a multiple of 64, of undefined content.
    uint8_t* reserve(size_t num_bytes) {
        if (num_bytes > num_bytes_) {
            bytes_.reset(new uint8_t[num_bytes + 63]);
            num_bytes_ = num_bytes;
        }
        return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(bytes_.get()) + 63) & ~uintptr_t{63});
    }

  private:
    std::unique_ptr<uint8_t[]> bytes_;
    size_t num_bytes_ = 0;
};

// Values per token of a dequantization table: all symbols that bits can spell. Valid streams spell none above 255.
inline int num_level_entries(bool is_coded, int low_bits) {
    const int spelled = is_coded ? kTableSize << low_bits : 1 << low_bits;
    return spelled < 32 ? 32 : spelled > 256 ? 256 : spelled;
}

// What the encoder made of a stream.
struct EncodedStream {
    Status status = Status::kOk;
    uint32_t num_words = 0;
    int64_t num_bytes = 0;  // without padding
    std::unique_ptr<uint8_t[]> bytes;

    int64_t padded_bytes() const { return round_up(num_bytes, kStreamAlignment); }

    // Memory for the stream; the padding is zero.
    uint8_t* allocate(int64_t size) {
        num_bytes = size;
        bytes.reset(new uint8_t[padded_bytes()]);
        for (int64_t i = size; i < padded_bytes(); ++i) bytes[i] = 0;
        return bytes.get();
    }

    // Put a stream together: `num_states` states, low bits to a multiple of 4 bytes, and the words up to words_end;
    // behind them `num_more` bytes, where the next multiple of 4 begins. Returns where those are to be written.
    uint8_t* join(const uint32_t* states, int num_states, const uint8_t* low_bits, int64_t num_low_bits,
                  const uint16_t* words, const uint16_t* words_end, int64_t num_more = 0) {
        const int64_t states_bytes = 4 * num_states, low_bytes = round_up((num_low_bits + 7) / 8, 4);
        num_words = static_cast<uint32_t>(words_end - words);
        const int64_t end = states_bytes + low_bytes + 2 * int64_t{num_words};
        const int64_t more = num_more == 0 ? end : round_up(end, 4);
        uint8_t* const begin = allocate(more + num_more);
        std::memcpy(begin, states, states_bytes);
        std::memcpy(begin + states_bytes, low_bits, low_bytes);
        std::memcpy(begin + states_bytes + low_bytes, words, 2 * num_words);
        std::memset(begin + end, 0, more - end);
        return begin + more;
    }
};

}  // namespace cachegen
