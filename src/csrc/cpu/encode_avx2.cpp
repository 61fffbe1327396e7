// Encoding with AVX2: quantization, transposition and rANS of up to eight streams, tile by tile and backwards, as
// encode_avx512.cpp does it.
//
// The 32 states of a row lie in four vectors: lanes 0-3 and 16-19, 4-7 and 20-23, 8-11 and 24-27, 12-15 and 28-31,
// which is what unpacking the bytes of 32 lookups to words and to doublewords gives, and packing undoes.
//
// The quotient of a state x by a frequency f is an fp32 product with a reciprocal that is a little too small: it is
// exact or one too small, which the remainder tells. Why, with u = 2^-24: x is rounded to fp32, with one addition more
// where it has 32 bits (1.5 u). One Newton step from the processor's 1 / f, wrong by at most 1.5 * 2^-12, is too small
// by at most 2.3 u, is made too small by another 8 u, and is rounded (1 u); so is the product (1 u). Rounding up comes
// to 3.5 u, which the 8 u outweigh, and all of it to less than 16 u = 2^-20. After renormalization x / f is below 2^20,
// so the product lies between x / f - 1 and x / f.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx2.h"
#include "cpu/quantize_avx2.h"
#include "cpu/rans_portable.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx2 {
namespace {

constexpr int kAbsent = 0x8000;  // stands for a frequency of 0

// A channel's table, split into low and high bytes.
struct alignas(32) EncodeTable {
    uint8_t frequency_low[32], frequency_high[32];
    uint8_t start_low[32], start_high[32];
};

CACHEGEN_AVX2_INLINE void make_table(const FrequencyTable& table, EncodeTable* made) {
    for (int half = 0; half < 2; ++half) {
        alignas(32) uint16_t frequency[16];
        const __m256i given = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.frequency + 16 * half));
        const __m256i is_absent = _mm256_cmpeq_epi16(given, _mm256_setzero_si256());
        const __m256i absent = _mm256_set1_epi16(static_cast<int16_t>(kAbsent));
        _mm256_store_si256(reinterpret_cast<__m256i*>(frequency),
                           _mm256_or_si256(given, _mm256_and_si256(is_absent, absent)));
        split_words(frequency, made->frequency_low + 16 * half, made->frequency_high + 16 * half);
        split_words(table.start + 16 * half, made->start_low + 16 * half, made->start_high + 16 * half);
    }
}

// For each mask of eight lanes, their words side by side at the end of sixteen bytes.
struct CompressTable {
    alignas(16) uint8_t shuffles[256][16] = {};
    constexpr CompressTable() {
        for (int mask = 0; mask < 256; ++mask) {
            int place = 8 - __builtin_popcount(mask);
            for (int i = 0; i < 16; ++i) shuffles[mask][i] = 0x80;
            for (int lane = 0; lane < 8; ++lane) {
                if ((mask >> lane & 1) == 0) continue;
                shuffles[mask][2 * place] = static_cast<uint8_t>(2 * lane);
                shuffles[mask][2 * place + 1] = static_cast<uint8_t>(2 * lane + 1);
                ++place;
            }
        }
    }
};
constexpr CompressTable kCompress;

// Write the words of a mask's lanes before `word`; returns where they begin. The 16 bytes before are overwritten.
CACHEGEN_AVX2_INLINE uint16_t* give_words(uint16_t* word, uint32_t mask, const __m256i states[4]) {
    const __m256i low_half = _mm256_set1_epi32(0xFFFF);
    const __m256i first =
        _mm256_packus_epi32(_mm256_and_si256(states[0], low_half), _mm256_and_si256(states[1], low_half));
    const __m256i second =
        _mm256_packus_epi32(_mm256_and_si256(states[2], low_half), _mm256_and_si256(states[3], low_half));
    const __m128i eights[4] = {_mm256_castsi256_si128(first), _mm256_castsi256_si128(second),
                               _mm256_extracti128_si256(first, 1), _mm256_extracti128_si256(second, 1)};
    // Downwards, so that each store overwrites what the one before it left below its words.
    for (int i = 3; i >= 0; --i) {
        const uint32_t lanes = mask >> (8 * i) & 255;
        const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kCompress.shuffles[lanes]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(word - 8), _mm_shuffle_epi8(eights[i], shuffle));
        word -= _mm_popcnt_u32(lanes);
    }
    return word;
}

// Encode 8 lanes: the states after the symbols, where they have given up their words.
CACHEGEN_AVX2_INLINE __m256i encode_lanes(__m256i states, __m256i frequency, __m256i start) {
    const __m256 divisor = _mm256_cvtepi32_ps(frequency);
    const __m256 rough = _mm256_rcp_ps(divisor);
    const __m256 error = _mm256_fnmadd_ps(divisor, rough, _mm256_set1_ps(1.0f - 0x1p-21f));
    const __m256 reciprocal = _mm256_fmadd_ps(rough, error, rough);
    // The conversion takes them for signed.
    const __m256 is_wrapped = _mm256_castsi256_ps(states);
    const __m256 wrapped = _mm256_blendv_ps(_mm256_setzero_ps(), _mm256_set1_ps(0x1p32f), is_wrapped);
    const __m256 dividend = _mm256_add_ps(_mm256_cvtepi32_ps(states), wrapped);
    const __m256i quotient = _mm256_cvttps_epi32(_mm256_mul_ps(dividend, reciprocal));
    const __m256i remainder = _mm256_sub_epi32(states, _mm256_mullo_epi32(quotient, frequency));
    const __m256i coded =
        _mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(quotient, kFrequencyBits), remainder), start);
    // One more to the quotient is 2^12 more to the state, and one frequency less to the remainder.
    const __m256i is_exact = _mm256_cmpgt_epi32(frequency, remainder);
    const __m256i correction = _mm256_sub_epi32(_mm256_set1_epi32(kFrequencyTotal), frequency);
    return _mm256_add_epi32(coded, _mm256_andnot_si256(is_exact, correction));
}

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
        alignas(32) uint16_t seen_words[16];
        _mm256_store_si256(reinterpret_cast<__m256i*>(seen_words), seen_[s]);
        encoded->status = Status::kOk;
        for (uint16_t word : seen_words)
            if (word & kAbsent) encoded->status = Status::kNoFrequency;
        if (!quantizer_.is_in_range(s)) encoded->status = Status::kNotFinite;
        if (encoded->status != Status::kOk) return;
        const int64_t states_bytes = batch_.is_coded ? batch_.shape.states_bytes() : 0;
        const int64_t low_bytes =
            round_up((batch_.shape.num_tokens * batch_.shape.num_channels * batch_.low_bits + 7) / 8, 4);
        encoded->num_words = static_cast<uint32_t>(words_end_[s] - word_[s]);
        uint8_t* bytes = encoded->allocate(states_bytes + low_bytes + 2 * int64_t{encoded->num_words});
        uint32_t states[kNumLanes];
        for (int i = 0; i < 4; ++i) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(states + 4 * i), _mm256_castsi256_si128(states_[s][i]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(states + 16 + 4 * i),
                             _mm256_extracti128_si256(states_[s][i], 1));
        }
        std::memcpy(bytes, states, states_bytes);
        std::memcpy(bytes + states_bytes, low_bits_[s], low_bytes);
        std::memcpy(bytes + states_bytes + low_bytes, word_[s], 2 * encoded->num_words);
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
            if (!kHasLowBits || batch_.is_coded) encode_symbols<kIsTail>(s, symbols, live);
        }
    }

    __attribute__((noinline)) CACHEGEN_AVX2 void encode_tail_row(int64_t channel, int channel_in_tile, int64_t row) {
        encode_row<true, true>(channel, channel_in_tile, row);
    }

    template <bool kIsTail>
    CACHEGEN_AVX2_INLINE void encode_symbols(int s, __m256i symbols, int live) {
        const EncodeTable& table = *table_of_[s];
        const __m256i is_upper = _mm256_slli_epi16(symbols, 3);  // bit 4 to bit 7
        // Only the low four bits look up; bit 7 would give zero.
        const __m256i index = _mm256_and_si256(symbols, _mm256_set1_epi8(31));
        __m256i frequency_words[2], start_words[2], frequency[4], start[4], gives[4], live_lanes[4];
        look_up_words(table.frequency_low, table.frequency_high, index, is_upper, frequency_words);
        look_up_words(table.start_low, table.start_high, index, is_upper, start_words);
        if (kIsTail) {
            const __m256i bytes = bytes_of_bits(_bzhi_u32(~0u, live));
            const __m256i words[2] = {_mm256_unpacklo_epi8(bytes, bytes), _mm256_unpackhi_epi8(bytes, bytes)};
            for (int i = 0; i < 4; ++i)
                live_lanes[i] = i % 2 == 0 ? _mm256_unpacklo_epi16(words[i / 2], words[i / 2])
                                           : _mm256_unpackhi_epi16(words[i / 2], words[i / 2]);
            for (int i = 0; i < 2; ++i)
                seen_[s] = _mm256_or_si256(seen_[s], _mm256_and_si256(words[i], frequency_words[i]));
        } else {
            seen_[s] = _mm256_or_si256(seen_[s], _mm256_or_si256(frequency_words[0], frequency_words[1]));
        }
        const __m256i zero = _mm256_setzero_si256();
        for (int i = 0; i < 2; ++i) {
            frequency[2 * i] = _mm256_unpacklo_epi16(frequency_words[i], zero);
            frequency[2 * i + 1] = _mm256_unpackhi_epi16(frequency_words[i], zero);
            start[2 * i] = _mm256_unpacklo_epi16(start_words[i], zero);
            start[2 * i + 1] = _mm256_unpackhi_epi16(start_words[i], zero);
        }
        __m256i states[4];
        for (int i = 0; i < 4; ++i) {
            states[i] = states_[s][i];
            const __m256i keeps = _mm256_cmpgt_epi32(frequency[i], _mm256_srli_epi32(states[i], 32 - kFrequencyBits));
            gives[i] = _mm256_andnot_si256(keeps, kIsTail ? live_lanes[i] : _mm256_set1_epi32(-1));
        }
        const __m256i gives_bytes =
            _mm256_packs_epi16(_mm256_packs_epi32(gives[0], gives[1]), _mm256_packs_epi32(gives[2], gives[3]));
        word_[s] = give_words(word_[s], static_cast<uint32_t>(_mm256_movemask_epi8(gives_bytes)), states);
        for (int i = 0; i < 4; ++i) {
            const __m256i shortened =
                _mm256_srlv_epi32(states[i], _mm256_and_si256(gives[i], _mm256_set1_epi32(kWordBits)));
            const __m256i coded = encode_lanes(shortened, frequency[i], start[i]);
            states_[s][i] = kIsTail ? _mm256_blendv_epi8(states[i], coded, live_lanes[i]) : coded;
        }
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
