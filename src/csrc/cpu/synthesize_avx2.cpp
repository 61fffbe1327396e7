// The inverse transform with AVX2; see synthesize_avx512.cpp, which does the same by vectors twice as wide.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include "cpu/avx2.h"
#include "cpu/half_planes_avx2.h"
#include "cpu/synthesis.h"

namespace cachegen::avx2 {
namespace {

CACHEGEN_AVX2_INLINE __m256i load(const void* address) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(address));
}

CACHEGEN_AVX2_INLINE void store(void* address, __m256i value) {
    _mm256_storeu_si256(static_cast<__m256i*>(address), value);
}

// As in synthesize_avx512.cpp.
CACHEGEN_AVX2_INLINE __m256i keep_together(__m256i value) {
    asm("" : "+x"(value));
    return value;
}

CACHEGEN_AVX2_INLINE uint32_t signs_of(__m256i lanes) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
}

CACHEGEN_AVX2 uint32_t sort(const int32_t* components, int64_t first, uint16_t* positive, int* num_positive,
                            uint16_t* negative, int* num_negative) {
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi32(1);
    uint32_t is_positive = 0, is_negative = 0, is_large = 0;
    for (int i = 0; i < 4; ++i) {
        const __m256i part = load(components + 8 * i);
        is_positive |= signs_of(_mm256_cmpgt_epi32(part, zero)) << (8 * i);
        is_negative |= signs_of(part) << (8 * i);
        is_large |= signs_of(_mm256_or_si256(_mm256_cmpgt_epi32(part, one),
                                             _mm256_cmpgt_epi32(_mm256_sub_epi32(zero, one), part)))
                    << (8 * i);
    }
    for (; is_positive != 0; is_positive &= is_positive - 1)
        positive[(*num_positive)++] = static_cast<uint16_t>((first + __builtin_ctz(is_positive)) * 64);
    for (; is_negative != 0; is_negative &= is_negative - 1)
        negative[(*num_negative)++] = static_cast<uint16_t>((first + __builtin_ctz(is_negative)) * 64);
    return is_large;
}

// Add to sums of kTokens tokens and 16 channels what quads of components come to. Two products of a byte and a digit
// fit 16 bits: 2 x 255 x 64 is below 2^15.
template <int kTokens>
CACHEGEN_AVX2_INLINE void add_quads(__m256i sums[kTokens][2], const uint8_t* rows, int64_t num_quads,
                                    const int8_t* digits, int64_t stride) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t quad = 0; quad < num_quads; ++quad, rows += kQuad * kBlockChannels, digits += kQuad) {
        const __m256i entries[2] = {load(rows), load(rows + 32)};
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
            int32_t four;
            __builtin_memcpy(&four, digits + t * stride, sizeof four);
            const __m256i digit = _mm256_set1_epi32(four);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v)
                sums[t][v] =
                    _mm256_add_epi32(sums[t][v], _mm256_madd_epi16(_mm256_maddubs_epi16(entries[v], digit), ones));
        }
    }
}

template <int kTokens>
CACHEGEN_AVX2_INLINE void multiply_tokens(const uint8_t* dense, int64_t num_quads, const uint8_t* fine,
                                          int64_t num_fine_quads, const int8_t* digits, int64_t digit_stride,
                                          int32_t* sums, int64_t stride) {
    for (int64_t channel = 0; channel < kBlockChannels; channel += 16) {
        __m256i made[kTokens][2];
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) made[t][0] = made[t][1] = _mm256_setzero_si256();
        add_quads<kTokens>(made, dense + kQuad * channel, num_quads, digits, digit_stride);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
            for (int v = 0; v < 2; ++v) made[t][v] = _mm256_slli_epi32(made[t][v], kFineShift);
        add_quads<kTokens>(made, fine + kQuad * channel, num_fine_quads, digits, digit_stride);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t)
            for (int v = 0; v < 2; ++v) store(sums + t * stride + channel + 8 * v, made[t][v]);
    }
}

CACHEGEN_AVX2 void multiply_dense(const SynthesisMatrix& matrix, int64_t block, const TokenTile& tile, int32_t* sums,
                                  int64_t stride) {
    constexpr int kTogether = 4;
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
        int32_t high[kBlockChannels];
        multiply_tokens<1>(dense, num_high, fine, num_high < num_fine_quads ? num_high : num_fine_quads,
                           tile.high.data() + token * digit_stride, digit_stride, high, kBlockChannels);
        for (int64_t channel = 0; channel < kBlockChannels; channel += 8) {
            int32_t* const sum = sums + token * stride + channel;
            store(sum, _mm256_add_epi32(load(sum), _mm256_slli_epi32(load(high + channel), kDigitShift)));
        }
    }
}

CACHEGEN_AVX2 void add_sparse(const uint8_t* section, const TokenTile& tile, const uint32_t* row_starts, int32_t* sums,
                              int64_t stride) {
    const uint16_t* row = tile.rows.data() + kQuad * int64_t{row_starts[0]};
    for (int64_t token = 0; token < tile.num_tokens; ++token, sums += stride) {
        const uint16_t* const last = tile.rows.data() + kQuad * int64_t{row_starts[token + 1]};
        do {
            const uint16_t* const end = last - row > kQuad * kRunQuads ? row + kQuad * kRunQuads : last;
            __m256i all[2], odd[2];
            for (int half = 0; half < 2; ++half) all[half] = odd[half] = _mm256_setzero_si256();
            for (; row != end; row += kQuad) {
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    const uint8_t* const from = section + 32 * half;
                    const __m256i plus = _mm256_add_epi8(load(from + row[0]), load(from + row[1]));
                    const __m256i minus = _mm256_add_epi8(load(from + row[2]), load(from + row[3]));
                    // What waits for the row before is one addition each.
                    all[half] = _mm256_add_epi16(all[half], keep_together(_mm256_sub_epi16(plus, minus)));
                    odd[half] = _mm256_add_epi16(
                        odd[half],
                        keep_together(_mm256_sub_epi16(_mm256_srli_epi16(plus, 8), _mm256_srli_epi16(minus, 8))));
                }
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const __m256i words[2] = {_mm256_sub_epi16(all[half], _mm256_slli_epi16(odd[half], 8)), odd[half]};
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                    const __m256i low = _mm256_srai_epi32(_mm256_slli_epi32(words[i], 16), 16 - kSparseShift);
                    const __m256i high = _mm256_slli_epi32(_mm256_srai_epi32(words[i], 16), kSparseShift);
                    int32_t* const sum = sums + 32 * i + 8 * half;
                    store(sum, _mm256_add_epi32(load(sum), low));
                    store(sum + 16, _mm256_add_epi32(load(sum + 16), high));
                }
            }
        } while (row != last);
    }
}

// The inverse of widening for finite values, as in quantization.h: eight values.
template <bool kIsHalf>
CACHEGEN_AVX2_INLINE __m128i narrow(__m256 values) {
    if constexpr (kIsHalf) return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), is_odd), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

// Turn pairs of a head in place: eight at a time where they are halves.
CACHEGEN_AVX2 void turn_head(float* head, const SynthesisPlane& plane, const float* cosines, const float* sines) {
    const int64_t step = plane.is_interleaved ? 2 : 1;
    float* const firsts = head + plane.offset;
    float* const seconds = firsts + (plane.is_interleaved ? 1 : plane.num_pairs);
    int64_t pair = 0;
    if (!plane.is_interleaved) {
        for (; pair + 8 <= plane.num_pairs; pair += 8) {
            const __m256 x = _mm256_loadu_ps(firsts + pair), y = _mm256_loadu_ps(seconds + pair);
            const __m256 cosine = _mm256_loadu_ps(cosines + pair), sine = _mm256_loadu_ps(sines + pair);
            _mm256_storeu_ps(firsts + pair, _mm256_sub_ps(_mm256_mul_ps(x, cosine), _mm256_mul_ps(y, sine)));
            _mm256_storeu_ps(seconds + pair, _mm256_add_ps(_mm256_mul_ps(y, cosine), _mm256_mul_ps(x, sine)));
        }
    }
    for (; pair < plane.num_pairs; ++pair) {
        float &first = firsts[step * pair], &second = seconds[step * pair];
        const float x = first, y = second;
        first = x * cosines[pair] - y * sines[pair];
        second = y * cosines[pair] + x * sines[pair];
    }
}

template <bool kIsHalf>
CACHEGEN_AVX2 void finish_tokens(const int32_t* sums, int64_t stride, const TokenTile& tile,
                                 const SynthesisPlane& plane, int64_t first_head, int64_t num_heads,
                                 const float* factors, const float* means, float* row) {
    const int64_t num_channels = num_heads * plane.head_dim;
    for (int64_t token = 0; token < tile.num_tokens; ++token, sums += stride) {
        const __m256i correction = _mm256_set1_epi32(tile.corrections[token]);
        for (int64_t channel = 0; channel < num_channels; channel += 8) {
            const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(load(sums + channel), correction));
            _mm256_storeu_ps(row + channel, _mm256_add_ps(_mm256_mul_ps(sum, _mm256_loadu_ps(factors + channel)),
                                                          _mm256_loadu_ps(means + channel)));
        }
        const int64_t angles = (tile.first_token + token) * plane.num_pairs;
        uint16_t* const values = plane.values + (tile.first_token - plane.first_token + token) * plane.token_stride +
                                 (first_head - plane.first_head) * plane.head_stride;
        for (int64_t head = 0; head < num_heads; ++head) {
            float* const from = row + head * plane.head_dim;
            if (plane.num_pairs != 0) turn_head(from, plane, plane.cosines + angles, plane.sines + angles);
            uint16_t* const target = values + head * plane.head_stride;
            int64_t dim = 0;
            for (; dim + 8 <= plane.head_dim; dim += 8)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(target + dim),
                                 narrow<kIsHalf>(_mm256_loadu_ps(from + dim)));
            for (; dim < plane.head_dim; ++dim)
                target[dim] = static_cast<uint16_t>(_mm_cvtsi128_si32(narrow<kIsHalf>(_mm256_set1_ps(from[dim]))));
        }
    }
}

CACHEGEN_AVX2 void finish(const int32_t* sums, int64_t stride, const TokenTile& tile, const SynthesisPlane& plane,
                          int64_t first_head, int64_t num_heads, const float* factors, const float* means, Dtype dtype,
                          float* row) {
    if (dtype == Dtype::kFloat16)
        finish_tokens<true>(sums, stride, tile, plane, first_head, num_heads, factors, means, row);
    else
        finish_tokens<false>(sums, stride, tile, plane, first_head, num_heads, factors, means, row);
}

template <bool kIsHalf>
CACHEGEN_AVX2 void compare_tokens(const SynthesisPlane& plane, int64_t first_head, int64_t num_heads,
                                  int64_t first_token, int64_t num_tokens, const uint16_t* decoded,
                                  ErrorsOfUnit& errors) {
    __m256 least = _mm256_setzero_ps(), most = least;
    for (int64_t head = 0; head < num_heads; ++head) {
        for (int64_t dim = 0; dim < plane.head_dim; dim += kHalfWidth) {
            const int64_t count = plane.head_dim - dim, channel = head * plane.head_dim + dim;
            const uint16_t* values =
                plane.values + first_token * plane.token_stride + (first_head + head) * plane.head_stride + dim;
            const uint16_t* from = decoded + channel;
            __m256 largest = _mm256_setzero_ps(), sums = largest;
            for (int64_t token = 0; token < num_tokens; ++token) {
                const __m256 found = widen_half<kIsHalf>(from, count);
                least = _mm256_min_ps(least, found);
                most = _mm256_max_ps(most, found);
                const __m256 error = magnitude(_mm256_sub_ps(widen_half<kIsHalf>(values, count), found));
                largest = _mm256_max_ps(largest, error);
                sums = _mm256_add_ps(sums, error);
                values += plane.token_stride;
                from += num_heads * plane.head_dim;
            }
            _mm256_storeu_ps(errors.largest + channel, largest);
            _mm256_storeu_ps(errors.sums + channel, sums);
        }
    }
    alignas(32) float low[kHalfWidth], high[kHalfWidth];
    _mm256_store_ps(low, least);
    _mm256_store_ps(high, most);
    for (int i = 0; i < kHalfWidth; ++i) {
        if (low[i] < errors.least) errors.least = low[i];
        if (high[i] > errors.most) errors.most = high[i];
    }
}

}  // namespace

void compare_halves(const SynthesisPlane& plane, int64_t first_head, int64_t num_heads, int64_t first_token,
                    int64_t num_tokens, const uint16_t* decoded, Dtype dtype, ErrorsOfUnit& errors) {
    const auto compare = dtype == Dtype::kFloat16 ? compare_tokens<true> : compare_tokens<false>;
    compare(plane, first_head, num_heads, first_token, num_tokens, decoded, errors);
}

const SynthesisKernels kSynthesis = {sort, multiply_dense, add_sparse, finish, compare_halves};

}  // namespace cachegen::avx2

#endif  // CACHEGEN_X86
