// What the AVX2 kernels share: the target attribute, lookups and a transposition. As in avx512.h, each function carries
// its target itself.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/cpu_kernels.h"

#define CACHEGEN_AVX2 __attribute__((target("avx2,bmi2,popcnt,f16c,fma")))
#define CACHEGEN_AVX2_INLINE CACHEGEN_AVX2 __attribute__((always_inline)) inline

namespace cachegen::avx2 {

// What this path's files have; see CpuKernels.
int64_t measure_plane(const Plane& plane, Dtype dtype, int64_t num_tokens, uint32_t* counts);
void encode_batch(const StreamBatch& batch, Dtype dtype, Scratch& scratch, EncodedStream* encoded);
void decode_batch(const StreamBatch& batch, Dtype dtype, Scratch& scratch, Status* statuses);
void decode_components(const ComponentBatch& batch, Scratch& scratch, Status* statuses);
void encode_components(const ComponentSource& source, Scratch& scratch, EscapeKeys& escapes, EncodedStream* encoded);
extern const SynthesisKernels kSynthesis;
extern const ByteAnalysisKernels kByteAnalysis;

// Sixteen bytes in both halves of a vector, as byte shuffles want their tables.
CACHEGEN_AVX2_INLINE __m256i load_twice(const uint8_t bytes[16]) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// Split 16 words into their low and high bytes.
CACHEGEN_AVX2_INLINE void split_words(const uint16_t words[16], uint8_t low[16], uint8_t high[16]) {
    const __m128i first = _mm_load_si128(reinterpret_cast<const __m128i*>(words));
    const __m128i second = _mm_load_si128(reinterpret_cast<const __m128i*>(words + 8));
    const __m128i mask = _mm_set1_epi16(0x00FF);
    _mm_store_si128(reinterpret_cast<__m128i*>(low),
                    _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask)));
    _mm_store_si128(reinterpret_cast<__m128i*>(high),
                    _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
}

// The words of 32 symbols from the low and high bytes of a table's 32 words: of symbols 0 to 7 and 16 to 23, and of the
// others. is_upper: in bit 7 of each byte, bit 4 of the symbol.
CACHEGEN_AVX2_INLINE void look_up_words(const uint8_t low[32], const uint8_t high[32], __m256i symbols,
                                        __m256i is_upper, __m256i words[2]) {
    const __m256i low_bytes = _mm256_blendv_epi8(_mm256_shuffle_epi8(load_twice(low), symbols),
                                                 _mm256_shuffle_epi8(load_twice(low + 16), symbols), is_upper);
    const __m256i high_bytes = _mm256_blendv_epi8(_mm256_shuffle_epi8(load_twice(high), symbols),
                                                  _mm256_shuffle_epi8(load_twice(high + 16), symbols), is_upper);
    words[0] = _mm256_unpacklo_epi8(low_bytes, high_bytes);
    words[1] = _mm256_unpackhi_epi8(low_bytes, high_bytes);
}

// The same where symbols are below 16.
CACHEGEN_AVX2_INLINE void look_up_few_words(const uint8_t low[16], const uint8_t high[16], __m256i symbols,
                                            __m256i words[2]) {
    const __m256i low_bytes = _mm256_shuffle_epi8(load_twice(low), symbols);
    const __m256i high_bytes = _mm256_shuffle_epi8(load_twice(high), symbols);
    words[0] = _mm256_unpacklo_epi8(low_bytes, high_bytes);
    words[1] = _mm256_unpackhi_epi8(low_bytes, high_bytes);
}

// A byte of all ones for every set bit.
CACHEGEN_AVX2_INLINE __m256i bytes_of_bits(uint32_t bits) {
    const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i select = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), which);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, select), select);
}

// Transpose the 8x8 words in each 128-bit lane.
CACHEGEN_AVX2_INLINE void transpose_8x8_words(__m256i row[8]) {
    for (int stage = 0; stage < 3; ++stage) {
        __m256i next[8];
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = _mm256_unpacklo_epi16(row[i], row[i + 4]);
            next[2 * i + 1] = _mm256_unpackhi_epi16(row[i], row[i + 4]);
        }
        for (int i = 0; i < 8; ++i) row[i] = next[i];
    }
}

// Transpose 16x16 bytes.
CACHEGEN_AVX2_INLINE void transpose_16x16_bytes(__m128i row[16]) {
    for (int stage = 0; stage < 4; ++stage) {
        __m128i next[16];
        for (int i = 0; i < 8; ++i) {
            next[2 * i] = _mm_unpacklo_epi8(row[i], row[i + 8]);
            next[2 * i + 1] = _mm_unpackhi_epi8(row[i], row[i + 8]);
        }
        for (int i = 0; i < 16; ++i) row[i] = next[i];
    }
}

}  // namespace cachegen::avx2
