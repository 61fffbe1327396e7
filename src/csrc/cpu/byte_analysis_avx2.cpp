// The forward transform in bytes with AVX2, and what AVX-512 leaves to it.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include "cpu/avx2.h"
#include "cpu/byte_analysis.h"
#include "cpu/half_planes_avx2.h"

namespace cachegen::avx2 {
namespace {

constexpr int kSumVectors = 2;  // of eight components, whose sums stay in registers

CACHEGEN_AVX2_INLINE __m256i load_vector(const void* address) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(address));
}

CACHEGEN_AVX2_INLINE __m256i within_seven_bits(__m256i integers) {
    return _mm256_max_epi32(_mm256_min_epi32(integers, _mm256_set1_epi32(kMaxInteger)), _mm256_set1_epi32(kMinInteger));
}

// Write eight integers of seven bits as bytes, those within the head's last ones alone.
CACHEGEN_AVX2_INLINE void store_bytes(__m256i within, int64_t count, uint8_t* target) {
    const __m256i biased = _mm256_add_epi32(within, _mm256_set1_epi32(kByteBias));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(biased), _mm256_extracti128_si256(biased, 1));
    alignas(16) uint8_t bytes[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm_packus_epi16(words, words));
    __builtin_memcpy(target, bytes, count < 8 ? count : 8);
}

// Keep what seven bits lack of eight integers.
CACHEGEN_AVX2_INLINE void keep_excess(__m256i integers, __m256i within, int64_t count, int32_t token, int32_t channel,
                                      std::vector<Excess>& excess) {
    const __m256i is_within = _mm256_cmpeq_epi32(integers, within);
    auto left = static_cast<uint32_t>(~_mm256_movemask_ps(_mm256_castsi256_ps(is_within)) & 0xFF);
    if (left == 0) return;
    alignas(32) int32_t all[8], inside[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(all), integers);
    _mm256_store_si256(reinterpret_cast<__m256i*>(inside), within);
    for (; left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        // What is no number, or far too large, is the least integer: its token does not fit.
        const int32_t units = all[lane] == INT32_MIN ? INT32_MIN + 1 : all[lane] - inside[lane];
        if (lane < count) excess.push_back({token, channel + lane, units});
    }
}

template <bool kIsHalf>
CACHEGEN_AVX2 void gather_tokens(const SynthesisPlane& plane, int64_t first_token, int64_t num_tokens,
                                 const ByteRows& target) {
    thread_local std::vector<float> memory;
    memory.resize(plane.head_dim + kHalfWidth);
    float* const row = memory.data();
    for (int64_t token = 0; token < num_tokens; ++token) {
        const uint16_t* const values = plane.values + (first_token + token) * plane.token_stride;
        for (int64_t head = 0; head < plane.num_heads; ++head) {
            for (int64_t dim = 0; dim < plane.head_dim; dim += kHalfWidth)
                _mm256_storeu_ps(row + dim,
                                 widen_half<kIsHalf>(values + head * plane.head_stride + dim, plane.head_dim - dim));
            if (plane.num_pairs != 0)
                undo_head(row, plane, plane.cosines + (first_token + token) * plane.num_pairs,
                          plane.sines + (first_token + token) * plane.num_pairs);
            for (int64_t dim = 0; dim < plane.head_dim; dim += kHalfWidth) {
                const int64_t channel = head * plane.head_dim + dim, count = plane.head_dim - dim;
                __m256 rest = _mm256_sub_ps(_mm256_loadu_ps(row + dim), _mm256_loadu_ps(target.means + channel));
                // A head's last few would be added to the next head's first.
                if (count < kHalfWidth) rest = first_values(rest, count);
                add_sizes(rest, target.largest + channel, target.sums + channel);
                const __m256 scaled = _mm256_mul_ps(rest, _mm256_loadu_ps(target.inverses + channel));
                const __m256i integers = _mm256_cvtps_epi32(scaled), within = within_seven_bits(integers);
                const int64_t place = token * target.stride + channel;
                store_bytes(within, count, target.rows + place);
                keep_excess(integers, within, count, static_cast<int32_t>(first_token + token),
                            target.first_channel + static_cast<int32_t>(channel), *target.excess);
                if (target.low_rows == nullptr) continue;
                const __m256 left = _mm256_sub_ps(scaled, _mm256_cvtepi32_ps(integers));
                const __m256i digits = _mm256_cvtps_epi32(_mm256_mul_ps(left, _mm256_set1_ps(1 << kLowShift)));
                store_bytes(within_seven_bits(digits), count, target.low_rows + place);
            }
        }
    }
}

// Sums of kTokens tokens and 16 components. Two products of a byte and an entry fit 16 bits: 2 x 127 x 127.
template <int kTokens>
CACHEGEN_AVX2_INLINE void multiply_rows(const uint8_t* rows, int64_t stride, int64_t num_quads, const int8_t* entries,
                                        int32_t* sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i made[kTokens][kSumVectors];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kSumVectors; ++v) made[t][v] = _mm256_setzero_si256();
    for (int64_t quad = 0; quad < num_quads; ++quad, entries += kQuad * kAnalysisComponents) {
        const __m256i parts[kSumVectors] = {load_vector(entries), load_vector(entries + 32)};
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
            int32_t four;
            __builtin_memcpy(&four, rows + t * stride + quad * kQuad, sizeof four);
            const __m256i bytes = _mm256_set1_epi32(four);
            for (int v = 0; v < kSumVectors; ++v)
                made[t][v] =
                    _mm256_add_epi32(made[t][v], _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, parts[v]), ones));
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t)
        for (int v = 0; v < kSumVectors; ++v)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + t * kAnalysisComponents + 8 * v), made[t][v]);
}

CACHEGEN_AVX2 void multiply(const uint8_t* rows, int64_t stride, int64_t num_tokens, int64_t num_quads,
                            const int8_t* entries, int64_t num_components, int32_t* sums) {
    constexpr int kTogether = 4;
    for (int64_t first = 0; first < num_components; first += 8 * kSumVectors) {
        int64_t token = 0;
        for (; token + kTogether <= num_tokens; token += kTogether)
            multiply_rows<kTogether>(rows + token * stride, stride, num_quads, entries + kQuad * first,
                                     sums + token * kAnalysisComponents + first);
        for (; token < num_tokens; ++token)
            multiply_rows<1>(rows + token * stride, stride, num_quads, entries + kQuad * first,
                             sums + token * kAnalysisComponents + first);
    }
}

CACHEGEN_AVX2 void add_excess(const int8_t* entries, int place, int32_t units, int32_t* sums) {
    const __m128i up = _mm_cvtsi32_si128(24 - 8 * place);
    for (int64_t k = 0; k < kAnalysisComponents; k += 8) {
        const __m256i entry = _mm256_srai_epi32(_mm256_sll_epi32(load_vector(entries + kQuad * k), up), 24);
        const __m256i part = _mm256_mullo_epi32(entry, _mm256_set1_epi32(units));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + k), _mm256_add_epi32(load_vector(sums + k), part));
    }
}

CACHEGEN_AVX2 int64_t square(const uint8_t* row, int64_t num_channels) {
    __m256i total = _mm256_setzero_si256();
    int64_t channel = 0, rest = 0;
    for (; channel + 16 <= num_channels; channel += 16) {
        const __m256i words =
            _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + channel))),
                             _mm256_set1_epi16(kByteBias));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(words, words));
    }
    for (; channel < num_channels; ++channel) rest += (row[channel] - kByteBias) * (row[channel] - kByteBias);
    alignas(32) int32_t parts[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), total);
    for (const int32_t part : parts) rest += part;
    return rest;
}

CACHEGEN_AVX2 void round(const int32_t* sums, const int32_t* low_sums, const float* scales, const int32_t* corrections,
                         int64_t first, int64_t num_components, int64_t token,
                         const std::vector<LevelComponents>& levels) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), one = _mm256_set1_epi32(1);
    const __m256 most = _mm256_set1_ps(static_cast<float>(kMaxComponent)),
                 least = _mm256_sub_ps(_mm256_setzero_ps(), most);
    for (int64_t k = 0; k < num_components; k += 8) {
        const __m256i sum = _mm256_sub_epi32(load_vector(sums + k), load_vector(corrections + k));
        __m256 total = _mm256_cvtepi32_ps(sum);
        if (low_sums != nullptr) {
            const __m256 low = _mm256_cvtepi32_ps(load_vector(low_sums + k));
            total = _mm256_add_ps(total, _mm256_mul_ps(low, _mm256_set1_ps(1.0f / (1 << kLowShift))));
        }
        const __m256 value = _mm256_mul_ps(total, _mm256_loadu_ps(scales + k));
        __m256i before = _mm256_setzero_si256();
        int64_t num_known = 0;
        for (const LevelComponents& level : levels) {
            const int64_t count = level.num_components - first - k, known = num_known - first - k;
            num_known = level.num_components;
            if (count <= 0) continue;
            const __m256 scaled = _mm256_mul_ps(value, _mm256_set1_ps(level.ratio));
            __m256i rounded = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(scaled, most), least));
            if (known > 0) {
                const __m256i coarse = _mm256_add_epi32(before, _mm256_add_epi32(before, before));
                const __m256i third =
                    _mm256_max_epi32(_mm256_min_epi32(_mm256_sub_epi32(rounded, coarse), one), _mm256_set1_epi32(-1));
                const __m256i is_known =
                    _mm256_cmpgt_epi32(_mm256_set1_epi32(known < 8 ? static_cast<int>(known) : 8), lanes);
                rounded = _mm256_blendv_epi8(rounded, _mm256_add_epi32(coarse, third), is_known);
            }
            int32_t* const target = level.components + token * level.num_components + first + k;
            if (count >= 8)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), rounded);
            else
                _mm256_maskstore_epi32(target, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes),
                                       rounded);
            before = rounded;
        }
    }
}

}  // namespace

void gather_bytes_of_plane(const SynthesisPlane& plane, Dtype dtype, int64_t first_token, int64_t num_tokens,
                           const ByteRows& target) {
    if (dtype == Dtype::kFloat16)
        gather_tokens<true>(plane, first_token, num_tokens, target);
    else
        gather_tokens<false>(plane, first_token, num_tokens, target);
}

const ByteAnalysisKernels kByteAnalysis = {gather_bytes_of_plane, multiply, add_excess, square, round};

}  // namespace cachegen::avx2

#endif  // CACHEGEN_X86
