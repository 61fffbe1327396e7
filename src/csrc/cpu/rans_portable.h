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

// How the streams of a plane are coded.
struct PlaneCoding {
    const FrequencyTable* tables = nullptr;  // null: coder `packed`
    const uint8_t* table_traits = nullptr;   // per table, see TableTraits; the vector kernels want them
    int64_t num_tables = 0;
    const uint16_t* table_indices = nullptr;    // per channel; null: table c codes channel c
    int low_bits = 0;                           // of all symbols, where there is no band map
    const uint8_t* channel_low_bits = nullptr;  // per channel, in the place of low_bits; then there is no band map
    const uint8_t* band_map = nullptr;          // encoder only: [num_rows][num_bands], see BandCoding
    bool has_band_map = false;
    bool is_arithmetic = false;  // coder `ac` (cpu/arithmetic_portable.h); has tables and no band maps
};

// What a stream's rows and bands say, resolved: per (row, band) the low bits, the table offset, and where the low bits
// lie. Reused from stream to stream so that decoding allocates nothing once warm.
class BandTable {
  public:
    struct Entry {
        int low_bits;
        int table_offset;
        int64_t bit_position;
    };

    // `band_map` is null where the plane has none. Returns kBadBandMap for entries out of range.
    Status build(const StreamShape& shape, const PlaneCoding& coding, const uint8_t* band_map) {
        if (coding.channel_low_bits != nullptr) return build_per_channel(shape, coding);
        channels_per_entry_ = kBandChannels;
        num_entries_ = shape.num_bands();
        entries_.resize(shape.num_rows() * num_entries_);
        int64_t position = 0;
        for (int64_t row = 0; row < shape.num_rows(); ++row) {
            for (int64_t band = 0; band < num_entries_; ++band) {
                BandCoding band_coding{coding.low_bits, 0};
                if (band_map != nullptr) band_coding = BandCoding::from_byte(band_map[row * num_entries_ + band]);
                if (band_coding.low_bits > kMaxLowBits) return Status::kBadBandMap;
                const int64_t first = band * kBandChannels;
                const int64_t last = std::min<int64_t>(first + kBandChannels, shape.num_channels);
                if (band_coding.table_offset != 0) {
                    for (int64_t channel = first; channel < last; ++channel) {
                        const int64_t index = table_index(coding, channel) + band_coding.table_offset;
                        if (index < 0 || index >= coding.num_tables) return Status::kBadBandMap;
                    }
                }
                entries_[row * num_entries_ + band] = {band_coding.low_bits, band_coding.table_offset, position};
                position += (last - first) * band_coding.low_bits * shape.live_lanes(row);
            }
        }
        num_low_bits_ = position;
        return Status::kOk;
    }

    static int64_t table_index(const PlaneCoding& coding, int64_t channel) {
        return coding.table_indices != nullptr ? coding.table_indices[channel] : channel;
    }

    const Entry& at(int64_t row, int64_t channel) const {
        return entries_[row * num_entries_ + channel / channels_per_entry_];
    }
    // Where bit `bit` of the lanes of a row and channel begins.
    int64_t bit_position(const Entry& entry, int64_t channel, int bit, int live) const {
        return entry.bit_position + ((channel % channels_per_entry_) * entry.low_bits + bit) * int64_t{live};
    }
    int64_t num_low_bits() const { return num_low_bits_; }

  private:
    Status build_per_channel(const StreamShape& shape, const PlaneCoding& coding) {
        channels_per_entry_ = 1;
        num_entries_ = shape.num_channels;
        entries_.resize(shape.num_rows() * num_entries_);
        int64_t position = 0;
        for (int64_t row = 0; row < shape.num_rows(); ++row) {
            for (int64_t channel = 0; channel < num_entries_; ++channel) {
                const int low_bits = coding.channel_low_bits[channel];
                if (low_bits > kMaxLowBits) return Status::kBadBandMap;
                entries_[row * num_entries_ + channel] = {low_bits, 0, position};
                position += int64_t{low_bits} * shape.live_lanes(row);
            }
        }
        num_low_bits_ = position;
        return Status::kOk;
    }

    std::vector<Entry> entries_;
    int64_t num_entries_ = 0;  // of a row
    int64_t channels_per_entry_ = kBandChannels;
    int64_t num_low_bits_ = 0;
};

inline StreamParts lay_out(const StreamShape& shape, const PlaneCoding& coding, const BandTable& bands) {
    return lay_out_parts(shape, coding.tables != nullptr, coding.has_band_map, bands.num_low_bits());
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
    BandTable bands;
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
    BandTable& bands = workspace.bands;
    const Status status = bands.build(shape, coding, coding.has_band_map ? coding.band_map : nullptr);
    if (status != Status::kOk) return status;
    const StreamParts parts = lay_out(shape, coding, bands);
    const size_t begin = output.size();
    output.resize(begin + parts.words, 0);
    if (coding.has_band_map) std::memcpy(&output[begin + parts.band_map], coding.band_map, shape.band_map_bytes());

    for (int64_t row = 0; row < shape.num_rows(); ++row) {
        const int live = shape.live_lanes(row);
        for (int64_t channel = 0; channel < shape.num_channels; ++channel) {
            const BandTable::Entry& band = bands.at(row, channel);
            const uint16_t* lane_symbols = symbols + channel * symbol_stride + row * kNumLanes;
            for (int bit = 0; bit < band.low_bits; ++bit) {
                uint32_t plane = 0;
                for (int lane = 0; lane < live; ++lane) plane |= ((lane_symbols[lane] >> bit) & 1u) << lane;
                const int64_t position = bands.bit_position(band, channel, bit, live);
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
        for (int64_t row = shape.num_rows() - 1; row >= 0; --row) {
            const BandTable::Entry& band = bands.at(row, channel);
            const FrequencyTable& table = coding.tables[BandTable::table_index(coding, channel) + band.table_offset];
            const uint16_t* lane_symbols = symbols + channel * symbol_stride + row * kNumLanes;
            for (int lane = shape.live_lanes(row) - 1; lane >= 0; --lane) {
                const uint32_t high = lane_symbols[lane] >> band.low_bits;
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

// Decode one stream of `num_bytes` bytes, calling sink(first_channel, num_channels, symbols, symbol_stride) with every
// tile of up to 32 channels; symbols are [num_channels][symbol_stride], tokens along the second axis.
//
// Never reads outside the stream. Corrupt bytes give a status, or wrong symbols: the checksum tells those.
template <class Sink>
Status decode_stream(const uint8_t* bytes, int64_t num_bytes, uint32_t num_words, const StreamShape& shape,
                     const PlaneCoding& coding, StreamWorkspace& workspace, Sink&& sink) {
    const int64_t states_bytes = coding.tables != nullptr ? shape.states_bytes() : 0;
    const int64_t map_bytes = coding.has_band_map ? shape.band_map_bytes() : 0;
    if (states_bytes + map_bytes > num_bytes) return Status::kTruncated;
    BandTable& bands = workspace.bands;
    const Status status = bands.build(shape, coding, coding.has_band_map ? bytes + states_bytes : nullptr);
    if (status != Status::kOk) return status;
    const StreamParts parts = lay_out(shape, coding, bands);
    if (parts.words + 2 * int64_t{num_words} != num_bytes) return Status::kTruncated;
    if (coding.tables == nullptr && num_words != 0) return Status::kCorrupt;

    uint32_t states[kNumLanes];
    std::fill(states, states + kNumLanes, kStateLow);
    if (coding.tables != nullptr)
        for (int lane = 0; lane < shape.num_lanes(); ++lane) states[lane] = load_u32(bytes + 4 * lane);
    const uint8_t* word = bytes + parts.words;
    const uint8_t* const words_end = bytes + num_bytes;

    const int64_t symbol_stride = shape.num_rows() * kNumLanes;
    const int64_t tile_channels = std::min<int64_t>(kBandChannels, shape.num_channels);
    workspace.symbols.resize(std::max<size_t>(workspace.symbols.size(), tile_channels * symbol_stride));
    uint16_t* const tile = workspace.symbols.data();
    DecodeTable table;
    for (int64_t first = 0; first < shape.num_channels; first += kBandChannels) {
        const int64_t last = std::min<int64_t>(first + kBandChannels, shape.num_channels);
        for (int64_t channel = first; channel < last; ++channel) {
            for (int64_t row = 0; row < shape.num_rows(); ++row) {
                const BandTable::Entry& band = bands.at(row, channel);
                const int live = shape.live_lanes(row);
                uint16_t* lane_symbols = tile + (channel - first) * symbol_stride + row * kNumLanes;
                if (coding.tables != nullptr) {
                    table.make(coding.tables[BandTable::table_index(coding, channel) + band.table_offset]);
                    if (!decode_row(table, live, states, &word, words_end, lane_symbols)) return Status::kTruncated;
                } else {
                    std::fill(lane_symbols, lane_symbols + kNumLanes, uint16_t{0});
                }
                if (band.low_bits > 0) {
                    for (int lane = 0; lane < live; ++lane)
                        lane_symbols[lane] = static_cast<uint16_t>(lane_symbols[lane] << band.low_bits);
                    for (int bit = 0; bit < band.low_bits; ++bit) {
                        const int64_t position = bands.bit_position(band, channel, bit, live);
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
