// Decoding with AVX2: the same tiles as decode_avx512.cpp, with byte shuffles for lookups.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx2.h"
#include "cpu/dequantize_avx2.h"
#include "cpu/rans_decode_avx2.h"
#include "cpu/rans_portable.h"
#include "cpu/stream_batch.h"
#include "cpu/stream_words.h"

namespace cachegen::avx2 {
namespace {

// A bit for every symbol that occurs.
CACHEGEN_AVX2_INLINE uint32_t present_symbols(const FrequencyTable& table) {
    const __m256i zero = _mm256_setzero_si256();
    const auto* frequencies = reinterpret_cast<const __m256i*>(table.frequency);
    const __m256i absent = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_load_si256(frequencies), zero),
                                              _mm256_cmpeq_epi16(_mm256_load_si256(frequencies + 1), zero));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(absent, 0xD8)));
}

class TileDecoder {
  public:
    TileDecoder(const StreamBatch& batch, uint8_t* tile, uint8_t* words)
        : batch_(batch), tile_(tile), words_(batch, words) {}

    CACHEGEN_AVX2 void load() {
        for (int s = 0; s < batch_.num_streams && batch_.is_coded; ++s)
            states_[s] = load_states(batch_.streams[s].states, batch_.shape.num_lanes());
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

    CACHEGEN_AVX2 Status status(int s) const { return words_.status(s, !batch_.is_coded || are_at_start(states_[s])); }

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
                decode_rows<true, kStreams>(TreeSearch<kStreams>{tables + first}, _bzhi_u32(~0u, live), states_ + first,
                                            words_.next + first, symbols);
            else
                decode_rows<false, kStreams>(TreeSearch<kStreams>{tables + first}, ~0u, states_ + first,
                                             words_.next + first, symbols);
        }
        for (int s = 0; s < kStreams; ++s) {
            if (batch_.low_bits > 0) symbols[s] = append_low_bits(symbols[s], first + s, channel, row, live);
            _mm256_store_si256(reinterpret_cast<__m256i*>(block(row, first + s) + 32 * channel_in_tile), symbols[s]);
        }
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
