// Decoding rows of 32 lanes with AVX2, several streams side by side: what planes and components share.
//
// The 32 lanes of a row lie in two vectors of words: lanes 0-7 and 16-23, and lanes 8-15 and 24-31, so that packing
// them to bytes gives all lanes in order, and unpacking bytes gives the words back. The search walks a binary tree of
// starts: the place of a node and its level's successor come from one 16-byte table for the first four levels and one
// for the last, looked up for 32 lanes at once.

#pragma once

#include <cstdint>

#include "cpu/avx2.h"
#include "cpu/rans_portable.h"
#include "rans.h"

namespace cachegen::avx2 {

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

CACHEGEN_AVX2_INLINE void split_table(const FrequencyTable& table, SplitTable* split) {
    for (int half = 0; half < 2; ++half) {
        split_words(table.start + 16 * half, split->start_low + 16 * half, split->start_high + 16 * half);
        split_words(table.frequency + 16 * half, split->frequency_low + 16 * half, split->frequency_high + 16 * half);
    }
    make_tree(split->start_low, split->upper_low, split->lowest_low);
    make_tree(split->start_high, split->upper_high, split->lowest_high);
    split->root = table.start[16];
}

// The same with what LinearSearch wants, too.
struct SpreadTable {
    static constexpr int kMaxBounds = 8;

    SplitTable split;
    alignas(32) int16_t below_starts[kMaxBounds][16];  // each 16 times: one less than the starts of symbols 1 to 8
};

CACHEGEN_AVX2_INLINE void spread_table(const FrequencyTable& table, SpreadTable* spread) {
    split_table(table, &spread->split);
    for (int i = 0; i < SpreadTable::kMaxBounds; ++i)
        _mm256_store_si256(reinterpret_cast<__m256i*>(spread->below_starts[i]),
                           _mm256_set1_epi16(static_cast<int16_t>(table.start[i + 1] - 1)));
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

// Lanes 0-7 and 16-23 of an array.
CACHEGEN_AVX2_INLINE __m256i load_lanes(const uint16_t* words) {
    return _mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 16)),
                            _mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
}

CACHEGEN_AVX2_INLINE States load_states(const uint8_t* bytes, int num_lanes) {
    uint16_t low[kNumLanes] = {}, high[kNumLanes];
    for (int lane = 0; lane < kNumLanes; ++lane) high[lane] = 1;
    for (int lane = 0; lane < num_lanes; ++lane) {
        low[lane] = load_u16(bytes + 4 * lane);
        high[lane] = load_u16(bytes + 4 * lane + 2);
    }
    States states;
    for (int i = 0; i < 2; ++i) {
        states.low[i] = load_lanes(low + 8 * i);
        states.high[i] = load_lanes(high + 8 * i);
    }
    return states;
}

// Whether every lane is in the state that the encoder began in.
CACHEGEN_AVX2_INLINE bool are_at_start(const States& states) {
    bool found = true;
    for (int i = 0; i < 2; ++i) {
        const __m256i other = _mm256_xor_si256(states.high[i], _mm256_set1_epi16(1));
        const __m256i wrong = _mm256_or_si256(other, states.low[i]);
        found &= _mm256_testz_si256(wrong, wrong) != 0;
    }
    return found;
}

// Finds the symbols of kStreams streams by walking their tables' trees, and looks their words up.
template <int kStreams>
struct TreeSearch {
    const SplitTable* const* tables;

    CACHEGEN_AVX2_INLINE void find(const __m256i slots[kStreams][2], __m256i symbols[kStreams]) const {
        __m256i places[kStreams];
        for (int s = 0; s < kStreams; ++s) {
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
    }

    CACHEGEN_AVX2_INLINE void look_up(int s, __m256i symbols, __m256i frequency[2], __m256i start[2]) const {
        const __m256i is_upper = _mm256_slli_epi16(symbols, 3);  // bit 4 to bit 7
        look_up_words(tables[s]->frequency_low, tables[s]->frequency_high, symbols, is_upper, frequency);
        look_up_words(tables[s]->start_low, tables[s]->start_high, symbols, is_upper, start);
    }
};

// The same for tables of at most kBounds + 1 symbols from 0 on, fewer than 16: a symbol is the number of starts, but
// for the first one, at or below the slot. No comparison waits for another.
template <int kStreams, int kBounds>
struct LinearSearch {
    static_assert(kBounds <= SpreadTable::kMaxBounds, "a table has no more bounds");
    const SpreadTable* const* tables;

    CACHEGEN_AVX2_INLINE void find(const __m256i slots[kStreams][2], __m256i symbols[kStreams]) const {
        for (int s = 0; s < kStreams; ++s) {
            __m256i counts[2];  // negative
            for (int i = 0; i < 2; ++i) {
                const auto* bounds = reinterpret_cast<const __m256i*>(tables[s]->below_starts);
                counts[i] = _mm256_cmpgt_epi16(slots[s][i], _mm256_load_si256(bounds));
                for (int bound = 1; bound < kBounds; ++bound)
                    counts[i] =
                        _mm256_add_epi16(counts[i], _mm256_cmpgt_epi16(slots[s][i], _mm256_load_si256(bounds + bound)));
            }
            symbols[s] = _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_packs_epi16(counts[0], counts[1]));
        }
    }

    CACHEGEN_AVX2_INLINE void look_up(int s, __m256i symbols, __m256i frequency[2], __m256i start[2]) const {
        look_up_few_words(tables[s]->split.frequency_low, tables[s]->split.frequency_high, symbols, frequency);
        look_up_few_words(tables[s]->split.start_low, tables[s]->split.start_high, symbols, start);
    }
};

// One row of kStreams streams: 32 symbols of each as bytes. Their steps take turns, since those of one stream wait for
// each other. Only where kIsGeneral may lanes be dead or a table have a single symbol.
template <bool kIsGeneral, int kStreams, class Search>
CACHEGEN_AVX2_INLINE void decode_rows(const Search& search, uint32_t live, States* states, const uint8_t** words,
                                      __m256i symbols[kStreams]) {
    __m256i slots[kStreams][2];
    for (int s = 0; s < kStreams; ++s)
        for (int i = 0; i < 2; ++i)
            slots[s][i] = _mm256_and_si256(states[s].low[i], _mm256_set1_epi16(kFrequencyTotal - 1));
    search.find(slots, symbols);
    const __m256i live_bytes = bytes_of_bits(live);
    __m256i needs_word[kStreams][2];
    for (int s = 0; s < kStreams; ++s) {
        __m256i frequency[2], start[2];
        search.look_up(s, symbols[s], frequency, start);
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

}  // namespace cachegen::avx2
