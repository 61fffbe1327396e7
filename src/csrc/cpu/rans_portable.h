// The rANS coder of one stream in portable C++: lanes are arrays, so that compilers vectorize what they can.
// stream_layout.h has the bytes of a stream.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rans.h"
#include "stream_layout.h"

namespace cachegen {

constexpr int kPortableTile = 32;  // channels that are decoded before any of them is passed on

// How the streams of a plane are coded.
struct PlaneCoding {
    const FrequencyTable* tables = nullptr;  // null: coder `packed`
    const uint8_t* table_traits = nullptr;   // per table, see TableTraits; the vector kernels want them
    int64_t num_tables = 0;
    const uint16_t* table_indices = nullptr;    // per channel; null: table c codes channel c
    int low_bits = 0;                           // of all symbols
    const uint8_t* channel_low_bits = nullptr;  // per channel, in the place of low_bits
    bool is_arithmetic = false;                 // coder `ac` (cpu/arithmetic_portable.h), which has tables

    const FrequencyTable& table_of(int64_t channel) const {
        return tables[table_indices != nullptr ? table_indices[channel] : channel];
    }
};

// Where the low bits of a stream lie: row by row, channel by channel, bit by bit, one bit per live lane. All rows but
// the last have 32 live lanes. Reused from stream to stream so that decoding allocates nothing once warm.
class LowBits {
  public:
    // Returns kBadLowBits where a channel has more than there may be.
    Status build(const StreamShape& shape, const PlaneCoding& coding) {
        uniform_ = coding.low_bits;
        if (coding.channel_low_bits == nullptr) {
            if (uniform_ > kMaxLowBits) return Status::kBadLowBits;
            channels_ = nullptr;
            per_token_ = shape.num_channels * uniform_;
        } else {
            channels_ = coding.channel_low_bits;
            before_.resize(std::max<size_t>(before_.size(), shape.num_channels));
            per_token_ = 0;
            for (int64_t channel = 0; channel < shape.num_channels; ++channel) {
                if (channels_[channel] > kMaxLowBits) return Status::kBadLowBits;
                before_[channel] = per_token_;
                per_token_ += channels_[channel];
            }
        }
        total_ = per_token_ * shape.num_tokens;
        return Status::kOk;
    }

    int of(int64_t channel) const { return channels_ != nullptr ? channels_[channel] : uniform_; }
    // Where bit 0 of the lanes of a row and channel begins; the next bit is `live` further on.
    int64_t position(int64_t row, int64_t channel, int live) const {
        const int64_t before = channels_ != nullptr ? before_[channel] : channel * uniform_;
        return row * kNumLanes * per_token_ + before * live;
    }
    // The number of low bits of the stream.
    int64_t total() const { return total_; }

  private:
    const uint8_t* channels_ = nullptr;
    int uniform_ = 0;
    std::vector<int64_t> before_;  // low bits of a token's channels before each
    int64_t per_token_ = 0;
    int64_t total_ = 0;
};

inline StreamParts lay_out(const StreamShape& shape, const PlaneCoding& coding, const LowBits& low_bits) {
    return lay_out_parts(shape, coding.tables != nullptr, low_bits.total());
}

inline uint16_t load_u16(const uint8_t* bytes) { return static_cast<uint16_t>(bytes[0] | bytes[1] << 8); }

inline uint32_t load_u32(const uint8_t* bytes) {
    return static_cast<uint32_t>(load_u16(bytes)) | static_cast<uint32_t>(load_u16(bytes + 2)) << 16;
}

inline void store_u16(uint8_t* bytes, uint32_t value) {
    bytes[0] = static_cast<uint8_t>(value);
    bytes[1] = static_cast<uint8_t>(value >> 8);
}

inline void store_u32(uint8_t* bytes, uint32_t value) {
    store_u16(bytes, value & 0xFFFF);
    store_u16(bytes + 2, value >> 16);
}

// Memory that a thread keeps from stream to stream.
struct StreamWorkspace {
    LowBits low_bits;
    std::vector<uint16_t> words;    // the encoder's output, filled from the end
    std::vector<uint16_t> symbols;  // [channels of a tile][padded tokens]
    std::vector<uint8_t> code;      // of one channel, coder `ac`
    std::vector<float> levels;
    std::vector<uint32_t> values;  // per token all its levels, in the cache's dtype
};

// Encode one stream and append it to `output`.
//
// symbols: [num_channels][symbol_stride], tokens along the second axis. Returns the number of words in *num_words.
inline Status encode_stream(const uint16_t* symbols, int64_t symbol_stride, const StreamShape& shape,
                            const PlaneCoding& coding, StreamWorkspace& workspace, std::vector<uint8_t>& output,
                            uint32_t* num_words) {
    LowBits& low_bits = workspace.low_bits;
    const Status status = low_bits.build(shape, coding);
    if (status != Status::kOk) return status;
    const StreamParts parts = lay_out(shape, coding, low_bits);
    const size_t begin = output.size();
    output.resize(begin + parts.words, 0);

    for (int64_t row = 0; row < shape.num_rows(); ++row) {
        const int live = shape.live_lanes(row);
        for (int64_t channel = 0; channel < shape.num_channels; ++channel) {
            const uint16_t* lane_symbols = symbols + channel * symbol_stride + row * kNumLanes;
            int64_t position = low_bits.position(row, channel, live);
            for (int bit = 0; bit < low_bits.of(channel); ++bit, position += live) {
                uint32_t plane = 0;
                for (int lane = 0; lane < live; ++lane) plane |= ((lane_symbols[lane] >> bit) & 1u) << lane;
                write_bits(&output[begin + parts.low_bits], position, live, plane);
            }
        }
    }
    *num_words = 0;
    if (coding.tables == nullptr) return Status::kOk;

    uint32_t states[kNumLanes];
    std::fill(states, states + kNumLanes, kStateLow);
    // A symbol gives up at most one word, so this can never be outgrown.
    if (workspace.words.size() < static_cast<size_t>(shape.num_tokens * shape.num_channels))
        workspace.words.resize(shape.num_tokens * shape.num_channels);
    uint16_t* const words_end = workspace.words.data() + workspace.words.size();
    uint16_t* word = words_end;
    for (int64_t channel = shape.num_channels - 1; channel >= 0; --channel) {
        const FrequencyTable& table = coding.table_of(channel);
        const int num_low_bits = low_bits.of(channel);
        for (int64_t row = shape.num_rows() - 1; row >= 0; --row) {
            const uint16_t* lane_symbols = symbols + channel * symbol_stride + row * kNumLanes;
            for (int lane = shape.live_lanes(row) - 1; lane >= 0; --lane) {
                const uint32_t high = lane_symbols[lane] >> num_low_bits;
                if (high >= kTableSize || table.frequency[high] == 0) return Status::kNoFrequency;
                const uint32_t frequency = table.frequency[high];
                uint32_t state = states[lane];
                if (encode_gives_word(state, frequency)) {
                    *--word = static_cast<uint16_t>(state);
                    state >>= kWordBits;
                }
                states[lane] = encode_step(state, table.start[high], frequency);
            }
        }
    }
    for (int lane = 0; lane < shape.num_lanes(); ++lane) store_u32(&output[begin + 4 * lane], states[lane]);
    *num_words = static_cast<uint32_t>(words_end - word);
    output.resize(begin + parts.words + 2 * int64_t{*num_words});
    for (uint32_t i = 0; i < *num_words; ++i) store_u16(&output[begin + parts.words + 2 * int64_t{i}], word[i]);
    return Status::kOk;
}

// A table as decoding wants it, made once per channel.
struct DecodeTable {
    const FrequencyTable* source = nullptr;
    // The starts that tell symbols apart: those of absent symbols at either end tell nothing.
    int first = 1, last = kTableSize;
    uint32_t entries[kTableSize];  // see TableEntry

    void make(const FrequencyTable& table) {
        if (source == &table) return;
        source = &table;
        first = 1;
        last = kTableSize;
        while (first < kTableSize && table.start[first] == 0) ++first;
        while (last > first && table.start[last - 1] == kFrequencyTotal) --last;
        for (int symbol = 0; symbol < kTableSize; ++symbol)
            entries[symbol] = static_cast<uint32_t>(table.start[symbol]) << 16 | table.frequency[symbol];
    }
};

// The last symbol whose start is at most the slot, for every lane: one less for each start above, which vectorizes.
inline void find_symbols(const int16_t slots[kNumLanes], const DecodeTable& table, uint16_t symbols[kNumLanes]) {
    // A local count, so that compilers see that nothing else can change it.
    int16_t counts[kNumLanes];
    std::fill(counts, counts + kNumLanes, static_cast<int16_t>(table.last - 1));
    for (int symbol = table.first; symbol < table.last; ++symbol) {
        const auto start = static_cast<int16_t>(table.entries[symbol] >> 16);
        for (int lane = 0; lane < kNumLanes; ++lane) counts[lane] -= start > slots[lane];
    }
    std::copy(counts, counts + kNumLanes, symbols);
}

// A bit for each of 32 states that needs a word.
inline uint32_t lanes_that_need_words(const uint32_t states[kNumLanes]) {
    uint8_t needs[kNumLanes];
    for (int lane = 0; lane < kNumLanes; ++lane) needs[lane] = states[lane] >> kWordBits == 0;
    uint32_t mask = 0;
    for (int first = 0; first < kNumLanes; first += 8) {
        uint64_t eight = 0;
        for (int i = 0; i < 8; ++i) eight |= static_cast<uint64_t>(needs[first + i]) << (8 * i);
        // Byte i moves to bit 56 + i; no two terms meet.
        mask |= static_cast<uint32_t>(eight * 0x0102040810204080u >> 56) << first;
    }
    return mask;
}

// Decode one row: `live` symbols into lane_symbols. Returns false where the words run out.
inline bool decode_row(const DecodeTable& table, int live, uint32_t states[kNumLanes], const uint8_t** next_word,
                       const uint8_t* words_end, uint16_t lane_symbols[kNumLanes]) {
    int16_t slots[kNumLanes];
    uint32_t frequencies[kNumLanes], offsets[kNumLanes];
    for (int lane = 0; lane < kNumLanes; ++lane) slots[lane] = static_cast<int16_t>(slot_of(states[lane]));
    find_symbols(slots, table, lane_symbols);
    const uint8_t* word = *next_word;
    if (live == kNumLanes && words_end - word >= 2 * kNumLanes) {
        // The common case: lookups, then arithmetic, then words for the few lanes that need one.
        for (int lane = 0; lane < kNumLanes; ++lane) {
            const TableEntry entry = TableEntry::unpack(table.entries[lane_symbols[lane]]);
            frequencies[lane] = entry.frequency;
            offsets[lane] = slots[lane] - entry.start;
        }
        for (int lane = 0; lane < kNumLanes; ++lane)
            states[lane] = frequencies[lane] * (states[lane] >> kFrequencyBits) + offsets[lane];
        for (uint32_t mask = lanes_that_need_words(states); mask != 0; mask &= mask - 1, word += 2) {
            uint32_t& state = states[__builtin_ctz(mask)];
            state = decode_take_word(state, load_u16(word));
        }
    } else {
        for (int lane = 0; lane < live; ++lane) {
            const TableEntry entry = TableEntry::unpack(table.entries[lane_symbols[lane]]);
            states[lane] = decode_step(states[lane], entry.start, entry.frequency);
            if (!decode_needs_word(states[lane])) continue;
            if (word == words_end) return false;
            states[lane] = decode_take_word(states[lane], load_u16(word));
            word += 2;
        }
    }
    *next_word = word;
    return true;
}

// Who is given the tiles of a decoded stream: a reference to anything that is called with (first_channel, num_channels,
// symbols, symbol_stride). One decoder is compiled for all of them.
class TileSink {
  public:
    // `sink` must outlive it.
    template <class Sink>
    TileSink(const Sink& sink)
        : sink_(&sink),
          call_([](const void* pointer, int64_t first_channel, int64_t num_channels, const uint16_t* symbols,
                   int64_t symbol_stride) {
              (*static_cast<const Sink*>(pointer))(first_channel, num_channels, symbols, symbol_stride);
          }) {}

    void operator()(int64_t first_channel, int64_t num_channels, const uint16_t* symbols, int64_t symbol_stride) const {
        call_(sink_, first_channel, num_channels, symbols, symbol_stride);
    }

  private:
    const void* sink_;
    void (*call_)(const void*, int64_t, int64_t, const uint16_t*, int64_t);
};

// Decode one stream of `num_bytes` bytes, calling sink(first_channel, num_channels, symbols, symbol_stride) with every
// tile of up to 32 channels; symbols are [num_channels][symbol_stride], tokens along the second axis.
//
// Never reads outside the stream. Corrupt bytes give a status, or wrong symbols: the checksum tells those.
inline Status decode_stream(const uint8_t* bytes, int64_t num_bytes, uint32_t num_words, const StreamShape& shape,
                            const PlaneCoding& coding, StreamWorkspace& workspace, const TileSink& sink) {
    LowBits& low_bits = workspace.low_bits;
    const Status status = low_bits.build(shape, coding);
    if (status != Status::kOk) return status;
    const StreamParts parts = lay_out(shape, coding, low_bits);
    if (parts.words + 2 * int64_t{num_words} != num_bytes) return Status::kTruncated;
    if (coding.tables == nullptr && num_words != 0) return Status::kCorrupt;

    uint32_t states[kNumLanes];
    std::fill(states, states + kNumLanes, kStateLow);
    if (coding.tables != nullptr)
        for (int lane = 0; lane < shape.num_lanes(); ++lane) states[lane] = load_u32(bytes + 4 * lane);
    const uint8_t* word = bytes + parts.words;
    const uint8_t* const words_end = bytes + num_bytes;

    const int64_t symbol_stride = shape.num_rows() * kNumLanes;
    const int64_t tile_channels = std::min<int64_t>(kPortableTile, shape.num_channels);
    workspace.symbols.resize(std::max<size_t>(workspace.symbols.size(), tile_channels * symbol_stride));
    uint16_t* const tile = workspace.symbols.data();
    DecodeTable table;
    for (int64_t first = 0; first < shape.num_channels; first += kPortableTile) {
        const int64_t last = std::min<int64_t>(first + kPortableTile, shape.num_channels);
        for (int64_t channel = first; channel < last; ++channel) {
            const int num_low_bits = low_bits.of(channel);
            if (coding.tables != nullptr) table.make(coding.table_of(channel));
            for (int64_t row = 0; row < shape.num_rows(); ++row) {
                const int live = shape.live_lanes(row);
                uint16_t* lane_symbols = tile + (channel - first) * symbol_stride + row * kNumLanes;
                if (coding.tables != nullptr) {
                    if (!decode_row(table, live, states, &word, words_end, lane_symbols)) return Status::kTruncated;
                } else {
                    std::fill(lane_symbols, lane_symbols + kNumLanes, uint16_t{0});
                }
                if (num_low_bits > 0) {
                    for (int lane = 0; lane < live; ++lane)
                        lane_symbols[lane] = static_cast<uint16_t>(lane_symbols[lane] << num_low_bits);
                    int64_t position = low_bits.position(row, channel, live);
                    for (int bit = 0; bit < num_low_bits; ++bit, position += live) {
                        const uint32_t plane = read_bits(bytes + parts.low_bits, position, live);
                        for (int lane = 0; lane < live; ++lane) lane_symbols[lane] |= ((plane >> lane) & 1u) << bit;
                    }
                }
            }
        }
        sink(first, last - first, tile, symbol_stride);
    }
    if (word != words_end) return Status::kCorrupt;
    for (uint32_t state : states)
        if (state != kStateLow) return Status::kCorrupt;
    return Status::kOk;
}

}  // namespace cachegen
