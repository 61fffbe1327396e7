// The inverse transform with AVX-512 and its products of bytes.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include "cpu/avx512.h"
#include "cpu/dequantize_avx512.h"
#include "cpu/synthesis.h"

namespace cachegen::avx2 {

void compare_halves(const SynthesisPlane& plane, int64_t first_head, int64_t num_heads, int64_t first_token,
                    int64_t num_tokens, const uint16_t* decoded, Dtype dtype, ErrorsOfUnit& errors);

}  // namespace cachegen::avx2

namespace cachegen::avx512 {
namespace {

// The compiler must not take what is computed apart again, to add its parts one after the other.
CACHEGEN_AVX512_INLINE __m512i keep_together(__m512i value) {
#ifndef CACHEGEN_EMULATION
    asm("" : "+v"(value));
#endif
    return value;
}

constexpr int kVectors = kBlockChannels / 16;  // of a token's sums

CACHEGEN_AVX512 uint32_t sort(const int32_t* components, int64_t first, uint16_t* positive, int* num_positive,
                              uint16_t* negative, int* num_negative) {
    const __m512i one = _mm512_set1_epi32(1), three = _mm512_set1_epi32(3);
    const __m512i begin = _mm512_loadu_si512(components), end = _mm512_loadu_si512(components + 16);
    alignas(64) static const uint16_t kLanes[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    const __m512i places = _mm512_slli_epi16(
        _mm512_add_epi16(_mm512_load_si512(kLanes), _mm512_set1_epi16(static_cast<int16_t>(first))), 6);
    const __mmask32 is_negative = _mm512_kunpackw(_mm512_movepi32_mask(end), _mm512_movepi32_mask(begin));
    const __mmask32 is_positive =
        _mm512_kunpackw(_mm512_test_epi32_mask(end, end), _mm512_test_epi32_mask(begin, begin)) & ~is_negative;
    _mm512_storeu_si512(positive + *num_positive, _mm512_maskz_compress_epi16(is_positive, places));
    _mm512_storeu_si512(negative + *num_negative, _mm512_maskz_compress_epi16(is_negative, places));
    *num_positive += _mm_popcnt_u32(is_positive);
    *num_negative += _mm_popcnt_u32(is_negative);
    // Beyond 1 and -1: one more is 3 or above as an unsigned number.
    return _mm512_kunpackw(_mm512_cmpge_epu32_mask(_mm512_add_epi32(end, one), three),
                           _mm512_cmpge_epu32_mask(_mm512_add_epi32(begin, one), three));
}

// Add to sums of kTokens tokens what quads of components come to.
template <int kTokens>
CACHEGEN_AVX512_INLINE void add_quads(__m512i sums[kTokens][kVectors], const uint8_t* rows, int64_t num_quads,
                                      const int8_t* digits, int64_t stride) {
    for (int64_t quad = 0; quad < num_quads; ++quad, rows += kQuad * kBlockChannels, digits += kQuad) {
        __m512i entries[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) entries[v] = _mm512_loadu_si512(rows + 64 * v);
#pragma GCC unroll 6
        for (int t = 0; t < kTokens; ++t) {
            int32_t four;
            __builtin_memcpy(&four, digits + t * stride, sizeof four);
            const __m512i digit = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) add_products(sums[t][v], entries[v], digit);
        }
    }
}

template <int kTokens>
CACHEGEN_AVX512_INLINE void multiply_tokens(const uint8_t* dense, int64_t num_quads, const uint8_t* fine,
                                            int64_t num_fine_quads, const int8_t* digits, int64_t digit_stride,
                                            int32_t* sums, int64_t stride) {
    __m512i made[kTokens][kVectors];
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) made[t][v] = _mm512_setzero_si512();
    add_quads<kTokens>(made, dense, num_quads, digits, digit_stride);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) made[t][v] = _mm512_slli_epi32(made[t][v], kFineShift);
    add_quads<kTokens>(made, fine, num_fine_quads, digits, digit_stride);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(sums + t * stride + 16 * v, made[t][v]);
}

CACHEGEN_AVX512 void multiply_dense(const SynthesisMatrix& matrix, int64_t block, const TokenTile& tile, int32_t* sums,
                                    int64_t stride) {
    constexpr int kTogether = 6;
    const int64_t num_quads = matrix.num_dense / kQuad, num_fine_quads = matrix.num_fine / kQuad;
    const uint8_t* const dense = matrix.dense + block * num_quads * kQuad * kBlockChannels;
    const uint8_t* const fine = matrix.fine + block * num_fine_quads * kQuad * kBlockChannels;
    const int64_t digit_stride = matrix.num_dense;
    int64_t token = 0;
    for (; token + kTogether <= tile.num_tokens; token += kTogether)
        multiply_tokens<kTogether>(dense, num_quads, fine, num_fine_quads, tile.low.data() + token * digit_stride,
                                   digit_stride, sums + token * stride, stride);
    for (; token < tile.num_tokens; ++token)
        multiply_tokens<1>(dense, num_quads, fine, num_fine_quads, tile.low.data() + token * digit_stride, digit_stride,
                           sums + token * stride, stride);
    for (token = 0; token < tile.num_tokens; ++token) {
        const int64_t num_high = tile.high_quads[token];
        if (num_high == 0) continue;
        alignas(64) int32_t high[kBlockChannels];
        multiply_tokens<1>(dense, num_high, fine, num_high < num_fine_quads ? num_high : num_fine_quads,
                           tile.high.data() + token * digit_stride, digit_stride, high, kBlockChannels);
        for (int v = 0; v < kVectors; ++v) {
            int32_t* const sum = sums + token * stride + 16 * v;
            const __m512i part = _mm512_slli_epi32(_mm512_load_si512(high + 16 * v), kDigitShift);
            _mm512_storeu_si512(sum, _mm512_add_epi32(_mm512_loadu_si512(sum), part));
        }
    }
}

CACHEGEN_AVX512 void add_sparse(const uint8_t* section, const TokenTile& tile, const uint32_t* row_starts,
                                int32_t* sums, int64_t stride) {
    const uint16_t* row = tile.rows.data() + kQuad * int64_t{row_starts[0]};
    for (int64_t token = 0; token < tile.num_tokens; ++token, sums += stride) {
        // What comes next is read in no order, which no processor fetches ahead.
        const uint8_t* const next = section + kSectionRows * kBlockChannels + 4 * 64 * token;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm_prefetch(reinterpret_cast<const char*>(next + 64 * i), _MM_HINT_T1);
        const uint16_t* const last = tile.rows.data() + kQuad * int64_t{row_starts[token + 1]};
        do {
            const uint16_t* const end = last - row > kQuad * kRunQuads ? row + kQuad * kRunQuads : last;
            // Of pairs of bytes the sum, modulo 2^16, and the odd ones' alone.
            __m512i all = _mm512_setzero_si512(), odd = all;
            for (; row != end; row += kQuad) {
                const __m512i plus =
                    _mm512_add_epi8(_mm512_loadu_si512(section + row[0]), _mm512_loadu_si512(section + row[1]));
                const __m512i minus =
                    _mm512_add_epi8(_mm512_loadu_si512(section + row[2]), _mm512_loadu_si512(section + row[3]));
                // What waits for the row before is one addition each.
                all = _mm512_add_epi16(all, keep_together(_mm512_sub_epi16(plus, minus)));
                odd = _mm512_add_epi16(
                    odd, keep_together(_mm512_sub_epi16(_mm512_srli_epi16(plus, 8), _mm512_srli_epi16(minus, 8))));
            }
            const __m512i even = _mm512_sub_epi16(all, _mm512_slli_epi16(odd, 8));
            const __m512i words[2] = {even, odd};
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(words[i], 16), 16 - kSparseShift);
                const __m512i high = _mm512_slli_epi32(_mm512_srai_epi32(words[i], 16), kSparseShift);
                int32_t* const sum = sums + 32 * i;
                _mm512_storeu_si512(sum, _mm512_add_epi32(_mm512_loadu_si512(sum), low));
                _mm512_storeu_si512(sum + 16, _mm512_add_epi32(_mm512_loadu_si512(sum + 16), high));
            }
        } while (row != last);
    }
}

CACHEGEN_AVX512_INLINE __m512 value_of(const int32_t* sums, __m512i correction, const float* factors,
                                       const float* means) {
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), correction));
    return _mm512_add_ps(_mm512_mul_ps(sum, _mm512_loadu_ps(factors)), _mm512_loadu_ps(means));
}

CACHEGEN_AVX512_INLINE void turn(__m512* first, __m512* second, __m512 cosine, __m512 sine) {
    const __m512 turned = _mm512_sub_ps(_mm512_mul_ps(*first, cosine), _mm512_mul_ps(*second, sine));
    *second = _mm512_add_ps(_mm512_mul_ps(*second, cosine), _mm512_mul_ps(*first, sine));
    *first = turned;
}

template <bool kIsHalf>
CACHEGEN_AVX512_INLINE __m256i narrow(__m512 values) {
    if constexpr (kIsHalf) return narrow_to_float16(values);
    return narrow_to_bfloat16(values);
}

// Turn the pairs of a head in place.
CACHEGEN_AVX512_INLINE void turn_head(float* head, const SynthesisPlane& plane, const float* cosines,
                                      const float* sines) {
    for (int64_t pair = 0; pair < plane.num_pairs; pair += 16) {
        const auto live = static_cast<__mmask16>(first_lanes(plane.num_pairs - pair));
        const __m512 cosine = _mm512_maskz_loadu_ps(live, cosines + pair);
        const __m512 sine = _mm512_maskz_loadu_ps(live, sines + pair);
        if (!plane.is_interleaved) {
            float* const first = head + plane.offset + pair;
            float* const second = first + plane.num_pairs;
            __m512 x = _mm512_maskz_loadu_ps(live, first), y = _mm512_maskz_loadu_ps(live, second);
            turn(&x, &y, cosine, sine);
            _mm512_mask_storeu_ps(first, live, x);
            _mm512_mask_storeu_ps(second, live, y);
            continue;
        }
        float* const both = head + plane.offset + 2 * pair;
        const uint32_t lanes = first_lanes(2 * (plane.num_pairs - pair));
        const auto low = static_cast<__mmask16>(lanes), high = static_cast<__mmask16>(lanes >> 16);
        const __m512 begin = _mm512_maskz_loadu_ps(low, both), end = _mm512_maskz_loadu_ps(high, both + 16);
        const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
        const __m512i merge = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        __m512 x = _mm512_permutex2var_ps(begin, evens, end), y = _mm512_permutex2var_ps(begin, odds, end);
        turn(&x, &y, cosine, sine);
        _mm512_mask_storeu_ps(both, low, _mm512_permutex2var_ps(x, merge, y));
        _mm512_mask_storeu_ps(both + 16, high,
                              _mm512_permutex2var_ps(x, _mm512_add_epi32(merge, _mm512_set1_epi32(8)), y));
    }
}

// Store 32 values: past the caches, which the rows of the matrix are to stay in, where they are a whole line.
CACHEGEN_AVX512_INLINE void store_both(uint16_t* target, const __m256i halves[2], bool bypasses) {
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
    if (bypasses && reinterpret_cast<uintptr_t>(target) % 64 == 0)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target), both);
    else
        _mm512_storeu_si512(target, both);
}

template <bool kIsHalf>
CACHEGEN_AVX512 void finish_tokens(const int32_t* sums, int64_t stride, const TokenTile& tile,
                                   const SynthesisPlane& plane, int64_t first_head, int64_t num_heads,
                                   const float* factors, const float* means, float* row) {
    const int64_t num_channels = num_heads * plane.head_dim;
    const bool turns_whole = !plane.is_interleaved && plane.offset == 0 && plane.num_pairs % 32 == 0 &&
                             2 * plane.num_pairs == plane.head_dim;
    // Few tokens are likely to be read again at once.
    const bool bypasses = tile.num_tokens == kTileTokens && !plane.is_read_soon;
    for (int64_t token = 0; token < tile.num_tokens; ++token, sums += stride) {
        const __m512i correction = _mm512_set1_epi32(tile.corrections[token]);
        const float* const cosines = plane.cosines + (tile.first_token + token) * plane.num_pairs;
        const float* const sines = plane.sines + (tile.first_token + token) * plane.num_pairs;
        uint16_t* const values = plane.values + (tile.first_token - plane.first_token + token) * plane.token_stride +
                                 (first_head - plane.first_head) * plane.head_stride;
        if (turns_whole) {
            for (int64_t head = 0; head < num_heads; ++head) {
                for (int64_t pair = 0; pair < plane.num_pairs; pair += 32) {
                    __m256i firsts[2], seconds[2];
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const int64_t u = head * plane.head_dim + pair + 16 * i, v = u + plane.num_pairs;
                        __m512 x = value_of(sums + u, correction, factors + u, means + u);
                        __m512 y = value_of(sums + v, correction, factors + v, means + v);
                        turn(&x, &y, _mm512_loadu_ps(cosines + pair + 16 * i), _mm512_loadu_ps(sines + pair + 16 * i));
                        firsts[i] = narrow<kIsHalf>(x);
                        seconds[i] = narrow<kIsHalf>(y);
                    }
                    uint16_t* const target = values + head * plane.head_stride + pair;
                    store_both(target, firsts, bypasses);
                    store_both(target + plane.num_pairs, seconds, bypasses);
                }
            }
            continue;
        }
        if (plane.num_pairs == 0 && plane.head_dim % 32 == 0) {
            for (int64_t head = 0; head < num_heads; ++head)
                for (int64_t dim = 0; dim < plane.head_dim; dim += 32) {
                    __m256i halves[2];
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        const int64_t u = head * plane.head_dim + dim + 16 * i;
                        halves[i] = narrow<kIsHalf>(value_of(sums + u, correction, factors + u, means + u));
                    }
                    store_both(values + head * plane.head_stride + dim, halves, bypasses);
                }
            continue;
        }
        for (int64_t channel = 0; channel < num_channels; channel += 16)
            _mm512_storeu_ps(row + channel, value_of(sums + channel, correction, factors + channel, means + channel));
        for (int64_t head = 0; head < num_heads; ++head) {
            float* const from = row + head * plane.head_dim;
            turn_head(from, plane, cosines, sines);
            for (int64_t dim = 0; dim < plane.head_dim; dim += 16) {
                const auto live = static_cast<__mmask16>(first_lanes(plane.head_dim - dim));
                _mm512_mask_storeu_epi16(
                    values + head * plane.head_stride + dim, live,
                    _mm512_castsi256_si512(narrow<kIsHalf>(_mm512_maskz_loadu_ps(live, from + dim))));
            }
        }
    }
    if (bypasses) _mm_sfence();
}

CACHEGEN_AVX512 void finish(const int32_t* sums, int64_t stride, const TokenTile& tile, const SynthesisPlane& plane,
                            int64_t first_head, int64_t num_heads, const float* factors, const float* means,
                            Dtype dtype, float* row) {
    if (dtype == Dtype::kFloat16)
        finish_tokens<true>(sums, stride, tile, plane, first_head, num_heads, factors, means, row);
    else
        finish_tokens<false>(sums, stride, tile, plane, first_head, num_heads, factors, means, row);
}

template <bool kIsHalf>
CACHEGEN_AVX512_INLINE __m512 widen_value(__m256i values) {
    if constexpr (kIsHalf) return _mm512_cvtph_ps(values);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

// Heads of a multiple of 32 dims.
template <bool kIsHalf>
CACHEGEN_AVX512 void compare_tokens(const SynthesisPlane& plane, int64_t first_head, int64_t num_heads,
                                    int64_t first_token, int64_t num_tokens, const uint16_t* decoded,
                                    ErrorsOfUnit& errors) {
    __m512 least = _mm512_setzero_ps(), most = least;
    for (int64_t head = 0; head < num_heads; ++head) {
        for (int64_t dim = 0; dim < plane.head_dim; dim += 32) {
            const int64_t channel = head * plane.head_dim + dim;
            const uint16_t* values =
                plane.values + first_token * plane.token_stride + (first_head + head) * plane.head_stride + dim;
            const uint16_t* from = decoded + channel;
            __m512 largest[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, sums[2] = {largest[0], largest[0]};
            for (int64_t token = 0; token < num_tokens; ++token) {
                _mm_prefetch(reinterpret_cast<const char*>(values + 12 * plane.token_stride), _MM_HINT_T0);
                const __m512i found = _mm512_loadu_si512(from), value = _mm512_loadu_si512(values);
                const __m512 decoded_parts[2] = {widen_value<kIsHalf>(_mm512_castsi512_si256(found)),
                                                 widen_value<kIsHalf>(_mm512_extracti64x4_epi64(found, 1))};
                const __m512 parts[2] = {widen_value<kIsHalf>(_mm512_castsi512_si256(value)),
                                         widen_value<kIsHalf>(_mm512_extracti64x4_epi64(value, 1))};
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    least = _mm512_min_ps(least, decoded_parts[i]);
                    most = _mm512_max_ps(most, decoded_parts[i]);
                    const __m512 error = _mm512_abs_ps(_mm512_sub_ps(parts[i], decoded_parts[i]));
                    largest[i] = _mm512_max_ps(largest[i], error);
                    sums[i] = _mm512_add_ps(sums[i], error);
                }
                values += plane.token_stride;
                from += num_heads * plane.head_dim;
            }
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                _mm512_storeu_ps(errors.largest + channel + 16 * i, largest[i]);
                _mm512_storeu_ps(errors.sums + channel + 16 * i, sums[i]);
            }
        }
    }
    alignas(64) float low[16], high[16];
    _mm512_store_ps(low, least);
    _mm512_store_ps(high, most);
    for (int i = 0; i < 16; ++i) {
        if (low[i] < errors.least) errors.least = low[i];
        if (high[i] > errors.most) errors.most = high[i];
    }
}

CACHEGEN_AVX512 void compare(const SynthesisPlane& plane, int64_t first_head, int64_t num_heads, int64_t first_token,
                             int64_t num_tokens, const uint16_t* decoded, Dtype dtype, ErrorsOfUnit& errors) {
    if (plane.head_dim % 32 != 0)
        avx2::compare_halves(plane, first_head, num_heads, first_token, num_tokens, decoded, dtype, errors);
    else if (dtype == Dtype::kFloat16)
        compare_tokens<true>(plane, first_head, num_heads, first_token, num_tokens, decoded, errors);
    else
        compare_tokens<false>(plane, first_head, num_heads, first_token, num_tokens, decoded, errors);
}

}  // namespace

const SynthesisKernels kSynthesis = {sort, multiply_dense, add_sparse, finish, compare};

}  // namespace cachegen::avx512

#endif  // CACHEGEN_X86
