// Decoding with AVX-512: rANS of up to eight streams in flight, transposition and dequantization, tile by tile.
//
// A tile is 32 channels of all tokens of the batch's streams. First the symbols are decoded channel by channel, in the
// order of the bitstream; then blocks of 32 channels by 64 tokens are transposed and written as token rows.
//
// The 32-bit states of a row lie in two vectors of 16-bit halves, so that 32 lanes fill one register each:
//     x' = f * (x >> 12) + slot - start
//        = (16 f * high) + (f * (low >> 12) + slot - start),    where the second part is below 2^16.
// 16 f does not fit 16 bits where f = 4096, the only symbol of its table: such lanes keep their high half.

#include "cpu/cpu_path.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx512.h"
#include "cpu/dequantize_avx512.h"
#include "cpu/rans_portable.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx512 {
namespace {

// The states of a batch's streams and where their next words are.
struct Lanes {
    __m512i low[kMaxBatch];
    __m512i high[kMaxBatch];
    const uint8_t* word[kMaxBatch];
};

CACHEGEN_AVX512_INLINE __m512i low_words(__m512i first, __m512i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)), _mm512_cvtepi32_epi16(second), 1);
}

CACHEGEN_AVX512 void load_states(const uint8_t* bytes, int num_lanes, __m512i* low, __m512i* high) {
    const __m512i start = _mm512_set1_epi32(kStateLow);
    const __mmask32 live = first_lanes(num_lanes);
    const __m512i first = _mm512_mask_loadu_epi32(start, static_cast<__mmask16>(live), bytes);
    const __m512i second = _mm512_mask_loadu_epi32(start, static_cast<__mmask16>(live >> 16), bytes + 64);
    *low = low_words(first, second);
    *high = low_words(_mm512_srli_epi32(first, 16), _mm512_srli_epi32(second, 16));
}

// The last symbol whose start is at most the slot: a binary search with one table lookup per step. Loads that begin
// within `start` may end within `frequency`, but no lane looks there.
template <bool kWide>
CACHEGEN_AVX512_INLINE __m512i find_symbols(__m512i slots, const FrequencyTable& table) {
    const uint16_t* starts = table.start;
    __m512i symbols;
    __mmask32 is_above;
    if (kWide) {
        is_above = _mm512_cmpge_epu16_mask(slots, _mm512_permutexvar_epi16(_mm512_set1_epi16(16), _mm512_load_si512(starts)));
        symbols = _mm512_maskz_mov_epi16(is_above, _mm512_set1_epi16(16));
        is_above = _mm512_cmpge_epu16_mask(slots, _mm512_permutexvar_epi16(symbols, _mm512_loadu_si512(starts + 8)));
        symbols = _mm512_mask_add_epi16(symbols, is_above, symbols, _mm512_set1_epi16(8));
    } else {
        is_above = _mm512_cmpge_epu16_mask(slots, _mm512_permutexvar_epi16(_mm512_set1_epi16(8), _mm512_load_si512(starts)));
        symbols = _mm512_maskz_mov_epi16(is_above, _mm512_set1_epi16(8));
    }
    is_above = _mm512_cmpge_epu16_mask(slots, _mm512_permutexvar_epi16(symbols, _mm512_loadu_si512(starts + 4)));
    symbols = _mm512_mask_add_epi16(symbols, is_above, symbols, _mm512_set1_epi16(4));
    is_above = _mm512_cmpge_epu16_mask(slots, _mm512_permutexvar_epi16(symbols, _mm512_loadu_si512(starts + 2)));
    symbols = _mm512_mask_add_epi16(symbols, is_above, symbols, _mm512_set1_epi16(2));
    is_above = _mm512_cmpge_epu16_mask(slots, _mm512_permutexvar_epi16(symbols, _mm512_loadu_si512(starts + 1)));
    return _mm512_mask_add_epi16(symbols, is_above, symbols, _mm512_set1_epi16(1));
}

// One full row of several streams, none of whose tables has a single symbol, with 64 readable bytes at every `word`.
template <int kCount, bool kWide>
CACHEGEN_AVX512_INLINE void decode_rows(const FrequencyTable* const tables[kCount], __m512i low[kCount],
                                        __m512i high[kCount], const uint8_t* word[kCount], __m512i symbols[kCount]) {
    const __m512i slot_mask = _mm512_set1_epi16(kFrequencyTotal - 1);
#pragma GCC unroll 8
    for (int s = 0; s < kCount; ++s) {
        const __m512i slots = _mm512_and_si512(low[s], slot_mask);
        symbols[s] = find_symbols<kWide>(slots, *tables[s]);
        const __m512i frequency = _mm512_permutexvar_epi16(symbols[s], _mm512_load_si512(tables[s]->frequency));
        const __m512i start = _mm512_permutexvar_epi16(symbols[s], _mm512_load_si512(tables[s]->start));
        const __m512i scaled = _mm512_slli_epi16(frequency, 4);
        const __m512i rest = _mm512_add_epi16(_mm512_mullo_epi16(frequency, _mm512_srli_epi16(low[s], 12)),
                                              _mm512_sub_epi16(slots, start));
        const __m512i next_low = _mm512_add_epi16(_mm512_mullo_epi16(scaled, high[s]), rest);
        const __mmask32 carries = _mm512_cmplt_epu16_mask(next_low, rest);
        __m512i next_high = _mm512_mulhi_epu16(scaled, high[s]);
        next_high = _mm512_mask_sub_epi16(next_high, carries, next_high, _mm512_set1_epi16(-1));
        const __mmask32 needs_word = _mm512_testn_epi16_mask(next_high, next_high);
        high[s] = _mm512_mask_mov_epi16(next_high, needs_word, next_low);
        low[s] = _mm512_mask_expand_epi16(next_low, needs_word, _mm512_loadu_si512(word[s]));
        word[s] += 2 * _mm_popcnt_u32(needs_word);
    }
}

// One row of one stream, whatever it is: some lanes may be dead, tables may have a single symbol, words may run out.
// Words that are not there read as zero; the pointer moves on, which the end check sees.
CACHEGEN_AVX512 __m512i decode_any_row(const FrequencyTable& table, __mmask32 live, const uint8_t* words_end,
                                       __m512i* low, __m512i* high, const uint8_t** word) {
    const __m512i slots = _mm512_and_si512(*low, _mm512_set1_epi16(kFrequencyTotal - 1));
    const __m512i symbols = find_symbols<true>(slots, table);
    const __m512i frequency = _mm512_permutexvar_epi16(symbols, _mm512_load_si512(table.frequency));
    const __m512i start = _mm512_permutexvar_epi16(symbols, _mm512_load_si512(table.start));
    const __m512i scaled = _mm512_slli_epi16(frequency, 4);
    const __m512i rest = _mm512_add_epi16(_mm512_mullo_epi16(frequency, _mm512_srli_epi16(*low, 12)),
                                          _mm512_sub_epi16(slots, start));
    __m512i next_low = _mm512_add_epi16(_mm512_mullo_epi16(scaled, *high), rest);
    const __mmask32 carries = _mm512_cmplt_epu16_mask(next_low, rest);
    __m512i next_high = _mm512_mulhi_epu16(scaled, *high);
    next_high = _mm512_mask_sub_epi16(next_high, carries, next_high, _mm512_set1_epi16(-1));
    const __mmask32 is_single = _mm512_cmpeq_epi16_mask(frequency, _mm512_set1_epi16(kFrequencyTotal));
    next_high = _mm512_mask_mov_epi16(next_high, is_single, *high);

    const __mmask32 needs_word = _mm512_mask_testn_epi16_mask(live, next_high, next_high);
    const __m512i words = _mm512_maskz_loadu_epi16(first_lanes((words_end - *word) / 2), *word);
    next_high = _mm512_mask_mov_epi16(next_high, needs_word, next_low);
    next_low = _mm512_mask_expand_epi16(next_low, needs_word, words);
    *high = _mm512_mask_mov_epi16(*high, live, next_high);
    *low = _mm512_mask_mov_epi16(*low, live, next_low);
    *word += 2 * _mm_popcnt_u32(needs_word);
    return symbols;
}

// Append the raw bits of a full row: each bit plane is one 32-bit word.
CACHEGEN_AVX512_INLINE __m512i append_low_bits(__m512i symbols, const uint8_t* planes, int low_bits) {
    symbols = _mm512_sll_epi16(symbols, _mm_cvtsi32_si128(low_bits));
    for (int bit = 0; bit < low_bits; ++bit) {
        uint32_t plane;
        std::memcpy(&plane, planes + 4 * bit, 4);
        symbols = _mm512_mask_add_epi16(symbols, plane, symbols, _mm512_set1_epi16(static_cast<int16_t>(1 << bit)));
    }
    return symbols;
}

CACHEGEN_AVX512 __m512i append_tail_low_bits(__m512i symbols, const uint8_t* bytes, int64_t position, int low_bits,
                                             int live) {
    symbols = _mm512_sll_epi16(symbols, _mm_cvtsi32_si128(low_bits));
    for (int bit = 0; bit < low_bits; ++bit, position += live)
        symbols = _mm512_mask_add_epi16(symbols, read_bits(bytes, position, live), symbols,
                                        _mm512_set1_epi16(static_cast<int16_t>(1 << bit)));
    return symbols;
}

template <int kStreams>
class TileDecoder {
  public:
    static constexpr int kPairs = (kStreams + 1) / 2;
    static constexpr int kGroup = kStreams < 4 ? kStreams : 4;

    TileDecoder(const StreamBatch& batch, uint8_t* tile) : batch_(batch), tile_(tile) {}

    CACHEGEN_AVX512 void load() {
        for (int s = 0; s < kStreams; ++s) {
            lanes_.low[s] = _mm512_setzero_si512();
            lanes_.high[s] = _mm512_set1_epi16(1);
            lanes_.word[s] = batch_.streams[s].words;
            if (batch_.is_coded)
                load_states(batch_.streams[s].states, batch_.shape.num_lanes(), &lanes_.low[s], &lanes_.high[s]);
        }
    }

    // Decode the symbols of a tile into [row][pair of streams][channel][64], see block().
    CACHEGEN_AVX512 void decode(int64_t first_channel, int num_channels) {
        const int64_t full_rows = batch_.shape.num_tokens / kNumLanes;
        const uint8_t traits = traits_of_tile(first_channel, num_channels);
        bool is_plain = batch_.is_coded && !(traits & kSingleSymbol);
        const int64_t most_bytes = batch_.shape.num_rows() * num_channels * 64;
        for (int s = 0; s < kStreams && is_plain; ++s)
            is_plain = batch_.readable_end - lanes_.word[s] >= most_bytes;
        for (int channel = 0; channel < num_channels; ++channel) {
            if (!is_plain) {
                for (int64_t row = 0; row < batch_.shape.num_rows(); ++row)
                    decode_any(first_channel + channel, row, block(row) + 64 * channel);
                continue;
            }
            if (batch_.low_bits > 0)
                decode_full<true, true>(first_channel + channel, full_rows, block(0) + 64 * channel);
            else if (traits & kWideTable)
                decode_full<true, false>(first_channel + channel, full_rows, block(0) + 64 * channel);
            else
                decode_full<false, false>(first_channel + channel, full_rows, block(0) + 64 * channel);
            if (full_rows < batch_.shape.num_rows())
                decode_any(first_channel + channel, full_rows, block(full_rows) + 64 * channel);
        }
    }

    // A pair's symbols of one row: per channel 64 bytes, in each 16 of which lie eight tokens of the first stream, then
    // the same tokens of the second. Blocks lie 64 bytes more apart than they are long, or they would share cache sets.
    uint8_t* block(int64_t row, int pair = 0) const { return tile_ + (row * kPairs + pair) * kBlockStride; }

    Status status(int s) const {
        const BatchStream& stream = batch_.streams[s];
        if (lanes_.word[s] > stream.words_end) return Status::kTruncated;
        if (lanes_.word[s] < stream.words_end || !is_at_start(s)) return Status::kCorrupt;
        return Status::kOk;
    }

    static size_t tile_bytes(const StreamShape& shape) { return shape.num_rows() * kPairs * kBlockStride; }

  private:
    static constexpr int64_t kBlockStride = 64 * kTileChannels + 64;

    // What any table of the tile has.
    uint8_t traits_of_tile(int64_t first_channel, int num_channels) const {
        uint8_t traits[kTileChannels] = {};
        for (int s = 0; s < kStreams && batch_.is_coded; ++s)
            for (int i = 0; i < num_channels; ++i) traits[i] |= batch_.streams[s].table_traits[first_channel + i];
        for (int i = 1; i < kTileChannels; ++i) traits[0] |= traits[i];
        return traits[0];
    }

    CACHEGEN_AVX512 bool is_at_start(int s) const {
        return _mm512_test_epi16_mask(lanes_.low[s], lanes_.low[s]) == 0 &&
               _mm512_cmpeq_epi16_mask(lanes_.high[s], _mm512_set1_epi16(1)) == ~0u;
    }

    template <bool kWide, bool kHasLowBits>
    CACHEGEN_AVX512_INLINE void decode_group(int first, int64_t channel, int64_t row, __m512i* low, __m512i* high,
                                             const uint8_t** word, uint8_t* symbols_out) const {
        const FrequencyTable* tables[kGroup];
        __m512i symbols[kGroup + 1];
        for (int s = 0; s < kGroup; ++s) tables[s] = batch_.streams[first + s].tables + channel;
        decode_rows<kGroup, kWide>(tables, low, high, word, symbols);
        if (kHasLowBits) {
            const int64_t position = (row * batch_.shape.num_channels + channel) * batch_.low_bits * 4;
            for (int s = 0; s < kGroup; ++s)
                symbols[s] = append_low_bits(symbols[s], batch_.streams[first + s].low_bits + position, batch_.low_bits);
        }
        if (kGroup == 1) symbols[1] = _mm512_setzero_si512();
        for (int s = 0; s < kGroup; s += 2)
            _mm512_store_si512(symbols_out + (first + s) / 2 * kBlockStride,
                               _mm512_packus_epi16(symbols[s], symbols[s + 1]));
    }

    template <bool kWide, bool kHasLowBits>
    CACHEGEN_AVX512 void decode_full(int64_t channel, int64_t num_rows, uint8_t* symbols_out) {
        // Local copies, so that the states stay in registers.
        __m512i low[kStreams], high[kStreams];
        const uint8_t* word[kStreams];
#pragma GCC unroll 8
        for (int s = 0; s < kStreams; ++s) {
            low[s] = lanes_.low[s];
            high[s] = lanes_.high[s];
            word[s] = lanes_.word[s];
        }
        for (int64_t row = 0; row < num_rows; ++row, symbols_out += kPairs * kBlockStride)
#pragma GCC unroll 2
            for (int first = 0; first < kStreams; first += kGroup)
                decode_group<kWide, kHasLowBits>(first, channel, row, low + first, high + first, word + first,
                                                 symbols_out);
#pragma GCC unroll 8
        for (int s = 0; s < kStreams; ++s) {
            lanes_.low[s] = low[s];
            lanes_.high[s] = high[s];
            lanes_.word[s] = word[s];
        }
    }

    CACHEGEN_AVX512 void decode_any(int64_t channel, int64_t row, uint8_t* symbols_out) {
        const int live = batch_.shape.live_lanes(row);
        __m512i symbols[kStreams + 1];
        for (int s = 0; s < kStreams; ++s) {
            const BatchStream& stream = batch_.streams[s];
            symbols[s] = _mm512_setzero_si512();
            if (batch_.is_coded)
                symbols[s] = decode_any_row(stream.tables[channel], first_lanes(live), stream.words_end, &lanes_.low[s],
                                            &lanes_.high[s], &lanes_.word[s]);
            const int64_t bits = (row * batch_.shape.num_channels * kNumLanes + channel * live) * batch_.low_bits;
            if (live == kNumLanes)
                symbols[s] = append_low_bits(symbols[s], stream.low_bits + bits / 8, batch_.low_bits);
            else if (batch_.low_bits > 0)
                symbols[s] = append_tail_low_bits(symbols[s], stream.low_bits, bits, batch_.low_bits, live);
        }
        symbols[kStreams] = _mm512_setzero_si512();
        for (int s = 0; s < kStreams; s += 2)
            _mm512_store_si512(symbols_out + s / 2 * kBlockStride, _mm512_packus_epi16(symbols[s], symbols[s + 1]));
    }

    const StreamBatch& batch_;
    uint8_t* const tile_;
    Lanes lanes_;
};

template <int kStreams>
CACHEGEN_AVX512 void decode_streams(const StreamBatch& batch, Dtype dtype, Scratch& scratch, Status* statuses) {
    using Decoder = TileDecoder<kStreams>;
    const int64_t num_tokens = batch.shape.num_tokens;
    Dequantizer dequantizer(batch, dtype);
    const size_t tile_bytes = round_up(Decoder::tile_bytes(batch.shape), 64);
    uint8_t* const memory = scratch.reserve(tile_bytes + dequantizer.table_bytes());
    uint8_t* const tables = memory + tile_bytes;
    dequantizer.make_tables(tables);

    Decoder decoder(batch, memory);
    decoder.load();
    for (int64_t first = 0; first < batch.shape.num_channels; first += kTileChannels) {
        const int count = static_cast<int>(std::min<int64_t>(kTileChannels, batch.shape.num_channels - first));
        decoder.decode(first, count);
        for (int pair = 0; pair < Decoder::kPairs; ++pair) {
            const int num_members = std::min(2, kStreams - 2 * pair);
            dequantizer.begin_tile(2 * pair, num_members, first, count);
            for (int64_t token = 0; token < num_tokens; token += kNumLanes)
                dequantizer.write_block(decoder.block(token / kNumLanes, pair), tables, 2 * pair, num_members, token);
        }
    }
    if (batch.stores_bypass_caches) _mm_sfence();
    for (int s = 0; s < kStreams; ++s) statuses[s] = decoder.status(s);
}

}  // namespace
}  // namespace cachegen::avx512

namespace cachegen {

void decode_batch_avx512(const StreamBatch& batch, Dtype dtype, Scratch& scratch, Status* statuses) {
    StreamBatch part = batch;
    for (int done = 0; done < batch.num_streams; done += part.num_streams) {
        const int rest = batch.num_streams - done;
        part.num_streams = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        std::copy(batch.streams + done, batch.streams + done + part.num_streams, part.streams);
        const auto decode = part.num_streams == 8   ? avx512::decode_streams<8>
                            : part.num_streams == 4 ? avx512::decode_streams<4>
                            : part.num_streams == 2 ? avx512::decode_streams<2>
                                                    : avx512::decode_streams<1>;
        decode(part, dtype, scratch, statuses + done);
    }
}

}  // namespace cachegen

#endif  // CACHEGEN_X86
