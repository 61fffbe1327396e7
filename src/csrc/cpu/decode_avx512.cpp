// Decoding with AVX-512: rANS of up to eight streams in flight, transposition and dequantization, tile by tile.
//
// A tile is 32 channels of all tokens of the batch's streams. First the symbols are decoded channel by channel, in the
// order of the bitstream; then blocks of 32 channels by 64 tokens are transposed and written as token rows.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx512.h"
#include "cpu/dequantize_avx512.h"
#include "cpu/rans_decode_avx512.h"
#include "cpu/rans_portable.h"
#include "cpu/stream_batch.h"
#include "cpu/stream_words.h"

namespace cachegen::avx512 {
namespace {

// Decodes 8, 4, 2 or 1 streams. What is done once per row is compiled for each number, the rest for any.
class TileDecoder {
  public:
    // `tile` and `words` are memory of tile_bytes() and StreamWords::num_copied_bytes().
    TileDecoder(const StreamBatch& batch, uint8_t* tile, uint8_t* words)
        : batch_(batch), num_pairs_(pairs_of(batch)), tile_(tile), words_(batch, words) {}

    CACHEGEN_AVX512 void load() {
        for (int s = 0; s < batch_.num_streams && batch_.is_coded; ++s)
            load_states(batch_.streams[s].states, batch_.shape.num_lanes(), &low_[s], &high_[s]);
    }

    // Decode the symbols of a tile into blocks, see block().
    CACHEGEN_AVX512 void decode(int64_t first_channel, int num_channels) {
        words_.begin_tile();
        if (!batch_.is_coded)
            unpack(first_channel, num_channels);
        else if (batch_.num_streams == 8)
            decode_channels<8>(first_channel, num_channels);
        else if (batch_.num_streams == 4)
            decode_channels<4>(first_channel, num_channels);
        else if (batch_.num_streams == 2)
            decode_channels<2>(first_channel, num_channels);
        else
            decode_channels<1>(first_channel, num_channels);
    }

    // A pair's symbols of one row: per channel 64 bytes, in each 16 of which lie eight tokens of the first stream, then
    // the same tokens of the second. Blocks lie 64 bytes more apart than they are long, or they would share cache sets.
    uint8_t* block(int64_t row, int pair = 0) const { return tile_ + (row * num_pairs_ + pair) * kBlockStride; }

    CACHEGEN_AVX512 Status status(int s) const {
        return words_.status(s, !batch_.is_coded || are_at_start(low_[s], high_[s]));
    }

    static int pairs_of(const StreamBatch& batch) { return (batch.num_streams + 1) / 2; }
    static size_t tile_bytes(const StreamBatch& batch) {
        return batch.shape.num_rows() * pairs_of(batch) * kBlockStride;
    }

  private:
    static constexpr int64_t kBlockStride = 64 * kTileChannels + 64;

    // What any table of the tile has.
    uint8_t traits_of_tile(int64_t first_channel, int num_channels) const {
        uint8_t traits[kTileChannels] = {};
        for (int s = 0; s < batch_.num_streams; ++s)
            for (int i = 0; i < num_channels; ++i) traits[i] |= batch_.streams[s].table_traits[first_channel + i];
        for (int i = 1; i < kTileChannels; ++i) traits[0] |= traits[i];
        return traits[0];
    }

    template <int kStreams>
    CACHEGEN_AVX512_APART void decode_channels(int64_t first_channel, int num_channels) {
        const int64_t num_rows = batch_.shape.num_rows(), full_rows = batch_.shape.num_tokens / kNumLanes;
        const uint8_t traits = traits_of_tile(first_channel, num_channels);
        for (int i = 0; i < num_channels; ++i) {
            const int64_t channel = first_channel + i;
            if (traits & kSingleSymbol) {
                decode_channel<kStreams, true, true, true>(channel, 0, num_rows, block(0) + 64 * i);
                continue;
            }
            if (batch_.low_bits > 0)
                decode_channel<kStreams, true, true, false>(channel, 0, full_rows, block(0) + 64 * i);
            else if (traits & kWideTable)
                decode_channel<kStreams, true, false, false>(channel, 0, full_rows, block(0) + 64 * i);
            else
                decode_channel<kStreams, false, false, false>(channel, 0, full_rows, block(0) + 64 * i);
            if (full_rows < num_rows)
                decode_channel<kStreams, true, true, true>(channel, full_rows, num_rows, block(full_rows) + 64 * i);
        }
    }

    template <int kGroup, bool kWide, bool kHasLowBits, bool kIsGeneral>
    CACHEGEN_AVX512_INLINE void decode_group(int first, int64_t channel, int64_t row, __m512i* low, __m512i* high,
                                             const uint8_t** word, uint8_t* symbols_out) const {
        const FrequencyTable* tables[kGroup];
        __m512i symbols[kGroup + 1];
        const int live = kIsGeneral ? batch_.shape.live_lanes(row) : kNumLanes;
        for (int s = 0; s < kGroup; ++s) tables[s] = batch_.streams[first + s].tables + channel;
        decode_rows<kGroup, kIsGeneral>(BinarySearch<kGroup, kWide ? 32 : 16>{tables}, tables, first_lanes(live), low,
                                        high, word, symbols);
        if (kHasLowBits)
            for (int s = 0; s < kGroup; ++s) symbols[s] = append_low_bits(symbols[s], first + s, channel, row, live);
        store_symbols<kGroup>(symbols, symbols_out + first / 2 * kBlockStride);
    }

    template <int kCount>
    CACHEGEN_AVX512_INLINE void store_symbols(__m512i symbols[kCount + 1], uint8_t* symbols_out) const {
        if (kCount == 1) symbols[1] = _mm512_setzero_si512();
        for (int s = 0; s < kCount; s += 2)
            _mm512_store_si512(symbols_out + s / 2 * kBlockStride, _mm512_packus_epi16(symbols[s], symbols[s + 1]));
    }

    // Append a row's raw bits.
    CACHEGEN_AVX512_INLINE __m512i append_low_bits(__m512i symbols, int s, int64_t channel, int64_t row,
                                                   int live) const {
        const int64_t position = (row * batch_.shape.num_channels * kNumLanes + channel * live) * batch_.low_bits;
        const uint8_t* const planes = batch_.streams[s].low_bits;
        return live == kNumLanes ? append_full_low_bits(symbols, planes + position / 8, batch_.low_bits)
                                 : append_tail_low_bits(symbols, planes, position, batch_.low_bits, live);
    }

    template <int kStreams, bool kWide, bool kHasLowBits, bool kIsGeneral>
    CACHEGEN_AVX512 void decode_channel(int64_t channel, int64_t first_row, int64_t last_row, uint8_t* symbols_out) {
        constexpr int kGroup = kStreams < 4 ? kStreams : 4;
        // Local copies, so that the states stay in registers.
        __m512i low[kStreams], high[kStreams];
        const uint8_t* word[kStreams];
#pragma GCC unroll 8
        for (int s = 0; s < kStreams; ++s) {
            low[s] = low_[s];
            high[s] = high_[s];
            word[s] = words_.next[s];
        }
        for (int64_t row = first_row; row < last_row; ++row, symbols_out += (kStreams + 1) / 2 * kBlockStride)
#pragma GCC unroll 2
            for (int first = 0; first < kStreams; first += kGroup)
                decode_group<kGroup, kWide, kHasLowBits, kIsGeneral>(first, channel, row, low + first, high + first,
                                                                     word + first, symbols_out);
#pragma GCC unroll 8
        for (int s = 0; s < kStreams; ++s) {
            low_[s] = low[s];
            high_[s] = high[s];
            words_.next[s] = word[s];
        }
    }

    // The same with coder `packed`.
    CACHEGEN_AVX512_APART void unpack(int64_t first_channel, int num_channels) const {
        for (int i = 0; i < num_channels; ++i)
            for (int64_t row = 0; row < batch_.shape.num_rows(); ++row)
                for (int pair = 0; pair < num_pairs_; ++pair) {
                    const int live = batch_.shape.live_lanes(row);
                    __m512i symbols[3] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                    for (int s = 2 * pair; s < std::min(2 * pair + 2, batch_.num_streams); ++s)
                        symbols[s % 2] = append_low_bits(symbols[s % 2], s, first_channel + i, row, live);
                    store_symbols<2>(symbols, block(row, pair) + 64 * i);
                }
    }

    const StreamBatch& batch_;
    const int num_pairs_;
    uint8_t* const tile_;
    StreamWords words_;
    __m512i low_[kMaxBatch];
    __m512i high_[kMaxBatch];
};

CACHEGEN_AVX512 void decode_streams(const StreamBatch& batch, Dtype dtype, Scratch& scratch, Status* statuses) {
    const int64_t num_tokens = batch.shape.num_tokens;
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
        for (int pair = 0; pair < TileDecoder::pairs_of(batch); ++pair) {
            const int num_members = std::min(2, batch.num_streams - 2 * pair);
            dequantizer.begin_tile(2 * pair, num_members, first, count);
            for (int64_t token = 0; token < num_tokens; token += kNumLanes)
                dequantizer.write_block(decoder.block(token / kNumLanes, pair), tables, 2 * pair, num_members, token);
        }
    }
    if (batch.stores_bypass_caches) _mm_sfence();
    for (int s = 0; s < batch.num_streams; ++s) statuses[s] = decoder.status(s);
}

}  // namespace

void decode_batch(const StreamBatch& batch, Dtype dtype, Scratch& scratch, Status* statuses) {
    StreamBatch part = batch;
    for (int done = 0; done < batch.num_streams; done += part.num_streams) {
        const int rest = batch.num_streams - done;
        part.num_streams = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        std::copy(batch.streams + done, batch.streams + done + part.num_streams, part.streams);
        decode_streams(part, dtype, scratch, statuses + done);
    }
}

}  // namespace cachegen::avx512

#endif  // CACHEGEN_X86
