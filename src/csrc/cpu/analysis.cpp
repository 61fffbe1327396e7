#include "cpu/analysis.h"

#include <algorithm>
#include <cmath>

#include "cpu/cpu_kernels.h"
#include "cpu/parallel.h"

#if CACHEGEN_X86
#include "cpu/half_planes_avx2.h"
#define CACHEGEN_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#endif

namespace cachegen {

#if CACHEGEN_X86

namespace {

constexpr int64_t kThreadTokens = 64;  // of a thread
using avx2::add_sizes;
using avx2::magnitude;
using avx2::undo_head;
using avx2::widen_half;
constexpr int kWidth = avx2::kHalfWidth;

int64_t count_channels(const std::vector<SynthesisPlane>& planes) {
    int64_t total = 0;
    for (const SynthesisPlane& plane : planes) total += plane.num_heads * plane.head_dim;
    return total;
}

// Round to nearest, ties to even.
CACHEGEN_AVX2 inline __m128i to_bfloat16(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), is_odd), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

template <bool kIsHalf>
CACHEGEN_AVX2 void gather_tokens(const std::vector<SynthesisPlane>& planes, int64_t begin, int64_t end,
                                 const float* means, bool is_bf16, void* rows, int64_t stride, float* row,
                                 float* largest, float* sums) {
    const int64_t num_channels = count_channels(planes);
    for (int64_t token = begin; token < end; ++token) {
        float* target = row;
        for (const SynthesisPlane& plane : planes) {
            const uint16_t* const values = plane.values + token * plane.token_stride;
            for (int64_t head = 0; head < plane.num_heads; ++head, target += plane.head_dim) {
                for (int64_t dim = 0; dim < plane.head_dim; dim += kWidth)
                    _mm256_storeu_ps(target + dim, widen_half<kIsHalf>(values + head * plane.head_stride + dim,
                                                                       plane.head_dim - dim));
                if (plane.num_pairs != 0)
                    undo_head(target, plane, plane.cosines + token * plane.num_pairs,
                              plane.sines + token * plane.num_pairs);
            }
        }
        for (int64_t c = 0; c < num_channels; c += kWidth) {
            const __m256 rest = _mm256_sub_ps(_mm256_loadu_ps(row + c), _mm256_loadu_ps(means + c));
            add_sizes(rest, largest + c, sums + c);
            _mm256_storeu_ps(row + c, rest);
        }
        if (!is_bf16) {
            std::copy(row, row + num_channels, static_cast<float*>(rows) + token * stride);
            continue;
        }
        uint16_t* const to = static_cast<uint16_t*>(rows) + token * stride;
        int64_t c = 0;
        for (; c + kWidth <= num_channels; c += kWidth)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c), to_bfloat16(_mm256_loadu_ps(row + c)));
        for (; c < stride; ++c) to[c] = c < num_channels ? Bfloat16::narrow(row[c]) : uint16_t{0};
    }
}

template <bool kIsHalf>
CACHEGEN_AVX2 void measure_tokens(const std::vector<SynthesisPlane>& planes, int64_t begin, int64_t end,
                                  const uint16_t* decoded, float* largest, float* sums, float range[2]) {
    const int64_t num_channels = count_channels(planes);
    __m256 least = _mm256_set1_ps(INFINITY), most = _mm256_set1_ps(-INFINITY);
    for (int64_t token = begin; token < end; ++token) {
        const uint16_t* from = decoded + token * num_channels;
        int64_t channel = 0;
        for (const SynthesisPlane& plane : planes) {
            for (int64_t head = 0; head < plane.num_heads; ++head, channel += plane.head_dim) {
                const uint16_t* const values = plane.values + token * plane.token_stride + head * plane.head_stride;
                for (int64_t dim = 0; dim < plane.head_dim; dim += kWidth) {
                    const int64_t count = plane.head_dim - dim;
                    const __m256 found = widen_half<kIsHalf>(from + channel + dim, count);
                    least = _mm256_min_ps(least, found);
                    most = _mm256_max_ps(most, found);
                    const __m256 error = magnitude(_mm256_sub_ps(widen_half<kIsHalf>(values + dim, count), found));
                    // A head's last few would be added to the next head's first, as zeros.
                    float* const to[2] = {largest + channel + dim, sums + channel + dim};
                    _mm256_storeu_ps(to[0], _mm256_max_ps(_mm256_loadu_ps(to[0]), error));
                    _mm256_storeu_ps(to[1], _mm256_add_ps(_mm256_loadu_ps(to[1]), error));
                }
            }
        }
    }
    float low[kWidth], high[kWidth];
    _mm256_storeu_ps(low, least);
    _mm256_storeu_ps(high, most);
    range[0] = *std::min_element(low, low + kWidth);
    range[1] = *std::max_element(high, high + kWidth);
}

// Run work(begin, end, largest, sums, tile) for tiles of tokens and join what it finds.
template <class Work>
void in_tiles(int64_t num_tokens, int64_t num_channels, int num_threads, ChannelSizes& sizes, Work&& work) {
    const int64_t num_tiles = (num_tokens + kThreadTokens - 1) / kThreadTokens;
    const int64_t width = num_channels + kWidth;
    std::vector<float> largest(num_tiles * width, 0.0f), sums(num_tiles * width, 0.0f);
    parallel_for(num_tiles, num_threads, [&](int64_t tile) {
        work(tile * kThreadTokens, std::min(num_tokens, (tile + 1) * kThreadTokens), largest.data() + tile * width,
             sums.data() + tile * width, tile);
    });
    join_sizes(largest, sums, num_tiles, width, num_channels, sizes);
}

// Sums of kTokens tokens and 64 components.
template <int kTokens>
CACHEGEN_BF16 __attribute__((always_inline)) inline void multiply_tokens(const uint16_t* rows, int64_t num_pairs,
                                                                         const uint16_t* matrix, float* components,
                                                                         int64_t stride) {
    constexpr int kVectors = kAnalysisComponents / 16;
    __m512 sums[kTokens][kVectors];
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < num_pairs; ++pair, matrix += 2 * kAnalysisComponents) {
        __m512bh entries[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) entries[v] = (__m512bh)_mm512_loadu_si512(matrix + 32 * v);
#pragma GCC unroll 6
        for (int t = 0; t < kTokens; ++t) {
            int32_t two;
            __builtin_memcpy(&two, rows + t * 2 * num_pairs + 2 * pair, sizeof two);
            const auto value = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums[t][v] = _mm512_dpbf16_ps(sums[t][v], entries[v], value);
        }
    }
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(components + t * stride + 16 * v, sums[t][v]);
}

CACHEGEN_BF16 void multiply_block(const uint16_t* rows, int64_t num_tokens, int64_t num_pairs, const uint16_t* matrix,
                                  float* components, int64_t stride) {
    constexpr int kTogether = 6;
    int64_t token = 0;
    for (; token + kTogether <= num_tokens; token += kTogether)
        multiply_tokens<kTogether>(rows + token * 2 * num_pairs, num_pairs, matrix, components + token * stride,
                                   stride);
    for (; token < num_tokens; ++token)
        multiply_tokens<1>(rows + token * 2 * num_pairs, num_pairs, matrix, components + token * stride, stride);
}

}  // namespace

bool can_gather() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
           __builtin_cpu_supports("fma");
}

bool can_multiply_bf16() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

void gather_rows(const std::vector<SynthesisPlane>& planes, Dtype dtype, int64_t num_tokens, const float* means,
                 bool is_bf16, void* rows, int64_t stride, int num_threads, ChannelSizes& sizes) {
    const int64_t num_channels = count_channels(planes);
    // Vectors read up to seven means more than there are.
    std::vector<float> padded(means, means + num_channels);
    padded.resize(num_channels + kWidth, 0.0f);
    in_tiles(num_tokens, num_channels, num_threads, sizes,
             [&](int64_t begin, int64_t end, float* largest, float* sums, int64_t) {
                 std::vector<float> row(num_channels + kWidth, 0.0f);
                 const auto gather = dtype == Dtype::kFloat16 ? gather_tokens<true> : gather_tokens<false>;
                 gather(planes, begin, end, padded.data(), is_bf16, rows, stride, row.data(), largest, sums);
             });
}

void multiply_bf16(const uint16_t* rows, int64_t num_tokens, int64_t num_pairs, const uint16_t* matrix,
                   int64_t num_blocks, float* components, int num_threads) {
    const int64_t stride = num_blocks * kAnalysisComponents;
    parallel_for(num_blocks, num_threads, [&](int64_t block) {
        multiply_block(rows, num_tokens, num_pairs, matrix + block * num_pairs * 2 * kAnalysisComponents,
                       components + block * kAnalysisComponents, stride);
    });
}

void measure_errors(const std::vector<SynthesisPlane>& planes, Dtype dtype, int64_t num_tokens, const uint16_t* decoded,
                    int num_threads, ChannelSizes& sizes, float* least, float* most) {
    std::vector<float> ranges(2 * (num_tokens / kThreadTokens + 1), 0.0f);
    in_tiles(num_tokens, count_channels(planes), num_threads, sizes,
             [&](int64_t begin, int64_t end, float* largest, float* sums, int64_t tile) {
                 const auto measure = dtype == Dtype::kFloat16 ? measure_tokens<true> : measure_tokens<false>;
                 measure(planes, begin, end, decoded, largest, sums, ranges.data() + 2 * tile);
             });
    *least = *most = 0;
    for (size_t i = 0; i < ranges.size(); i += 2) {
        *least = std::min(*least, ranges[i]);
        *most = std::max(*most, ranges[i + 1]);
    }
}

#else

bool can_gather() { return false; }
bool can_multiply_bf16() { return false; }
void gather_rows(const std::vector<SynthesisPlane>&, Dtype, int64_t, const float*, bool, void*, int64_t, int,
                 ChannelSizes&) {}
void multiply_bf16(const uint16_t*, int64_t, int64_t, const uint16_t*, int64_t, float*, int) {}
void measure_errors(const std::vector<SynthesisPlane>&, Dtype, int64_t, const uint16_t*, int, ChannelSizes&, float*,
                    float*) {}

#endif  // CACHEGEN_X86

}  // namespace cachegen
