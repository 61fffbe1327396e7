// Dequantization with AVX2: blocks of symbols, 32 channels by 32 tokens, to rows of the cache.
//
// Up to 32 levels, a token's fp16 or bf16 values come from a table; beyond, and for fp32, they are computed.

#pragma once

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx2.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx2 {

// Eight values narrowed to fp16 or bf16, as in quantization.h.
CACHEGEN_AVX2_INLINE __m128i narrow(__m256 values, bool is_half) {
    if (is_half) return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), is_odd);
    const __m256i words = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

class Dequantizer {
  public:
    Dequantizer(const StreamBatch& batch, Dtype dtype)
        : batch_(batch),
          dtype_(dtype),
          has_tables_(dtype != Dtype::kFloat32 && num_level_entries(batch.is_coded, batch.low_bits) == 32) {}

    // Per token of every stream 32 bytes: the low bytes of the values of its zero symbol and the 15 above, then the
    // high bytes. The symbols below have the same values, negated.
    size_t table_bytes() const {
        return has_tables_ ? size_t{kTableBytes} * batch_.num_streams * batch_.shape.num_tokens : 0;
    }

    CACHEGEN_AVX2 void make_tables(uint8_t* table) const {
        if (!has_tables_) return;
        const __m128i low_bytes = _mm_set1_epi16(0x00FF);
        for (int s = 0; s < batch_.num_streams; ++s) {
            const int zero_symbol = zero_symbol_of(batch_.streams[s].num_bins);
            alignas(32) float levels[16];
            for (int step = 0; step < 16; ++step) levels[step] = level_of(zero_symbol + step, zero_symbol);
            for (int64_t token = 0; token < batch_.shape.num_tokens; ++token, table += kTableBytes) {
                const __m256 scale = _mm256_set1_ps(scale_of(s, token));
                __m128i words[2];
                for (int i = 0; i < 2; ++i)
                    words[i] = narrow(_mm256_mul_ps(_mm256_load_ps(levels + 8 * i), scale), is_half());
                _mm_store_si128(
                    reinterpret_cast<__m128i*>(table),
                    _mm_packus_epi16(_mm_and_si128(words[0], low_bytes), _mm_and_si128(words[1], low_bytes)));
                _mm_store_si128(reinterpret_cast<__m128i*>(table + 16),
                                _mm_packus_epi16(_mm_srli_epi16(words[0], 8), _mm_srli_epi16(words[1], 8)));
            }
        }
    }

    // Choose where the next blocks go: a stream, and a tile of channels. Foreign tables may spell symbols that the
    // quantizer does not have; those that lie beyond the tables of values are computed.
    void begin_tile(int s, int64_t first_channel, int num_channels, int highest_symbol) {
        runs_ = TileRuns(first_channel, num_channels, batch_.head_dim, batch_.streams[s].head_stride);
        const int zero_symbol = zero_symbol_of(batch_.streams[s].num_bins);
        takes_tables_ = has_tables_ && zero_symbol < 16 && highest_symbol - zero_symbol < 16;
    }

    // Write a block, [channel][32 tokens], that begins at a token of its stream.
    CACHEGEN_AVX2 void write_block(const uint8_t* block, const uint8_t* tables, int s, int64_t first_token) const {
        const int64_t rest = batch_.shape.num_tokens - first_token;
        for (int half = 0; half < 2; ++half) {
            __m128i rows[2][16];
            for (int i = 0; i < 2; ++i) {
                for (int j = 0; j < 16; ++j)
                    rows[i][j] =
                        _mm_load_si128(reinterpret_cast<const __m128i*>(block + 32 * (16 * i + j) + 16 * half));
                transpose_16x16_bytes(rows[i]);
            }
            const int count = static_cast<int>(std::clamp<int64_t>(rest - 16 * half, 0, 16));
            const int64_t token = first_token + 16 * half;
            if (!takes_tables_) {
                for (int j = 0; j < count; ++j) compute(rows[0][j], rows[1][j], s, token + j);
                continue;
            }
            const uint8_t* table = tables + kTableBytes * (s * batch_.shape.num_tokens + token);
            if (!runs_.is_whole())
                write_tokens<Target::kRuns>(rows, count, table, s, token);
            else if (batch_.stores_bypass_caches)
                write_tokens<Target::kMemory>(rows, count, table, s, token);
            else
                write_tokens<Target::kCache>(rows, count, table, s, token);
        }
    }

  private:
    static constexpr int kTableBytes = 32;  // of a token

    bool is_half() const { return dtype_ == Dtype::kFloat16; }

    float scale_of(int s, int64_t token) const {
        const uint8_t* scales = batch_.streams[s].scales;
        if (dtype_ == Dtype::kFloat32) return reinterpret_cast<const float*>(scales)[token];
        const uint16_t scale = reinterpret_cast<const uint16_t*>(scales)[token];
        return is_half() ? Float16::widen(scale) : Bfloat16::widen(scale);
    }

    // Where a token's 32 values go: to several runs, to one run in memory, past the caches, or to one in the caches.
    enum class Target { kRuns, kMemory, kCache };

    template <Target kTarget>
    CACHEGEN_AVX2_INLINE void write_tokens(const __m128i rows[2][16], int count, const uint8_t* table, int s,
                                           int64_t first_token) const {
        const BatchStream& stream = batch_.streams[s];
        const int64_t stride = stream.token_stride, offset = runs_.runs[0].offset;
        const __m256i zero_symbol = _mm256_set1_epi8(static_cast<char>(zero_symbol_of(stream.num_bins)));
        const __m256i sign_bit = _mm256_set1_epi8(static_cast<char>(0x80));
        auto* row = reinterpret_cast<uint16_t*>(stream.values) + first_token * stride;
        for (int j = 0; j < count; ++j, row += stride, table += kTableBytes) {
            // Channels 0-7 and 16-23 in one lane, so that unpacking gives channels 0-15 and 16-31.
            const __m256i symbols = _mm256_permute4x64_epi64(_mm256_set_m128i(rows[1][j], rows[0][j]), 0xD8);
            const __m256i steps = _mm256_sub_epi8(symbols, zero_symbol);
            const __m256i magnitudes = _mm256_abs_epi8(steps);
            const __m256i low = _mm256_shuffle_epi8(load_twice(table), magnitudes);
            const __m256i high = _mm256_xor_si256(_mm256_shuffle_epi8(load_twice(table + 16), magnitudes),
                                                  _mm256_and_si256(steps, sign_bit));
            const __m256i values[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
            if (kTarget == Target::kRuns) {
                copy_runs(row, values);
                continue;
            }
            auto* const address = reinterpret_cast<__m256i*>(row + offset);
            for (int i = 0; i < 2; ++i) {
                if (kTarget == Target::kMemory)
                    _mm256_stream_si256(address + i, values[i]);
                else
                    _mm256_storeu_si256(address + i, values[i]);
            }
        }
    }

    CACHEGEN_AVX2 void compute(__m128i first, __m128i second, int s, int64_t token) const {
        const BatchStream& stream = batch_.streams[s];
        const int zero_symbol = zero_symbol_of(stream.num_bins);
        const __m256 scale = _mm256_set1_ps(scale_of(s, token));
        const __m256 divisor = _mm256_set1_ps(static_cast<float>(zero_symbol));
        const __m128i symbols[4] = {first, _mm_srli_si128(first, 8), second, _mm_srli_si128(second, 8)};
        alignas(32) float values[32];
        alignas(32) uint16_t narrowed[32];
        for (int i = 0; i < 4; ++i) {
            const __m256i steps = _mm256_sub_epi32(_mm256_cvtepu8_epi32(symbols[i]), _mm256_set1_epi32(zero_symbol));
            const __m256 result = _mm256_mul_ps(_mm256_div_ps(_mm256_cvtepi32_ps(steps), divisor), scale);
            if (dtype_ == Dtype::kFloat32)
                _mm256_store_ps(values + 8 * i, result);
            else
                _mm_store_si128(reinterpret_cast<__m128i*>(narrowed + 8 * i), narrow(result, is_half()));
        }
        if (dtype_ == Dtype::kFloat32)
            copy_runs(reinterpret_cast<float*>(stream.values) + token * stream.token_stride, values);
        else
            copy_runs(reinterpret_cast<uint16_t*>(stream.values) + token * stream.token_stride, narrowed);
    }

    // Copy the values of 32 channels to where their heads are.
    template <class Value>
    void copy_runs(Value* row, const void* values) const {
        for (int i = 0; i < runs_.num_runs; ++i) {
            const int first = __builtin_ctz(runs_.runs[i].mask), count = __builtin_popcount(runs_.runs[i].mask);
            std::memcpy(row + runs_.runs[i].offset + first, static_cast<const Value*>(values) + first,
                        count * sizeof(Value));
        }
    }

    const StreamBatch& batch_;
    const Dtype dtype_;
    const bool has_tables_;
    bool takes_tables_ = false;
    TileRuns runs_;
};

}  // namespace cachegen::avx2

#endif  // CACHEGEN_X86
