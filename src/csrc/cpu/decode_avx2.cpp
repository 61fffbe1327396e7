// Decoding with AVX2: the same tiles as decode_avx512.cpp, with byte shuffles for lookups.
//
// The 32 lanes of a row lie in two vectors of words: lanes 0-7 and 16-23, and lanes 8-15 and 24-31, so that packing
// them to bytes gives all lanes in order, and unpacking bytes gives the words back. The search walks a binary tree of
// starts: the place of a node and its level's successor come from one 16-byte table for the first four levels and one
// for the last, looked up for 32 lanes at once.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx2.h"
#include "cpu/dequantize_avx2.h"
#include "cpu/rans_portable.h"
#include "cpu/stream_batch.h"
#include "cpu/stream_words.h"

namespace cachegen::avx2 {
namespace {

// A channel's table, split into low and high bytes.
struct alignas(16) SplitTable {
    uint8_t upper_low[16], upper_high[16];    // starts of levels 1 to 4 of the tree, by node + 1
    uint8_t lowest_low[16], lowest_high[16];  // starts of level 5, by node + 1 - 16
    uint8_t start_low[32], start_high[32];
    uint8_t frequency_low[32], frequency_high[32];
    uint16_t root;
};

// The bytes of the tree's nodes from those of the starts.
CACHEGEN_AVX2_INLINE void make_tree(const uint8_t starts[32], uint8_t upper[16], uint8_t lowest[16]) {
    const __m128i first = _mm_load_si128(reinterpret_cast<const __m128i*>(starts));
    const __m128i second = _mm_load_si128(reinterpret_cast<const __m128i*>(starts + 16));
    const __m128i odd = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    const __m128i mask = _mm_set1_epi16(0x00FF);
    const __m128i even = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
    // Entry p is node p - 1: level 2 has starts 8 and 24, level 3 has 4, 12, 20 and 28, level 4 has 2, 6, ..., 30, the
    // last of them at 16, that is 0.
    const __m128i order = _mm_setr_epi8(15, -1, -1, 4, 12, 2, 6, 10, 14, 1, 3, 5, 7, 9, 11, 13);
    _mm_store_si128(reinterpret_cast<__m128i*>(upper), _mm_shuffle_epi8(even, order));
    _mm_store_si128(reinterpret_cast<__m128i*>(lowest), _mm_alignr_epi8(odd, odd, 15));
}

// A bit for every symbol that occurs.
CACHEGEN_AVX2_INLINE uint32_t present_symbols(const FrequencyTable& table) {
    const __m256i zero = _mm256_setzero_si256();
    const auto* frequencies = reinterpret_cast<const __m256i*>(table.frequency);
    const __m256i absent = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_load_si256(frequencies), zero),
                                              _mm256_cmpeq_epi16(_mm256_load_si256(frequencies + 1), zero));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(absent, 0xD8)));
}

CACHEGEN_AVX2_INLINE void split_table(const FrequencyTable& table, SplitTable* split) {
    for (int half = 0; half < 2; ++half) {
        split_words(table.start + 16 * half, split->start_low + 16 * half, split->start_high + 16 * half);
        split_words(table.frequency + 16 * half, split->frequency_low + 16 * half, split->frequency_high + 16 * half);
    }
    make_tree(split->start_low, split->upper_low, split->lowest_low);
    make_tree(split->start_high, split->upper_high, split->lowest_high);
    split->root = table.start[16];
}

// One step down the tree for 32 lanes. `places` are nodes plus one.
CACHEGEN_AVX2_INLINE __m256i descend(const uint8_t low[16], const uint8_t high[16], const __m256i slots[2],
                                     __m256i places) {
    const __m256i low_bytes = _mm256_shuffle_epi8(load_twice(low), places);
    const __m256i high_bytes = _mm256_shuffle_epi8(load_twice(high), places);
    const __m256i below = _mm256_packs_epi16(_mm256_cmpgt_epi16(_mm256_unpacklo_epi8(low_bytes, high_bytes), slots[0]),
                                             _mm256_cmpgt_epi16(_mm256_unpackhi_epi8(low_bytes, high_bytes), slots[1]));
    // The children of node n are 2n and 2n + 1, that is 2p - 1 and 2p in places.
    return _mm256_add_epi8(_mm256_add_epi8(places, places), below);
}

// For each mask of eight lanes, where each lane's word lies among the words that those lanes take.
struct ExpandTable {
    alignas(16) uint8_t shuffles[256][16] = {};
    constexpr ExpandTable() {
        for (int mask = 0; mask < 256; ++mask) {
            int count = 0;
            for (int lane = 0; lane < 8; ++lane) {
                const bool takes = mask >> lane & 1;
                shuffles[mask][2 * lane] = takes ? static_cast<uint8_t>(2 * count) : 0x80;
                shuffles[mask][2 * lane + 1] = takes ? static_cast<uint8_t>(2 * count + 1) : 0x80;
                count += takes;
            }
        }
    }
};
constexpr ExpandTable kExpand;

// The next words for the lanes of a mask, in the lanes' layout.
CACHEGEN_AVX2_INLINE const uint8_t* take_words(const uint8_t* word, uint32_t mask, __m256i words[2]) {
    __m128i eights[4];
    for (int i = 0; i < 4; ++i) {
        const uint32_t lanes = mask >> (8 * i) & 255;
        const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpand.shuffles[lanes]));
        // Counted from the start, so that no load waits for the one before it.
        const uint8_t* eight = word + 2 * _mm_popcnt_u32(_bzhi_u32(mask, 8 * i));
        eights[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(eight)), shuffle);
    }
    words[0] = _mm256_set_m128i(eights[2], eights[0]);
    words[1] = _mm256_set_m128i(eights[3], eights[1]);
    return word + 2 * _mm_popcnt_u32(mask);
}

struct States {
    __m256i low[2], high[2];
};

// One row of kStreams streams: 32 symbols of each as bytes. Their steps take turns, since those of one stream wait for
// each other. Only where kIsGeneral may lanes be dead or a table have a single symbol.
template <bool kIsGeneral, int kStreams>
CACHEGEN_AVX2_INLINE void decode_rows(const SplitTable* const* tables, uint32_t live, States* states,
                                      const uint8_t** words, __m256i symbols[kStreams]) {
    __m256i slots[kStreams][2], places[kStreams];
    for (int s = 0; s < kStreams; ++s) {
        for (int i = 0; i < 2; ++i)
            slots[s][i] = _mm256_and_si256(states[s].low[i], _mm256_set1_epi16(kFrequencyTotal - 1));
        const __m256i root = _mm256_set1_epi16(static_cast<int16_t>(tables[s]->root));
        const __m256i below =
            _mm256_packs_epi16(_mm256_cmpgt_epi16(root, slots[s][0]), _mm256_cmpgt_epi16(root, slots[s][1]));
        places[s] = _mm256_add_epi8(_mm256_set1_epi8(4), below);
    }
    for (int level = 0; level < 3; ++level)
        for (int s = 0; s < kStreams; ++s)
            places[s] = descend(tables[s]->upper_low, tables[s]->upper_high, slots[s], places[s]);
    for (int s = 0; s < kStreams; ++s) {
        places[s] = descend(tables[s]->lowest_low, tables[s]->lowest_high, slots[s], places[s]);
        symbols[s] = _mm256_sub_epi8(places[s], _mm256_set1_epi8(33));
    }
    const __m256i live_bytes = bytes_of_bits(live);
    __m256i needs_word[kStreams][2];
    for (int s = 0; s < kStreams; ++s) {
        const __m256i is_upper = _mm256_slli_epi16(symbols[s], 3);  // bit 4 to bit 7
        __m256i frequency[2], start[2];
        look_up_words(tables[s]->frequency_low, tables[s]->frequency_high, symbols[s], is_upper, frequency);
        look_up_words(tables[s]->start_low, tables[s]->start_high, symbols[s], is_upper, start);
        for (int i = 0; i < 2; ++i) {
            const __m256i live_words =
                i == 0 ? _mm256_unpacklo_epi8(live_bytes, live_bytes) : _mm256_unpackhi_epi8(live_bytes, live_bytes);
            const __m256i scaled = _mm256_slli_epi16(frequency[i], 4);
            const __m256i product = _mm256_mullo_epi16(frequency[i], _mm256_srli_epi16(states[s].low[i], 12));
            const __m256i rest = _mm256_add_epi16(product, _mm256_sub_epi16(slots[s][i], start[i]));
            const __m256i low = _mm256_add_epi16(_mm256_mullo_epi16(scaled, states[s].high[i]), rest);
            const __m256i flip = _mm256_set1_epi16(static_cast<int16_t>(0x8000));
            const __m256i carries = _mm256_cmpgt_epi16(_mm256_xor_si256(rest, flip), _mm256_xor_si256(low, flip));
            __m256i high = _mm256_sub_epi16(_mm256_mulhi_epu16(scaled, states[s].high[i]), carries);
            needs_word[s][i] = _mm256_cmpeq_epi16(high, _mm256_setzero_si256());
            if (kIsGeneral) {
                const __m256i is_single = _mm256_cmpeq_epi16(frequency[i], _mm256_set1_epi16(kFrequencyTotal));
                high = _mm256_blendv_epi8(high, states[s].high[i], is_single);
                needs_word[s][i] = _mm256_and_si256(_mm256_cmpeq_epi16(high, _mm256_setzero_si256()), live_words);
                high = _mm256_blendv_epi8(states[s].high[i], high, live_words);
            }
            states[s].high[i] = high;
            states[s].low[i] = kIsGeneral ? _mm256_blendv_epi8(states[s].low[i], low, live_words) : low;
        }
    }
    for (int s = 0; s < kStreams; ++s) {
        const __m256i bytes = _mm256_packs_epi16(needs_word[s][0], needs_word[s][1]);
        __m256i taken[2];
        words[s] = take_words(words[s], static_cast<uint32_t>(_mm256_movemask_epi8(bytes)), taken);
        for (int i = 0; i < 2; ++i) {
            states[s].high[i] = _mm256_blendv_epi8(states[s].high[i], states[s].low[i], needs_word[s][i]);
            states[s].low[i] = _mm256_blendv_epi8(states[s].low[i], taken[i], needs_word[s][i]);
        }
    }
}

class TileDecoder {
  public:
    TileDecoder(const StreamBatch& batch, uint8_t* tile, uint8_t* words)
        : batch_(batch), tile_(tile), words_(batch, words) {}

    CACHEGEN_AVX2 void load() {
        for (int s = 0; s < batch_.num_streams && batch_.is_coded; ++s) {
            uint16_t low[kNumLanes] = {}, high[kNumLanes];
            for (int lane = 0; lane < kNumLanes; ++lane) high[lane] = 1;
            for (int lane = 0; lane < batch_.shape.num_lanes(); ++lane) {
                low[lane] = load_u16(batch_.streams[s].states + 4 * lane);
                high[lane] = load_u16(batch_.streams[s].states + 4 * lane + 2);
            }
            for (int i = 0; i < 2; ++i) {
                states_[s].low[i] = load_lanes(low + 8 * i);
                states_[s].high[i] = load_lanes(high + 8 * i);
            }
        }
    }

    // Decode the symbols of a tile into blocks of [channel][32 tokens].
    CACHEGEN_AVX2 void decode(int64_t first_channel, int num_channels) {
        words_.begin_tile();
        std::fill(present_, present_ + kMaxBatch, 0);
        const int64_t num_rows = batch_.shape.num_rows();
        uint8_t traits = 0;
        for (int s = 0; s < batch_.num_streams && batch_.is_coded; ++s)
            for (int i = 0; i < num_channels; ++i) traits |= batch_.streams[s].table_traits[first_channel + i];
        const bool is_general = traits & kSingleSymbol;
        for (int i = 0; i < num_channels; ++i) {
            const int64_t channel = first_channel + i;
            SplitTable tables[kMaxBatch];
            const SplitTable* table_of[kMaxBatch] = {};
            for (int s = 0; s < batch_.num_streams && batch_.is_coded; ++s) {
                // Streams of one plane share their tables.
                const bool is_shared = s > 0 && batch_.streams[s].tables == batch_.streams[s - 1].tables;
                if (!is_shared) {
                    split_table(batch_.streams[s].tables[channel], &tables[s]);
                    present_[s] |= present_symbols(batch_.streams[s].tables[channel]);
                }
                table_of[s] = is_shared ? table_of[s - 1] : &tables[s];
            }
            for (int64_t row = 0; row < num_rows; ++row) {
                int s = 0;
                for (; s + 2 <= batch_.num_streams; s += 2) decode_row<2>(table_of, is_general, s, channel, i, row);
                if (s < batch_.num_streams) decode_row<1>(table_of, is_general, s, channel, i, row);
            }
        }
    }

    // The largest symbol that the last tile can spell, low bits aside.
    int highest_symbol(int s) const {
        if (!batch_.is_coded) return (1 << batch_.low_bits) - 1;
        while (s > 0 && batch_.streams[s].tables == batch_.streams[s - 1].tables) --s;
        return 31 - __builtin_clz(present_[s] | 1);
    }

    uint8_t* block(int64_t row, int s) const { return tile_ + (row * batch_.num_streams + s) * kBlockStride; }

    CACHEGEN_AVX2 Status status(int s) const {
        bool is_at_start = true;
        for (int i = 0; i < 2 && batch_.is_coded; ++i) {
            const __m256i other = _mm256_xor_si256(states_[s].high[i], _mm256_set1_epi16(1));
            const __m256i wrong = _mm256_or_si256(other, states_[s].low[i]);
            is_at_start &= _mm256_testz_si256(wrong, wrong) != 0;
        }
        return words_.status(s, is_at_start);
    }

    static size_t tile_bytes(const StreamBatch& batch) {
        return batch.shape.num_rows() * batch.num_streams * kBlockStride;
    }

  private:
    // 64 bytes longer than a block, or blocks would share cache sets.
    static constexpr int64_t kBlockStride = 32 * kTileChannels + 64;

    // One row of a channel, of kStreams streams from `first` on.
    template <int kStreams>
    CACHEGEN_AVX2_INLINE void decode_row(const SplitTable* const* tables, bool is_general, int first, int64_t channel,
                                         int channel_in_tile, int64_t row) {
        const int live = batch_.shape.live_lanes(row);
        __m256i symbols[kStreams];
        for (__m256i& symbol : symbols) symbol = _mm256_setzero_si256();
        if (batch_.is_coded) {
            if (live < kNumLanes || is_general)
                decode_rows<true, kStreams>(tables + first, _bzhi_u32(~0u, live), states_ + first, words_.next + first,
                                            symbols);
            else
                decode_rows<false, kStreams>(tables + first, ~0u, states_ + first, words_.next + first, symbols);
        }
        for (int s = 0; s < kStreams; ++s) {
            if (batch_.low_bits > 0) symbols[s] = append_low_bits(symbols[s], first + s, channel, row, live);
            _mm256_store_si256(reinterpret_cast<__m256i*>(block(row, first + s) + 32 * channel_in_tile), symbols[s]);
        }
    }

    // Lanes 0-7 and 16-23 of an array.
    CACHEGEN_AVX2_INLINE static __m256i load_lanes(const uint16_t* words) {
        return _mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 16)),
                                _mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
    }

    CACHEGEN_AVX2_INLINE __m256i append_low_bits(__m256i symbols, int s, int64_t channel, int64_t row, int live) const {
        const int64_t position = (row * batch_.shape.num_channels * kNumLanes + channel * live) * batch_.low_bits;
        const uint8_t* planes = batch_.streams[s].low_bits;
        for (int bit = batch_.low_bits - 1; bit >= 0; --bit) {
            uint32_t plane;
            if (live == kNumLanes)
                std::memcpy(&plane, planes + position / 8 + 4 * bit, 4);
            else
                plane = read_bits(planes, position + bit * live, live);
            symbols = _mm256_sub_epi8(_mm256_add_epi8(symbols, symbols), bytes_of_bits(plane));
        }
        return symbols;
    }

    const StreamBatch& batch_;
    uint8_t* const tile_;
    StreamWords words_;
    States states_[kMaxBatch];
    uint32_t present_[kMaxBatch];  // the symbols of the last tile, where a stream does not share its tables
};

CACHEGEN_AVX2 void decode_streams(const StreamBatch& batch, Dtype dtype, Scratch& scratch, Status* statuses) {
    Dequantizer dequantizer(batch, dtype);
    const size_t tile_bytes = TileDecoder::tile_bytes(batch), table_bytes = dequantizer.table_bytes();
    uint8_t* const memory = scratch.reserve(tile_bytes + table_bytes + StreamWords::num_copied_bytes(batch));
    uint8_t* const tables = memory + tile_bytes;
    dequantizer.make_tables(tables);
    TileDecoder decoder(batch, memory, tables + table_bytes);
    decoder.load();
    for (int64_t first = 0; first < batch.shape.num_channels; first += kTileChannels) {
        const int count = static_cast<int>(std::min<int64_t>(kTileChannels, batch.shape.num_channels - first));
        decoder.decode(first, count);
        for (int s = 0; s < batch.num_streams; ++s) {
            dequantizer.begin_tile(s, first, count, decoder.highest_symbol(s));
            for (int64_t row = 0; row < batch.shape.num_rows(); ++row)
                dequantizer.write_block(decoder.block(row, s), tables, s, row * kNumLanes);
        }
    }
    if (batch.stores_bypass_caches) _mm_sfence();
    for (int s = 0; s < batch.num_streams; ++s) statuses[s] = decoder.status(s);
}

}  // namespace

void decode_batch(const StreamBatch& batch, Dtype dtype, Scratch& scratch, Status* statuses) {
    decode_streams(batch, dtype, scratch, statuses);
}

}  // namespace cachegen::avx2

#endif  // CACHEGEN_X86
