// The forward transform in bytes with AVX-512 and its products of bytes.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include "cpu/avx512.h"
#include "cpu/byte_analysis.h"

namespace cachegen::avx2 {

void gather_bytes_of_plane(const SynthesisPlane& plane, Dtype dtype, int64_t first_token, int64_t num_tokens,
                           const ByteRows& target);

}  // namespace cachegen::avx2

namespace cachegen::avx512 {
namespace {

constexpr int64_t kTogether = 64;  // channels that are gathered together
constexpr int64_t kAhead = 12;     // tokens

template <bool kIsHalf>
CACHEGEN_AVX512_INLINE __m512 widen(__m256i values) {
    if constexpr (kIsHalf) return _mm512_cvtph_ps(values);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

// 32 values.
template <bool kIsHalf>
CACHEGEN_AVX512_INLINE void widen_both(const uint16_t* values, __m512 widened[2]) {
    const __m512i both = _mm512_loadu_si512(values);
    widened[0] = widen<kIsHalf>(_mm512_castsi512_si256(both));
    widened[1] = widen<kIsHalf>(_mm512_extracti64x4_epi64(both, 1));
}

// Keep what seven bits lack of 64 integers, of which two times 32 are side by side.
CACHEGEN_AVX512_APART void keep_excess(const __m512i integers[4], int32_t token, const int32_t channels[2],
                                       std::vector<Excess>& excess) {
    alignas(64) int32_t all[kTogether];
    for (int i = 0; i < 4; ++i) _mm512_store_si512(all + 16 * i, integers[i]);
    for (int i = 0; i < kTogether; ++i) {
        const int32_t inside = all[i] > kMaxInteger ? kMaxInteger : all[i] < kMinInteger ? kMinInteger : all[i];
        if (all[i] == inside) continue;
        // What is no number, or far too large, is the least integer: its token does not fit.
        const int32_t units = all[i] == INT32_MIN ? INT32_MIN + 1 : all[i] - inside;
        excess.push_back({token, channels[i / 32] + i % 32, units});
    }
}

CACHEGEN_AVX512_INLINE __m512i within_seven_bits(__m512i words) {
    return _mm512_max_epi16(_mm512_min_epi16(words, _mm512_set1_epi16(kMaxInteger)), _mm512_set1_epi16(kMinInteger));
}

// Store 64 integers, packed two times from 32 bits to words, as bytes.
CACHEGEN_AVX512_INLINE void store_bytes(const __m512i words[2], uint8_t* first, uint8_t* second) {
    // Packing takes 128 bits of each vector in turn.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(
        order, _mm512_add_epi8(_mm512_packs_epi16(words[0], words[1]), _mm512_set1_epi8(kByteBias)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(bytes, 1));
}

// Gather 64 channels: 32 from dim `first` of a head on, and 32 from `second` on; where they are turned, these are the
// two parts of pairs.
template <bool kIsHalf, bool kHasLow, bool kTurns>
CACHEGEN_AVX512_INLINE void gather_channels(const SynthesisPlane& plane, int64_t first_token, int64_t num_tokens,
                                            const ByteRows& target, int64_t head, int64_t first, int64_t second) {
    const int64_t places[2] = {head * plane.head_dim + first, head * plane.head_dim + second};
    const int32_t channels[2] = {target.first_channel + static_cast<int32_t>(places[0]),
                                 target.first_channel + static_cast<int32_t>(places[1])};
    __m512 means[4], inverses[4], largest[4], sums[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const int64_t place = places[i / 2] + 16 * (i % 2);
        means[i] = _mm512_loadu_ps(target.means + place);
        inverses[i] = _mm512_loadu_ps(target.inverses + place);
        largest[i] = _mm512_loadu_ps(target.largest + place);
        sums[i] = _mm512_loadu_ps(target.sums + place);
    }
    const uint16_t* values = plane.values + first_token * plane.token_stride + head * plane.head_stride;
    const float* cosines = plane.cosines + first_token * plane.num_pairs + first;
    const float* sines = plane.sines + first_token * plane.num_pairs + first;
    uint8_t* row = target.rows;
    uint8_t* low_row = target.low_rows;
    for (int64_t token = 0; token < num_tokens; ++token, values += plane.token_stride, row += target.stride) {
        // Tokens lie apart, or a head's follow each other; no processor fetches the former ahead.
        const uint16_t* const next = values + kAhead * plane.token_stride;
        _mm_prefetch(reinterpret_cast<const char*>(next + first), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(next + second), _MM_HINT_T0);
        __m512 found[4];
        widen_both<kIsHalf>(values + first, found);
        widen_both<kIsHalf>(values + second, found + 2);
        if constexpr (kTurns) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const __m512 x = found[i], y = found[i + 2];
                const __m512 cosine = _mm512_loadu_ps(cosines + 16 * i), sine = _mm512_loadu_ps(sines + 16 * i);
                found[i] = _mm512_add_ps(_mm512_mul_ps(x, cosine), _mm512_mul_ps(y, sine));
                found[i + 2] = _mm512_sub_ps(_mm512_mul_ps(y, cosine), _mm512_mul_ps(x, sine));
            }
            cosines += plane.num_pairs;
            sines += plane.num_pairs;
        }
        __m512i integers[4];
        __m512 scaled[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512 rest = _mm512_sub_ps(found[i], means[i]);
            const __m512 size = _mm512_abs_ps(rest);
            largest[i] = _mm512_max_ps(largest[i], size);
            sums[i] = _mm512_add_ps(sums[i], size);
            scaled[i] = _mm512_mul_ps(rest, inverses[i]);
            integers[i] = _mm512_cvtps_epi32(scaled[i]);
        }
        const __m512i words[2] = {_mm512_packs_epi32(integers[0], integers[1]),
                                  _mm512_packs_epi32(integers[2], integers[3])};
        __m512i within[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) within[i] = within_seven_bits(words[i]);
        const __mmask32 is_beyond =
            _mm512_cmpneq_epi16_mask(words[0], within[0]) | _mm512_cmpneq_epi16_mask(words[1], within[1]);
        if (__builtin_expect(is_beyond != 0, 0))
            keep_excess(integers, static_cast<int32_t>(first_token + token), channels, *target.excess);
        store_bytes(within, row + places[0], row + places[1]);
        if constexpr (kHasLow) {
            __m512i digits[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512 left = _mm512_sub_ps(scaled[i], _mm512_cvtepi32_ps(integers[i]));
                digits[i] = _mm512_cvtps_epi32(_mm512_mul_ps(left, _mm512_set1_ps(1 << kLowShift)));
            }
            const __m512i low[2] = {within_seven_bits(_mm512_packs_epi32(digits[0], digits[1])),
                                    within_seven_bits(_mm512_packs_epi32(digits[2], digits[3]))};
            store_bytes(low, low_row + places[0], low_row + places[1]);
            low_row += target.stride;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const int64_t place = places[i / 2] + 16 * (i % 2);
        _mm512_storeu_ps(target.largest + place, largest[i]);
        _mm512_storeu_ps(target.sums + place, sums[i]);
    }
}

template <bool kIsHalf, bool kHasLow>
CACHEGEN_AVX512 void gather_tokens(const SynthesisPlane& plane, int64_t first_token, int64_t num_tokens,
                                   const ByteRows& target) {
    for (int64_t head = 0; head < plane.num_heads; ++head) {
        if (plane.num_pairs == 0) {
            for (int64_t dim = 0; dim < plane.head_dim; dim += kTogether)
                gather_channels<kIsHalf, kHasLow, false>(plane, first_token, num_tokens, target, head, dim, dim + 32);
        } else {
            for (int64_t pair = 0; pair < plane.num_pairs; pair += 32)
                gather_channels<kIsHalf, kHasLow, true>(plane, first_token, num_tokens, target, head, pair,
                                                        plane.num_pairs + pair);
        }
    }
}

CACHEGEN_AVX512 void gather(const SynthesisPlane& plane, Dtype dtype, int64_t first_token, int64_t num_tokens,
                            const ByteRows& target) {
    const bool is_whole = plane.num_pairs == 0 ? plane.head_dim % kTogether == 0
                                               : !plane.is_interleaved && plane.num_pairs % 32 == 0 &&
                                                     2 * plane.num_pairs == plane.head_dim;
    const bool is_half = dtype == Dtype::kFloat16, has_low = target.low_rows != nullptr;
    if (!is_whole)
        avx2::gather_bytes_of_plane(plane, dtype, first_token, num_tokens, target);
    else if (has_low)
        (is_half ? gather_tokens<true, true> : gather_tokens<false, true>)(plane, first_token, num_tokens, target);
    else
        (is_half ? gather_tokens<true, false> : gather_tokens<false, false>)(plane, first_token, num_tokens, target);
}

template <int kTokens, int kVectors>
CACHEGEN_AVX512_INLINE void multiply_rows(const uint8_t* rows, int64_t stride, int64_t num_quads, const int8_t* entries,
                                          int32_t* sums) {
    __m512i made[kTokens][kVectors];
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) made[t][v] = _mm512_setzero_si512();
    for (int64_t quad = 0; quad < num_quads; ++quad, entries += kQuad * kAnalysisComponents) {
        __m512i parts[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) parts[v] = _mm512_loadu_si512(entries + 64 * v);
#pragma GCC unroll 6
        for (int t = 0; t < kTokens; ++t) {
            int32_t four;
            __builtin_memcpy(&four, rows + t * stride + quad * kQuad, sizeof four);
            const __m512i bytes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) add_products(made[t][v], bytes, parts[v]);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(sums + t * kAnalysisComponents + 16 * v, made[t][v]);
}

template <int kVectors>
CACHEGEN_AVX512 void multiply_vectors(const uint8_t* rows, int64_t stride, int64_t num_tokens, int64_t num_quads,
                                      const int8_t* entries, int32_t* sums) {
    constexpr int kAtOnce = 6;
    int64_t token = 0;
    for (; token + kAtOnce <= num_tokens; token += kAtOnce)
        multiply_rows<kAtOnce, kVectors>(rows + token * stride, stride, num_quads, entries,
                                         sums + token * kAnalysisComponents);
    for (; token < num_tokens; ++token)
        multiply_rows<1, kVectors>(rows + token * stride, stride, num_quads, entries,
                                   sums + token * kAnalysisComponents);
}

CACHEGEN_AVX512 void multiply(const uint8_t* rows, int64_t stride, int64_t num_tokens, int64_t num_quads,
                              const int8_t* entries, int64_t num_components, int32_t* sums) {
    constexpr decltype(&multiply_vectors<1>) kBy[] = {multiply_vectors<1>, multiply_vectors<2>, multiply_vectors<3>,
                                                      multiply_vectors<4>};
    kBy[(num_components - 1) / 16](rows, stride, num_tokens, num_quads, entries, sums);
}

CACHEGEN_AVX512 void add_excess(const int8_t* entries, int place, int32_t units, int32_t* sums) {
    const __m128i up = _mm_cvtsi32_si128(24 - 8 * place);
    for (int64_t k = 0; k < kAnalysisComponents; k += 16) {
        const __m512i entry = _mm512_srai_epi32(_mm512_sll_epi32(_mm512_loadu_si512(entries + kQuad * k), up), 24);
        const __m512i part = _mm512_mullo_epi32(entry, _mm512_set1_epi32(units));
        _mm512_storeu_si512(sums + k, _mm512_add_epi32(_mm512_loadu_si512(sums + k), part));
    }
}

CACHEGEN_AVX512 int64_t square(const uint8_t* row, int64_t num_channels) {
    __m512i total = _mm512_setzero_si512();
    int64_t channel = 0, rest = 0;
    for (; channel + 64 <= num_channels; channel += 64) {
        const __m512i sizes =
            _mm512_abs_epi8(_mm512_sub_epi8(_mm512_loadu_si512(row + channel), _mm512_set1_epi8(kByteBias)));
        add_products(total, sizes, sizes);
    }
    for (; channel < num_channels; ++channel) rest += (row[channel] - kByteBias) * (row[channel] - kByteBias);
    alignas(64) int32_t parts[16];
    _mm512_store_si512(parts, total);
    for (const int32_t part : parts) rest += part;
    return rest;
}

CACHEGEN_AVX512 void round(const int32_t* sums, const int32_t* low_sums, const float* scales,
                           const int32_t* corrections, int64_t first, int64_t num_components, int64_t token,
                           const std::vector<LevelComponents>& levels) {
    const __m512i one = _mm512_set1_epi32(1), minus_one = _mm512_set1_epi32(-1);
    const __m512 most = _mm512_set1_ps(static_cast<float>(kMaxComponent));
    const __m512 least = _mm512_set1_ps(-static_cast<float>(kMaxComponent));
    for (int64_t k = 0; k < num_components; k += 16) {
        const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums + k), _mm512_loadu_si512(corrections + k));
        __m512 total = _mm512_cvtepi32_ps(sum);
        if (low_sums != nullptr) {
            const __m512 low = _mm512_cvtepi32_ps(_mm512_loadu_si512(low_sums + k));
            total = _mm512_add_ps(total, _mm512_mul_ps(low, _mm512_set1_ps(1.0f / (1 << kLowShift))));
        }
        const __m512 value = _mm512_mul_ps(total, _mm512_loadu_ps(scales + k));
        __m512i before = _mm512_setzero_si512();
        int64_t num_known = 0;
        for (const LevelComponents& level : levels) {
            const auto live = static_cast<__mmask16>(first_lanes(level.num_components - first - k));
            const auto known = static_cast<__mmask16>(first_lanes(num_known - first - k));
            num_known = level.num_components;
            if (live == 0) continue;
            const __m512 scaled = _mm512_mul_ps(value, _mm512_set1_ps(level.ratio));
            __m512i rounded = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(scaled, most), least));
            const __m512i coarse = _mm512_add_epi32(before, _mm512_add_epi32(before, before));
            const __m512i third = _mm512_max_epi32(_mm512_min_epi32(_mm512_sub_epi32(rounded, coarse), one), minus_one);
            rounded = _mm512_mask_add_epi32(rounded, known, coarse, third);
            _mm512_mask_storeu_epi32(level.components + token * level.num_components + first + k, live, rounded);
            before = rounded;
        }
    }
}

}  // namespace

const ByteAnalysisKernels kByteAnalysis = {gather, multiply, add_excess, square, round};

}  // namespace cachegen::avx512

#endif  // CACHEGEN_X86
