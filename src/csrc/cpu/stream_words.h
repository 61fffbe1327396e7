// Where the streams of a batch are in their words, such that vector kernels may load ahead.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/stream_batch.h"
#include "rans.h"

namespace cachegen {

// A row of any stream takes at most 32 words, and kernels load 64 bytes to take them: behind the words of a stream
// there must be as much memory as a tile can take. Streams too near the end of the payload are copied once, with zeros
// after.
class StreamWords {
  public:
    const uint8_t* next[kMaxBatch];  // the kernels move these

    // `memory` holds num_copied_bytes(). Batch: of planes or of components.
    template <class Batch>
    StreamWords(const Batch& batch, uint8_t* memory) : num_streams_(batch.num_streams) {
        const int64_t slack = slack_of(batch.shape);
        for (int s = 0; s < num_streams_; ++s) {
            const auto& stream = batch.streams[s];
            next[s] = stream.words;
            end_[s] = stream.words_end;
            if (batch.readable_end - stream.words_end >= slack) continue;
            const int64_t num_bytes = stream.words_end - stream.words;
            std::memcpy(memory, stream.words, num_bytes);
            std::memset(memory + num_bytes, 0, slack);
            next[s] = memory;
            end_[s] = memory + num_bytes;
            memory += num_bytes + slack;
        }
    }

    template <class Batch>
    static size_t num_copied_bytes(const Batch& batch) {
        const int64_t slack = slack_of(batch.shape);
        size_t num_bytes = 0;
        for (int s = 0; s < batch.num_streams; ++s) {
            const auto& stream = batch.streams[s];
            if (batch.readable_end - stream.words_end < slack) num_bytes += stream.words_end - stream.words + slack;
        }
        return num_bytes;
    }

    // Before each tile: a stream that has taken more words than it has goes back to its end, where a tile's worth can
    // be read again.
    void begin_tile() {
        for (int s = 0; s < num_streams_; ++s) {
            if (next[s] <= end_[s]) continue;
            is_truncated_[s] = true;
            next[s] = end_[s];
        }
    }

    Status status(int s, bool is_at_start) const {
        if (is_truncated_[s] || next[s] > end_[s]) return Status::kTruncated;
        return next[s] == end_[s] && is_at_start ? Status::kOk : Status::kCorrupt;
    }

  private:
    static int64_t slack_of(const StreamShape& shape) { return (shape.num_rows() * kTileChannels + 1) * 64; }

    const uint8_t* end_[kMaxBatch];
    bool is_truncated_[kMaxBatch] = {};
    const int num_streams_;
};

}  // namespace cachegen
