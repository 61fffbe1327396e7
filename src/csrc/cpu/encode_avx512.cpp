// Encoding with AVX-512: quantization, transposition and rANS of up to eight streams, tile by tile and backwards.
//
// A tile is 32 channels of all tokens of the batch's streams; each value of the cache is read once, and the next tile's
// are prefetched meanwhile.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx512.h"
#include "cpu/quantize_avx512.h"
#include "cpu/rans_encode_avx512.h"
#include "cpu/rans_portable.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx512 {
namespace {

// Quantizes blocks of tokens. It is not compiled anew for every number of streams, nor the encoder for every dtype:
// which dtype it is, is asked once per block.
class BlockQuantizer {
  public:
    // `inverses` is memory of inverses_bytes().
    BlockQuantizer(const StreamBatch& batch, Dtype dtype, float* inverses)
        : batch_(batch), dtype_(dtype), padded_tokens_(batch.shape.num_rows() * kNumLanes), inverses_(inverses) {}

    static size_t inverses_bytes(const StreamBatch& batch) {
        return batch.num_streams * batch.shape.num_rows() * kNumLanes * sizeof(float);
    }

    CACHEGEN_AVX512 void start() {
        with_dtype(dtype_, [&](auto tag) { find_inverses<decltype(tag)>(); });
        for (int s = 0; s < batch_.num_streams; ++s) highest_[s] = _mm512_setzero_si512();
    }

    // Choose the channels of the next blocks.
    void begin_tile(int64_t first_channel, int num_channels) {
        for (int s = 0; s < batch_.num_streams; ++s)
            runs_[s] = TileRuns(first_channel, num_channels, batch_.head_dim, batch_.streams[s].head_stride);
    }

    // Quantize 32 channels of 32 tokens of two streams into [channel][64]: the first stream's tokens, then the
    // second's.
    CACHEGEN_AVX512 void quantize(int64_t row, int pair, uint8_t* out) {
        if (dtype_ == Dtype::kFloat16)
            quantize_block<Float16>(row, pair, out);
        else if (dtype_ == Dtype::kBfloat16)
            quantize_block<Bfloat16>(row, pair, out);
        else
            quantize_block<Float32>(row, pair, out);
    }

    // Whether all values were within their tokens' scales.
    CACHEGEN_AVX512 bool is_in_range(int s) const {
        const int zero_symbol = zero_symbol_of(batch_.streams[s].num_bins);
        const __m512i highest = _mm512_set1_epi16(static_cast<int16_t>(2 * zero_symbol));
        return _mm512_cmpgt_epu16_mask(highest_[s], highest) == 0;
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
    CACHEGEN_AVX512_APART void quantize_block(int64_t row, int pair, uint8_t* out) {
        // [token pairs by eights][pair]: words are channels, each with two tokens.
        __m512i eighths[4][8];
        const int live = batch_.shape.live_lanes(row);
#pragma GCC unroll 1
        for (int i = 0; i < 4; ++i) {
            const int s = 2 * pair + i / 2, first = 16 * (i % 2);
            if (s >= batch_.num_streams)
                for (int j = 0; j < 8; ++j) eighths[i][j] = _mm512_setzero_si512();
            else if (runs_[s].is_whole() && first + 16 <= live)
                quantize_tokens<Dtype, true>(row, s, first, live, eighths[i]);
            else
                quantize_tokens<Dtype, false>(row, s, first, live, eighths[i]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            __m512i lanes[4];
            for (int i = 0; i < 4; ++i) lanes[i] = eighths[i][j];
            transpose_4x4_lanes(lanes);
            for (int lane = 0; lane < 4; ++lane)
                _mm512_store_si512(out + 64 * channel_at<Dtype>(8 * lane + j), lanes[lane]);
        }
    }

    // Sixteen tokens from `first` of a row on, in pairs, each 128-bit lane transposed. Only where kIsPlain are all of
    // them live, and their channels contiguous.
    template <class Dtype, bool kIsPlain>
    CACHEGEN_AVX512_APART void quantize_tokens(int64_t row, int s, int first, int live, __m512i pairs[8]) {
        using Storage = typename Dtype::Storage;
        const BatchStream& stream = batch_.streams[s];
        const __m512i zero_symbol = _mm512_set1_epi16(static_cast<int16_t>(zero_symbol_of(stream.num_bins)));
        const int64_t first_token = row * kNumLanes + first;
        const Storage* values = reinterpret_cast<const Storage*>(stream.values) + first_token * stream.token_stride;
        const float* inverses = inverses_ + s * padded_tokens_ + first_token;
        __m512i highest = highest_[s];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            __m512i symbols[2];
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd, values += stream.token_stride) {
                const __m512 inverse = _mm512_set1_ps(inverses[2 * i + odd]);
                symbols[odd] = _mm512_setzero_si512();
                if (kIsPlain)
                    symbols[odd] =
                        quantize_row(load_whole_row<Dtype>(values + runs_[s].runs[0].offset), inverse, zero_symbol);
                else if (first + 2 * i + odd < live)
                    symbols[odd] = quantize_parts<Dtype>(values, runs_[s], inverse, zero_symbol);
                highest = _mm512_max_epu16(highest, symbols[odd]);
            }
            pairs[i] = _mm512_or_si512(symbols[0], _mm512_slli_epi16(symbols[1], 8));
        }
        highest_[s] = highest;
        transpose_8x8_words(pairs);
    }

    // The symbols of a token whose channels lie in several runs.
    template <class Dtype>
    CACHEGEN_AVX512_APART static __m512i quantize_parts(const typename Dtype::Storage* values, const TileRuns& runs,
                                                        __m512 inverse, __m512i zero_symbol) {
        return quantize_row(load_row<Dtype>(values, runs), inverse, zero_symbol);
    }

    const StreamBatch& batch_;
    const Dtype dtype_;
    const int64_t padded_tokens_;
    float* const inverses_;  // [stream][padded tokens]
    TileRuns runs_[kMaxBatch];
    __m512i highest_[kMaxBatch];  // the largest symbols
};

// Encodes 8, 4, 2 or 1 streams. What is done once per row is compiled for each number, the rest for any.
class TileEncoder {
  public:
    TileEncoder(const StreamBatch& batch, Dtype dtype, uint8_t* memory)
        : batch_(batch),
          num_streams_(batch.num_streams),
          num_pairs_(pairs_of(batch)),
          num_rows_(batch.shape.num_rows()),
          value_bytes_(value_bytes_of(dtype)),
          tile_(memory),
          quantizer_(batch, dtype, reinterpret_cast<float*>(memory + tile_bytes(batch))) {
        memory += tile_bytes(batch) + BlockQuantizer::inverses_bytes(batch);
        for (int s = 0; s < num_streams_; ++s) {
            low_bits_[s] = memory;
            memory += low_bits_bytes(batch);
        }
        for (int s = 0; s < num_streams_; ++s) {
            memory += words_bytes(batch);
            words_end_[s] = word_[s] = reinterpret_cast<uint16_t*>(memory);
        }
        for (int s = 0; s < num_streams_; ++s) token_bytes_[s] = value_bytes_ * batch.streams[s].token_stride;
    }

    static size_t memory_bytes(const StreamBatch& batch) {
        return tile_bytes(batch) + BlockQuantizer::inverses_bytes(batch) +
               batch.num_streams * (low_bits_bytes(batch) + words_bytes(batch));
    }

    CACHEGEN_AVX512 void start() {
        quantizer_.start();
        for (int s = 0; s < num_streams_; ++s) {
            std::memset(low_bits_[s], 0, low_bits_bytes(batch_));
            first_[s] = second_[s] = _mm512_set1_epi32(kStateLow);
            seen_[s] = _mm512_setzero_si512();
        }
    }

    CACHEGEN_AVX512 void encode(int64_t first_channel, int num_channels) {
        quantizer_.begin_tile(first_channel, num_channels);
        for (int64_t row = 0; row < num_rows_; ++row)
            for (int pair = 0; pair < num_pairs_; ++pair) quantizer_.quantize(row, pair, block(row, pair));
        // The next tile, for the prefetches.
        const int64_t next = std::max<int64_t>(first_channel - kTileChannels, 0);
        for (int s = 0; s < num_streams_; ++s) {
            const BatchStream& stream = batch_.streams[s];
            next_tile_[s] =
                stream.values + value_bytes_ * (next / batch_.head_dim * stream.head_stride + next % batch_.head_dim);
        }

        const int64_t full_rows = batch_.shape.num_tokens / kNumLanes;
        for (int i = num_channels - 1; i >= 0; --i) {
            const int64_t channel = first_channel + i;
            const EncodeTable* tables[kMaxBatch] = {};
            for (int s = 0; s < num_streams_ && batch_.is_coded; ++s) {
                // Streams of one plane share their tables.
                const FrequencyTable* source = batch_.streams[s].tables;
                if (s > 0 && source == batch_.streams[s - 1].tables) {
                    tables[s] = tables[s - 1];
                    continue;
                }
                make_table(source[channel], &tables_[s]);
                // The next channel's.
                const auto* next_table = reinterpret_cast<const char*>(source + std::max<int64_t>(channel - 1, 0));
                _mm_prefetch(next_table, _MM_HINT_T0);
                _mm_prefetch(next_table + 64, _MM_HINT_T0);
                tables[s] = &tables_[s];
            }
            if (full_rows < num_rows_) encode_tail_row(channel, i, full_rows, tables);
            if (num_streams_ == 8)
                encode_full_rows<8>(channel, i, full_rows, tables);
            else if (num_streams_ == 4)
                encode_full_rows<4>(channel, i, full_rows, tables);
            else if (num_streams_ == 2)
                encode_full_rows<2>(channel, i, full_rows, tables);
            else
                encode_full_rows<1>(channel, i, full_rows, tables);
        }
    }

    CACHEGEN_AVX512 void finish(int s, EncodedStream* encoded) const {
        encoded->status = Status::kOk;
        if (!quantizer_.is_in_range(s))
            encoded->status = Status::kNotFinite;
        else if (has_absent(seen_[s]))
            encoded->status = Status::kNoFrequency;
        if (encoded->status != Status::kOk) return;
        uint32_t states[kNumLanes];
        store_states(first_[s], second_[s], states);
        const int64_t num_low_bits = batch_.shape.num_tokens * batch_.shape.num_channels * batch_.low_bits;
        encoded->join(states, batch_.is_coded ? batch_.shape.num_lanes() : 0, low_bits_[s], num_low_bits, word_[s],
                      words_end_[s]);
    }

  private:
    static constexpr int64_t kBlockStride = 64 * kTileChannels + 64;
    static int pairs_of(const StreamBatch& batch) { return (batch.num_streams + 1) / 2; }
    static size_t tile_bytes(const StreamBatch& batch) {
        return batch.shape.num_rows() * pairs_of(batch) * kBlockStride;
    }
    // A symbol gives up at most one word.
    static size_t words_bytes(const StreamBatch& batch) {
        return batch.is_coded ? round_up(2 * batch.shape.num_tokens * batch.shape.num_channels, 64) : 0;
    }
    // With 8 bytes more: tail rows are written by bits.
    static size_t low_bits_bytes(const StreamBatch& batch) {
        return round_up(batch.shape.num_tokens * batch.shape.num_channels * batch.low_bits / 8 + 16, 64);
    }

    uint8_t* block(int64_t row, int pair) const { return tile_ + (row * num_pairs_ + pair) * kBlockStride; }

    template <int kStreams>
    CACHEGEN_AVX512_INLINE void encode_full_rows(int64_t channel, int channel_in_tile, int64_t full_rows,
                                                 const EncodeTable* const tables[kMaxBatch]) {
        if (batch_.low_bits == 0)
            encode_full_rows<kStreams, false>(channel, channel_in_tile, full_rows, tables);
        else
            encode_full_rows<kStreams, true>(channel, channel_in_tile, full_rows, tables);
    }

    // Encode the full rows of a channel. Only where kHasLowBits may there be low bits, or no tables.
    template <int kStreams, bool kHasLowBits>
    CACHEGEN_AVX512_APART void encode_full_rows(int64_t channel, int channel_in_tile, int64_t full_rows,
                                                const EncodeTable* const tables[kMaxBatch]) {
        for (int64_t row = full_rows - 1; row >= 0; --row) {
            const uint8_t* row_symbols = block(row, 0) + 64 * channel_in_tile;
            // One register for the row, not one per stream: there are none to spare.
            asm("" : "+r"(row_symbols));
            const int64_t prefetched = row * kNumLanes + channel_in_tile;
#pragma GCC unroll 8
            for (int s = 0; s < kStreams; ++s) {
                // As many prefetches as the next tile has rows.
                _mm_prefetch(next_tile_[s] + prefetched * token_bytes_[s], _MM_HINT_T1);
                const uint8_t* const symbols = row_symbols + s / 2 * kBlockStride + 32 * (s % 2);
                encode_stream_row<false, kHasLowBits>(s, channel, row, symbols, tables[s]);
            }
        }
    }

    // The same for the last row, where lanes may be dead. There is one of it: a loop will do.
    CACHEGEN_AVX512_APART void encode_tail_row(int64_t channel, int channel_in_tile, int64_t row,
                                               const EncodeTable* const tables[kMaxBatch]) {
#pragma GCC unroll 1
        for (int s = 0; s < num_streams_; ++s)
            encode_stream_row<true, true>(s, channel, row, block(row, s / 2) + 64 * channel_in_tile + 32 * (s % 2),
                                          tables[s]);
    }

    template <bool kIsTail, bool kHasLowBits>
    CACHEGEN_AVX512_INLINE void encode_stream_row(int s, int64_t channel, int64_t row, const uint8_t* symbols,
                                                  const EncodeTable* table) {
        const int live = kIsTail ? batch_.shape.live_lanes(row) : kNumLanes;
        __m512i first = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(symbols)));
        __m512i second = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(symbols + 16)));
        if (kHasLowBits && batch_.low_bits > 0) {
            store_low_bits(s, channel, row, live, _mm256_load_si256(reinterpret_cast<const __m256i*>(symbols)));
            first = _mm512_srl_epi32(first, _mm_cvtsi32_si128(batch_.low_bits));
            second = _mm512_srl_epi32(second, _mm_cvtsi32_si128(batch_.low_bits));
        }
        if (!kHasLowBits || batch_.is_coded)
            encode_symbols<kIsTail>(first, second, *table, first_lanes(live), first_[s], second_[s], seen_[s],
                                    word_[s]);
    }

    // The low bits of 32 symbols, as bit planes.
    CACHEGEN_AVX512_INLINE void store_low_bits(int s, int64_t channel, int64_t row, int live, __m256i symbols) {
        int64_t position = (row * batch_.shape.num_channels * kNumLanes + channel * live) * batch_.low_bits;
        for (int bit = 0; bit < batch_.low_bits; ++bit, position += live) {
            const uint32_t plane = _mm256_test_epi8_mask(symbols, _mm256_set1_epi8(static_cast<char>(1 << bit)));
            if (live == kNumLanes)
                std::memcpy(low_bits_[s] + position / 8, &plane, 4);
            else
                write_bits(low_bits_[s], position, live, _bzhi_u32(plane, live));
        }
    }

    const StreamBatch& batch_;
    const int num_streams_;
    const int num_pairs_;
    const int64_t num_rows_;
    const int64_t value_bytes_;
    uint8_t* const tile_;
    BlockQuantizer quantizer_;
    uint8_t* low_bits_[kMaxBatch];
    uint16_t* words_end_[kMaxBatch];
    uint16_t* word_[kMaxBatch];
    int64_t token_bytes_[kMaxBatch];  // from one token to the next in the cache
    const uint8_t* next_tile_[kMaxBatch];
    EncodeTable tables_[kMaxBatch];
    __m512i first_[kMaxBatch], second_[kMaxBatch];  // states of lanes 0 to 15 and 16 to 31
    __m512i seen_[kMaxBatch];                       // the or of all table entries
};

CACHEGEN_AVX512 void encode_streams(const StreamBatch& batch, Dtype dtype, Scratch& scratch, EncodedStream* encoded) {
    TileEncoder encoder(batch, dtype, scratch.reserve(TileEncoder::memory_bytes(batch)));
    encoder.start();
    const int64_t num_channels = batch.shape.num_channels;
    for (int64_t first = (num_channels - 1) / kTileChannels * kTileChannels; first >= 0; first -= kTileChannels)
        encoder.encode(first, static_cast<int>(std::min<int64_t>(kTileChannels, num_channels - first)));
    for (int s = 0; s < batch.num_streams; ++s) encoder.finish(s, &encoded[s]);
}

}  // namespace

void encode_batch(const StreamBatch& batch, Dtype dtype, Scratch& scratch, EncodedStream* encoded) {
    StreamBatch part = batch;
    for (int done = 0; done < batch.num_streams; done += part.num_streams) {
        const int rest = batch.num_streams - done;
        part.num_streams = rest >= 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
        std::copy(batch.streams + done, batch.streams + done + part.num_streams, part.streams);
        encode_streams(part, dtype, scratch, encoded + done);
    }
}

}  // namespace cachegen::avx512

#endif  // CACHEGEN_X86
