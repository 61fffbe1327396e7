// Encoding with AVX2: quantization, transposition and rANS of up to eight streams, tile by tile and backwards, as
// encode_avx512.cpp does it.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx2.h"
#include "cpu/quantize_avx2.h"
#include "cpu/rans_encode_avx2.h"
#include "cpu/rans_portable.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx2 {
namespace {

// Quantizes blocks of tokens. The encoder is not compiled anew for every dtype: which it is, is asked once per block.
class BlockQuantizer {
  public:
    // `inverses` is memory of inverses_bytes().
    BlockQuantizer(const StreamBatch& batch, Dtype dtype, float* inverses)
        : batch_(batch), dtype_(dtype), padded_tokens_(batch.shape.num_rows() * kNumLanes), inverses_(inverses) {}

    static size_t inverses_bytes(const StreamBatch& batch) {
        return batch.num_streams * batch.shape.num_rows() * kNumLanes * sizeof(float);
    }

    CACHEGEN_AVX2 void start() {
        with_dtype(dtype_, [&](auto tag) { find_inverses<decltype(tag)>(); });
        for (int s = 0; s < batch_.num_streams; ++s) highest_[s] = _mm256_setzero_si256();
    }

    // Choose the channels of a stream's next blocks.
    void begin_tile(int s, int64_t first_channel, int num_channels) {
        runs_[s] = TileRuns(first_channel, num_channels, batch_.head_dim, batch_.streams[s].head_stride);
    }

    // Quantize 32 channels of 32 tokens of a stream into [channel][32 tokens].
    CACHEGEN_AVX2 void quantize(int64_t row, int s, uint8_t* out) {
        if (dtype_ == Dtype::kFloat16)
            quantize_block<Float16>(row, s, out);
        else if (dtype_ == Dtype::kBfloat16)
            quantize_block<Bfloat16>(row, s, out);
        else
            quantize_block<Float32>(row, s, out);
    }

    // Whether all values were within their tokens' scales.
    CACHEGEN_AVX2 bool is_in_range(int s) const {
        const auto highest = static_cast<uint16_t>(2 * zero_symbol_of(batch_.streams[s].num_bins));
        alignas(32) uint16_t words[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(words), highest_[s]);
        return *std::max_element(words, words + 16) <= highest;
    }

  private:
    template <class Dtype>
    void find_inverses() {
        for (int s = 0; s < batch_.num_streams; ++s) {
            const BatchStream& stream = batch_.streams[s];
            const auto* scales = reinterpret_cast<const typename Dtype::Storage*>(stream.scales);
            const int zero_symbol = zero_symbol_of(stream.num_bins);
            for (int64_t token = 0; token < batch_.shape.num_tokens; ++token)
                inverses_[s * padded_tokens_ + token] = inverse_step(Dtype::widen(scales[token]), zero_symbol);
        }
    }

    template <class Dtype>
    CACHEGEN_AVX2 void quantize_block(int64_t row, int s, uint8_t* out) {
        using Storage = typename Dtype::Storage;
        const BatchStream& stream = batch_.streams[s];
        const int live = batch_.shape.live_lanes(row);
        const __m256i zero_symbol = _mm256_set1_epi16(static_cast<int16_t>(zero_symbol_of(stream.num_bins)));
        const bool is_whole = runs_[s].is_whole();
        const int64_t first_token = row * kNumLanes;
        const Storage* values = reinterpret_cast<const Storage*>(stream.values) + first_token * stream.token_stride;
        const float* inverses = inverses_ + s * padded_tokens_ + first_token;
        __m256i highest = highest_[s];
        for (int half = 0; half < 2; ++half) {
            __m128i tokens[2][16];  // of channels 0 to 15 and 16 to 31
            for (int i = 0; i < 16; ++i) {
                const int lane = 16 * half + i;
                tokens[0][i] = tokens[1][i] = _mm_setzero_si128();
                if (lane >= live) continue;
                const Storage* token = values + lane * stream.token_stride;
                alignas(32) Storage gathered[kTileChannels];
                if (is_whole) {
                    token += runs_[s].runs[0].offset;
                } else {
                    gather_row(token, runs_[s], gathered);
                    token = gathered;
                }
                __m256i words[2];
                quantize_row<Dtype>(token, _mm256_set1_ps(inverses[lane]), zero_symbol, words);
                highest = _mm256_max_epu16(highest, _mm256_max_epu16(words[0], words[1]));
                const __m256i bytes = pack_row(words);
                tokens[0][i] = _mm256_castsi256_si128(bytes);
                tokens[1][i] = _mm256_extracti128_si256(bytes, 1);
            }
            for (int i = 0; i < 2; ++i) {
                transpose_16x16_bytes(tokens[i]);
                for (int j = 0; j < 16; ++j)
                    _mm_store_si128(reinterpret_cast<__m128i*>(out + 32 * (16 * i + j) + 16 * half), tokens[i][j]);
            }
        }
        highest_[s] = highest;
    }

    const StreamBatch& batch_;
    const Dtype dtype_;
    const int64_t padded_tokens_;
    float* const inverses_;  // [stream][padded tokens]
    TileRuns runs_[kMaxBatch];
    __m256i highest_[kMaxBatch];  // the largest symbols
};

class TileEncoder {
  public:
    TileEncoder(const StreamBatch& batch, Dtype dtype, uint8_t* memory)
        : batch_(batch),
          num_rows_(batch.shape.num_rows()),
          value_bytes_(value_bytes_of(dtype)),
          tile_(memory),
          quantizer_(batch, dtype, reinterpret_cast<float*>(memory + tile_bytes(batch))) {
        memory += tile_bytes(batch) + BlockQuantizer::inverses_bytes(batch);
        for (int s = 0; s < batch.num_streams; ++s) {
            low_bits_[s] = memory;
            memory += low_bits_bytes(batch);
        }
        for (int s = 0; s < batch.num_streams; ++s) {
            memory += words_bytes(batch);
            words_end_[s] = word_[s] = reinterpret_cast<uint16_t*>(memory);
        }
    }

    static size_t memory_bytes(const StreamBatch& batch) {
        return tile_bytes(batch) + BlockQuantizer::inverses_bytes(batch) +
               batch.num_streams * (low_bits_bytes(batch) + words_bytes(batch));
    }

    CACHEGEN_AVX2 void start() {
        quantizer_.start();
        for (int s = 0; s < batch_.num_streams; ++s) {
            std::memset(low_bits_[s], 0, low_bits_bytes(batch_));
            for (__m256i& states : states_[s]) states = _mm256_set1_epi32(kStateLow);
            seen_[s] = _mm256_setzero_si256();
        }
    }

    CACHEGEN_AVX2 void encode(int64_t first_channel, int num_channels) {
        for (int s = 0; s < batch_.num_streams; ++s) {
            quantizer_.begin_tile(s, first_channel, num_channels);
            for (int64_t row = 0; row < num_rows_; ++row) quantizer_.quantize(row, s, block(row, s));
            // The next tile, for the prefetches.
            const int64_t next = std::max<int64_t>(first_channel - kTileChannels, 0);
            next_tile_[s] =
                batch_.streams[s].values +
                value_bytes_ * (next / batch_.head_dim * batch_.streams[s].head_stride + next % batch_.head_dim);
        }
        const int64_t full_rows = batch_.shape.num_tokens / kNumLanes;
        for (int i = num_channels - 1; i >= 0; --i) {
            const int64_t channel = first_channel + i;
            for (int s = 0; s < batch_.num_streams && batch_.is_coded; ++s) {
                // Streams of one plane share their tables.
                const bool is_shared = s > 0 && batch_.streams[s].tables == batch_.streams[s - 1].tables;
                if (!is_shared) make_table(batch_.streams[s].tables[channel], &tables_[s]);
                table_of_[s] = is_shared ? table_of_[s - 1] : &tables_[s];
            }
            if (full_rows < num_rows_) encode_tail_row(channel, i, full_rows);
            for (int64_t row = full_rows - 1; row >= 0; --row) {
                if (batch_.low_bits == 0)
                    encode_row<false, false>(channel, i, row);
                else
                    encode_row<false, true>(channel, i, row);
            }
        }
    }

    CACHEGEN_AVX2 void finish(int s, EncodedStream* encoded) const {
        encoded->status = Status::kOk;
        if (!quantizer_.is_in_range(s))
            encoded->status = Status::kNotFinite;
        else if (has_absent(seen_[s]))
            encoded->status = Status::kNoFrequency;
        if (encoded->status != Status::kOk) return;
        uint32_t states[kNumLanes];
        store_states(states_[s], states);
        const int64_t num_low_bits = batch_.shape.num_tokens * batch_.shape.num_channels * batch_.low_bits;
        encoded->join(states, batch_.is_coded ? batch_.shape.num_lanes() : 0, low_bits_[s], num_low_bits, word_[s],
                      words_end_[s]);
    }

  private:
    // 64 bytes longer than a block, or blocks would share cache sets.
    static constexpr int64_t kBlockStride = 32 * kTileChannels + 64;

    static size_t tile_bytes(const StreamBatch& batch) {
        return batch.shape.num_rows() * batch.num_streams * kBlockStride;
    }
    // A symbol gives up at most one word; the last store begins up to 16 bytes before the words.
    static size_t words_bytes(const StreamBatch& batch) {
        return batch.is_coded ? round_up(2 * batch.shape.num_tokens * batch.shape.num_channels + 16, 64) : 0;
    }
    // With 8 bytes more: tail rows are written by bits.
    static size_t low_bits_bytes(const StreamBatch& batch) {
        return round_up(batch.shape.num_tokens * batch.shape.num_channels * batch.low_bits / 8 + 16, 64);
    }

    uint8_t* block(int64_t row, int s) const { return tile_ + (row * batch_.num_streams + s) * kBlockStride; }

    // Encode one row of all streams. Only where kIsTail may lanes be dead; only where kHasLowBits may there be low
    // bits, or no tables.
    template <bool kIsTail, bool kHasLowBits>
    CACHEGEN_AVX2_INLINE void encode_row(int64_t channel, int channel_in_tile, int64_t row) {
        const int live = kIsTail ? batch_.shape.live_lanes(row) : kNumLanes;
        for (int s = 0; s < batch_.num_streams; ++s) {
            // As many prefetches as the next tile has rows.
            if (!kIsTail)
                _mm_prefetch(
                    reinterpret_cast<const char*>(next_tile_[s] + value_bytes_ * (row * kNumLanes + channel_in_tile) *
                                                                      batch_.streams[s].token_stride),
                    _MM_HINT_T1);
            __m256i symbols = _mm256_load_si256(reinterpret_cast<const __m256i*>(block(row, s) + 32 * channel_in_tile));
            if (kHasLowBits && batch_.low_bits > 0) {
                store_low_bits(s, channel, row, live, symbols);
                const __m256i kept = _mm256_set1_epi8(static_cast<char>(0xFF >> batch_.low_bits));
                symbols = _mm256_and_si256(_mm256_srl_epi16(symbols, _mm_cvtsi32_si128(batch_.low_bits)), kept);
            }
            if (!kHasLowBits || batch_.is_coded)
                encode_symbols<kIsTail>(symbols, *table_of_[s], live, states_[s], seen_[s], word_[s]);
        }
    }

    __attribute__((noinline)) CACHEGEN_AVX2 void encode_tail_row(int64_t channel, int channel_in_tile, int64_t row) {
        encode_row<true, true>(channel, channel_in_tile, row);
    }

    // The low bits of 32 symbols, as bit planes.
    CACHEGEN_AVX2_INLINE void store_low_bits(int s, int64_t channel, int64_t row, int live, __m256i symbols) {
        int64_t position = (row * batch_.shape.num_channels * kNumLanes + channel * live) * batch_.low_bits;
        for (int bit = 0; bit < batch_.low_bits; ++bit, position += live) {
            const __m256i leading = _mm256_sll_epi16(symbols, _mm_cvtsi32_si128(7 - bit));
            const auto plane = static_cast<uint32_t>(_mm256_movemask_epi8(leading));
            if (live == kNumLanes)
                std::memcpy(low_bits_[s] + position / 8, &plane, 4);
            else
                write_bits(low_bits_[s], position, live, _bzhi_u32(plane, live));
        }
    }

    const StreamBatch& batch_;
    const int64_t num_rows_;
    const int64_t value_bytes_;
    uint8_t* const tile_;
    BlockQuantizer quantizer_;
    uint8_t* low_bits_[kMaxBatch];
    uint16_t* words_end_[kMaxBatch];
    uint16_t* word_[kMaxBatch];
    const uint8_t* next_tile_[kMaxBatch];
    EncodeTable tables_[kMaxBatch];
    const EncodeTable* table_of_[kMaxBatch] = {};
    __m256i states_[kMaxBatch][4];
    __m256i seen_[kMaxBatch];  // the or of all frequencies
};

CACHEGEN_AVX2 void encode_streams(const StreamBatch& batch, Dtype dtype, Scratch& scratch, EncodedStream* encoded) {
    TileEncoder encoder(batch, dtype, scratch.reserve(TileEncoder::memory_bytes(batch)));
    encoder.start();
    const int64_t num_channels = batch.shape.num_channels;
    for (int64_t first = (num_channels - 1) / kTileChannels * kTileChannels; first >= 0; first -= kTileChannels)
        encoder.encode(first, static_cast<int>(std::min<int64_t>(kTileChannels, num_channels - first)));
    for (int s = 0; s < batch.num_streams; ++s) encoder.finish(s, &encoded[s]);
}

}  // namespace

void encode_batch(const StreamBatch& batch, Dtype dtype, Scratch& scratch, EncodedStream* encoded) {
    encode_streams(batch, dtype, scratch, encoded);
}

}  // namespace cachegen::avx2

#endif  // CACHEGEN_X86
