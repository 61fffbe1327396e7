// What the AVX-512 kernels share: the target attribute, transpositions, dtypes.
//
// Each function carries its target itself: no part of the build is compiled for AVX-512 as a whole, so no inline
// function of a common header can end up with instructions that other machines lack.

#pragma once

#ifdef CACHEGEN_EMULATION
// For tests/emulation: the intrinsics as plain C++, for processors without them.
#include "avx512_emulation.h"
#else
// GCC 12's own intrinsics start from registers that are undefined on purpose (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include <cstdint>

#include "cpu/cpu_kernels.h"

#ifdef CACHEGEN_EMULATION
#define CACHEGEN_AVX512
#define CACHEGEN_AVX512_INLINE inline
#else
#define CACHEGEN_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,avx2,bmi2,popcnt,f16c,fma")))
#define CACHEGEN_AVX512_INLINE CACHEGEN_AVX512 __attribute__((always_inline)) inline
#endif
// Compiled once, rather than into each of many callers.
#define CACHEGEN_AVX512_APART CACHEGEN_AVX512 __attribute__((noinline))

namespace cachegen::avx512 {

// What this path's files have; see CpuKernels.
int64_t measure_plane(const Plane& plane, Dtype dtype, int64_t num_tokens, uint32_t* counts);
void encode_batch(const StreamBatch& batch, Dtype dtype, Scratch& scratch, EncodedStream* encoded);
void decode_batch(const StreamBatch& batch, Dtype dtype, Scratch& scratch, Status* statuses);
void decode_components(const ComponentBatch& batch, Scratch& scratch, Status* statuses);
void encode_components(const ComponentSource& source, Scratch& scratch, EscapeKeys& escapes, EncodedStream* encoded);
extern const SynthesisKernels kSynthesis;
extern const ByteAnalysisKernels kByteAnalysis;

// The first `count` <= 32 bits set.
CACHEGEN_AVX512_INLINE __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~0u : count <= 0 ? 0u : _bzhi_u32(~0u, static_cast<uint32_t>(count));
}

// Add to sums of four products the products of unsigned and signed bytes. GCC 12 copies the sums of its own intrinsic
// to and from the stack: products take 2.6 times as long with it.
CACHEGEN_AVX512_INLINE void add_products(__m512i& sums, __m512i unsigned_bytes, __m512i signed_bytes) {
#ifdef CACHEGEN_EMULATION
    sums = _mm512_dpbusd_epi32(sums, unsigned_bytes, signed_bytes);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
#endif
}

// Transpose the 8x8 words in each 128-bit lane.
CACHEGEN_AVX512_INLINE void transpose_8x8_words(__m512i row[8]) {
    __m512i pairs[8], quads[8];
    for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = _mm512_unpacklo_epi16(row[2 * i], row[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi16(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i)
        for (int half = 0; half < 2; ++half) {
            quads[4 * i + 2 * half] = _mm512_unpacklo_epi32(pairs[4 * i + half], pairs[4 * i + 2 + half]);
            quads[4 * i + 2 * half + 1] = _mm512_unpackhi_epi32(pairs[4 * i + half], pairs[4 * i + 2 + half]);
        }
    for (int i = 0; i < 4; ++i) {
        row[2 * i] = _mm512_unpacklo_epi64(quads[i], quads[4 + i]);
        row[2 * i + 1] = _mm512_unpackhi_epi64(quads[i], quads[4 + i]);
    }
}

// Transpose the 4x4 128-bit lanes of four vectors.
CACHEGEN_AVX512_INLINE void transpose_4x4_lanes(__m512i row[4]) {
    const __m512i low01 = _mm512_shuffle_i32x4(row[0], row[1], 0x44),
                  high01 = _mm512_shuffle_i32x4(row[0], row[1], 0xEE);
    const __m512i low23 = _mm512_shuffle_i32x4(row[2], row[3], 0x44),
                  high23 = _mm512_shuffle_i32x4(row[2], row[3], 0xEE);
    row[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    row[1] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
    row[2] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    row[3] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
}

}  // namespace cachegen::avx512
