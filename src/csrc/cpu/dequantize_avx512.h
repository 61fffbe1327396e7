// Dequantization with AVX-512: blocks of symbols, 32 channels by 64 tokens, to rows of the cache.
//
// For fp16 and bf16 a token's values come from a table of all its levels times its scale; looking up beats computing,
// since a table of 32 entries is one register. For fp32 the level is divided out anew: the table would be too long.

#pragma once

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include "cpu/avx512.h"
#include "cpu/stream_batch.h"

namespace cachegen::avx512 {

// The entry of a token's table for every word of `index`, of which only as many low bits count as the table has.
template <int kEntries>
CACHEGEN_AVX512_INLINE __m512i look_up(const uint16_t* table, __m512i index) {
    if constexpr (kEntries == 32) {
        return _mm512_permutexvar_epi16(index, _mm512_load_si512(table));
    } else if constexpr (kEntries == 64) {
        return _mm512_permutex2var_epi16(_mm512_load_si512(table), index, _mm512_load_si512(table + 32));
    } else {
        const __mmask32 is_upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(kEntries / 2));
        return _mm512_mask_mov_epi16(look_up<kEntries / 2>(table, index), is_upper,
                                     look_up<kEntries / 2>(table + kEntries / 2, index));
    }
}

// The inverse of widening for finite values, as in quantization.h.
CACHEGEN_AVX512_INLINE __m256i narrow_to_float16(__m512 values) {
    return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

CACHEGEN_AVX512_INLINE __m256i narrow_to_bfloat16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), is_odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

class Dequantizer {
  public:
    Dequantizer(const StreamBatch& batch, Dtype dtype)
        : batch_(batch), dtype_(dtype), num_entries_(num_level_entries(batch.is_coded, batch.low_bits)) {}

    // One table per token of every stream; and a row more, which the dead lanes of the last row look into.
    size_t table_bytes() const {
        const size_t num_tables = batch_.num_streams * batch_.shape.num_tokens + kNumLanes;
        return dtype_ == Dtype::kFloat32 ? 0 : sizeof(uint16_t) * num_entries_ * num_tables;
    }

    CACHEGEN_AVX512_APART void make_tables(uint8_t* memory) const {
        if (dtype_ == Dtype::kFloat32) return;
        auto* table = reinterpret_cast<uint16_t*>(memory);
        for (int s = 0; s < batch_.num_streams; ++s) {
            alignas(64) float levels[256];
            const int zero_symbol = zero_symbol_of(batch_.streams[s].num_bins);
            for (int symbol = 0; symbol < num_entries_; ++symbol) levels[symbol] = level_of(symbol, zero_symbol);
            const auto* scales = reinterpret_cast<const uint16_t*>(batch_.streams[s].scales);
            for (int64_t token = 0; token < batch_.shape.num_tokens; ++token, table += num_entries_) {
                const bool is_half = dtype_ == Dtype::kFloat16;
                const __m512 scale =
                    _mm512_set1_ps(is_half ? Float16::widen(scales[token]) : Bfloat16::widen(scales[token]));
                for (int entry = 0; entry < num_entries_; entry += 16) {
                    const __m512 values = _mm512_mul_ps(_mm512_load_ps(levels + entry), scale);
                    _mm256_store_si256(reinterpret_cast<__m256i*>(table + entry),
                                       is_half ? narrow_to_float16(values) : narrow_to_bfloat16(values));
                }
            }
        }
    }

    // Choose where the next blocks go: one or two streams, and a tile of channels.
    void begin_tile(int first_stream, int num_members, int64_t first_channel, int num_channels) {
        for (int m = 0; m < num_members; ++m)
            runs_[m] =
                TileRuns(first_channel, num_channels, batch_.head_dim, batch_.streams[first_stream + m].head_stride);
    }

    // Write a block (see TileDecoder::block) that begins at a token of its streams.
    CACHEGEN_AVX512_APART void write_block(const uint8_t* block, const uint8_t* tables, int first_stream,
                                           int num_members, int64_t first_token) const {
        switch (dtype_ == Dtype::kFloat32 ? 0 : num_entries_) {
            case 0:
                return write<0>(block, tables, first_stream, num_members, first_token);
            case 32:
                return write<32>(block, tables, first_stream, num_members, first_token);
            case 64:
                return write<64>(block, tables, first_stream, num_members, first_token);
            case 128:
                return write<128>(block, tables, first_stream, num_members, first_token);
            default:
                return write<256>(block, tables, first_stream, num_members, first_token);
        }
    }

  private:
    // kEntries is 0 for fp32.
    template <int kEntries>
    CACHEGEN_AVX512 void write(const uint8_t* block, const uint8_t* tables, int first_stream, int num_members,
                               int64_t first_token) const {
        // [channels by eights][word of the lane]: four 128-bit lanes of eight channels.
        __m512i eighths[4][8];
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 8; ++j) eighths[i][j] = _mm512_load_si512(block + 64 * (8 * i + j));
            transpose_8x8_words(eighths[i]);
        }
        const bool is_whole_row = batch_.shape.num_tokens - first_token >= kNumLanes;
        for (int member = 0; member < num_members; ++member) {
            const int64_t stream_token = (first_stream + member) * batch_.shape.num_tokens + first_token;
            const auto* table = reinterpret_cast<const uint16_t*>(tables) + stream_token * kEntries;
            if constexpr (kEntries == 0) {
                write_runs<0>(eighths, table, first_stream, member, first_token);
            } else {
                if (!is_whole_row || !runs_[member].is_whole())
                    write_runs<kEntries>(eighths, table, first_stream, member, first_token);
                else if (batch_.stores_bypass_caches)
                    write_whole<kEntries, true>(eighths, table, first_stream, member, first_token);
                else
                    write_whole<kEntries, false>(eighths, table, first_stream, member, first_token);
            }
        }
    }

    // Store rows that are whole, of one stream.
    template <int kEntries, bool kBypass>
    CACHEGEN_AVX512_INLINE void write_whole(const __m512i eighths[4][8], const uint16_t* table, int first_stream,
                                            int member, int64_t first_token) const {
        const BatchStream& stream = batch_.streams[first_stream + member];
        const int64_t token_stride = stream.token_stride;
        // One pointer per 128-bit lane, each on its way through eight tokens.
        uint16_t* rows[4];
        for (int lane = 0; lane < 4; ++lane)
            rows[lane] = reinterpret_cast<uint16_t*>(stream.values) + (first_token + 8 * lane) * token_stride +
                         runs_[member].runs[0].offset;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            // Each word holds two tokens of one channel.
            __m512i pairs[4];
            for (int i = 0; i < 4; ++i) pairs[i] = eighths[i][4 * member + j];
            transpose_4x4_lanes(pairs);
#pragma GCC unroll 4
            for (int lane = 0; lane < 4; ++lane) {
                const int token = 8 * lane + 2 * j;
                const __m512i symbols[2] = {pairs[lane], _mm512_srli_epi16(pairs[lane], 8)};
                for (int odd = 0; odd < 2; ++odd) {
                    const __m512i row = look_up<kEntries>(table + (token + odd) * kEntries, symbols[odd]);
                    if constexpr (kBypass)
                        _mm512_stream_si512(reinterpret_cast<__m512i*>(rows[lane]), row);
                    else
                        _mm512_storeu_si512(rows[lane], row);
                    rows[lane] += token_stride;
                    asm("" : "+r"(rows[lane]));
                }
            }
        }
    }

    // The same head by head, where channels or tokens are missing or values are fp32; kept short.
    template <int kEntries>
    CACHEGEN_AVX512_APART void write_runs(const __m512i eighths[4][8], const uint16_t* table, int first_stream,
                                          int member, int64_t first_token) const {
        const BatchStream& stream = batch_.streams[first_stream + member];
#pragma GCC unroll 1
        for (int j = 0; j < 4; ++j) {
            __m512i pairs[4];
            for (int i = 0; i < 4; ++i) pairs[i] = eighths[i][4 * member + j];
            transpose_4x4_lanes(pairs);
#pragma GCC unroll 1
            for (int lane = 0; lane < 4; ++lane) {
                const __m512i symbols[2] = {pairs[lane], _mm512_srli_epi16(pairs[lane], 8)};
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; ++odd) {
                    const int row = 8 * lane + 2 * j + odd;
                    const int64_t token = first_token + row;
                    if constexpr (kEntries == 0)
                        store_float32(stream, runs_[member], token,
                                      _mm512_and_si512(symbols[odd], _mm512_set1_epi16(255)));
                    else
                        store_runs(runs_[member], token,
                                   reinterpret_cast<uint16_t*>(stream.values) + token * stream.token_stride,
                                   look_up<kEntries>(table + row * kEntries, symbols[odd]));
                }
            }
        }
    }

    CACHEGEN_AVX512_INLINE void store_runs(const TileRuns& runs, int64_t token, uint16_t* address, __m512i row) const {
        if (token >= batch_.shape.num_tokens) return;
        for (int i = 0; i < runs.num_runs; ++i)
            _mm512_mask_storeu_epi16(address + runs.runs[i].offset, runs.runs[i].mask, row);
    }

    CACHEGEN_AVX512_INLINE void store_float32(const BatchStream& stream, const TileRuns& runs, int64_t token,
                                              __m512i symbols) const {
        if (token >= batch_.shape.num_tokens) return;
        float* const row = reinterpret_cast<float*>(stream.values) + token * stream.token_stride;
        const int zero_symbol = zero_symbol_of(stream.num_bins);
        const __m512 divisor = _mm512_set1_ps(static_cast<float>(zero_symbol));
        const __m512 scale = _mm512_set1_ps(reinterpret_cast<const float*>(stream.scales)[token]);
        const __m256i halves[2] = {_mm512_castsi512_si256(symbols), _mm512_extracti64x4_epi64(symbols, 1)};
        for (int half = 0; half < 2; ++half) {
            const __m512i steps = _mm512_sub_epi32(_mm512_cvtepu16_epi32(halves[half]), _mm512_set1_epi32(zero_symbol));
            const __m512 values = _mm512_mul_ps(_mm512_div_ps(_mm512_cvtepi32_ps(steps), divisor), scale);
            for (int i = 0; i < runs.num_runs; ++i)
                _mm512_mask_storeu_ps(row + runs.runs[i].offset + 16 * half,
                                      static_cast<__mmask16>(runs.runs[i].mask >> (16 * half)), values);
        }
    }

    const StreamBatch& batch_;
    const Dtype dtype_;
    const int num_entries_;
    TileRuns runs_[2];
};

}  // namespace cachegen::avx512

#endif  // CACHEGEN_X86
