// An AVX-512 processor without one: the intrinsics that src/csrc/cpu/*avx512* use, as plain loops over the elements.
//
// They are written from Intel's descriptions, not from what the kernels need. Where those leave a result open, it is
// made the worst: reciprocals err by nearly as much as they may, and what is undefined is garbage. Masked accesses
// touch the elements of their mask alone, so that a sanitizer sees exactly what a processor would fault on; accesses
// that must be aligned and are not end the process.
//
// Source: Intel Intrinsics Guide; Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.

#pragma once

#include "avx512_elements.h"

// The kernels find these names first: they are in the kernels' own namespace.
namespace cachegen::avx512 {

// --- memory ---

inline __m128i _mm_load_si128(const __m128i* address) { return emulation::load_aligned<__m128i>(address); }
inline __m256i _mm256_load_si256(const __m256i* address) { return emulation::load_aligned<__m256i>(address); }
inline __m256i _mm256_loadu_si256(const __m256i* address) { return emulation::load<__m256i>(address); }
inline void _mm256_store_si256(__m256i* address, __m256i a) { emulation::store_aligned(address, a); }
inline void _mm256_storeu_si256(__m256i* address, __m256i a) { std::memcpy(address, &a, sizeof a); }
inline __m512i _mm512_load_si512(const void* address) { return emulation::load_aligned<__m512i>(address); }
inline __m512i _mm512_loadu_si512(const void* address) { return emulation::load<__m512i>(address); }
inline __m512 _mm512_load_ps(const void* address) { return emulation::load_aligned<__m512>(address); }
inline __m512 _mm512_loadu_ps(const void* address) { return emulation::load<__m512>(address); }
inline void _mm512_store_si512(void* address, __m512i a) { emulation::store_aligned(address, a); }
inline void _mm512_store_ps(void* address, __m512 a) { emulation::store_aligned(address, a); }
inline void _mm512_stream_si512(__m512i* address, __m512i a) { emulation::store_aligned(address, a); }
inline void _mm512_storeu_si512(void* address, __m512i a) { std::memcpy(address, &a, sizeof a); }
inline __m512i _mm512_mask_loadu_epi16(__m512i src, __mmask32 k, const void* address) {
    return emulation::masked_load<uint16_t>(src, k, address);
}
inline __m512i _mm512_mask_loadu_epi32(__m512i src, __mmask16 k, const void* address) {
    return emulation::masked_load<uint32_t>(src, k, address);
}
inline __m512 _mm512_mask_loadu_ps(__m512 src, __mmask16 k, const void* address) {
    return emulation::masked_load<float>(src, k, address);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 k, const void* address) {
    return emulation::masked_load<uint16_t>(__m512i{}, k, address);
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 k, const void* address) {
    return emulation::masked_load<uint32_t>(__m512i{}, k, address);
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 k, const void* address) {
    return emulation::masked_load<float>(__m512{}, k, address);
}
inline void _mm512_storeu_ps(void* address, __m512 a) { std::memcpy(address, &a, sizeof a); }
inline void _mm512_mask_storeu_epi16(void* address, __mmask32 k, __m512i a) {
    emulation::masked_store<uint16_t>(address, k, a);
}
inline void _mm512_mask_storeu_epi32(void* address, __mmask16 k, __m512i a) {
    emulation::masked_store<uint32_t>(address, k, a);
}
inline void _mm512_mask_storeu_ps(void* address, __mmask16 k, __m512 a) {
    emulation::masked_store<float>(address, k, a);
}
inline void _mm_prefetch(const void*, int) {}
inline void _mm_sfence() {}

// --- bits of integers and masks ---

inline uint32_t _bzhi_u32(uint32_t a, uint32_t count) {
    return (count & 255) < 32 ? a & ((1u << (count & 255)) - 1) : a;
}
inline int _mm_popcnt_u32(uint32_t a) { return __builtin_popcount(a); }
inline __mmask32 _mm512_kunpackw(__mmask32 a, __mmask32 b) { return a << 16 | (b & 0xFFFF); }

// --- constants and parts ---

inline __m128i _mm_cvtsi32_si128(int a) {
    emulation::Elements<int, __m128i> made{};
    made.at[0] = a;
    return made;
}
inline __m256i _mm256_set1_epi8(char a) {
    __m256i made;
    std::memset(&made, a, sizeof made);
    return made;
}
inline __m256i _mm256_setzero_si256() { return {}; }
inline __m512i _mm512_setzero_si512() { return {}; }
inline __m512 _mm512_setzero_ps() { return {}; }
inline __m512i _mm512_set1_epi16(int16_t a) {
    return emulation::make<int16_t>([&](int) { return a; });
}
inline __m512i _mm512_set1_epi8(char a) {
    return emulation::make<int8_t>([&](int) { return a; });
}
inline __m512i _mm512_setr_epi64(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f, int64_t g,
                                 int64_t h) {
    const int64_t all[] = {a, b, c, d, e, f, g, h};
    return emulation::load<__m512i>(all);
}
inline __m512i _mm512_setr_epi32(int32_t a, int32_t b, int32_t c, int32_t d, int32_t e, int32_t f, int32_t g, int32_t h,
                                 int32_t i, int32_t j, int32_t k, int32_t l, int32_t m, int32_t n, int32_t o,
                                 int32_t p) {
    const int32_t all[] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
    return emulation::load<__m512i>(all);
}
inline __m512i _mm512_set1_epi32(int32_t a) {
    return emulation::make<int32_t>([&](int) { return a; });
}
inline __m512 _mm512_set1_ps(float a) {
    return emulation::make<float>([&](int) { return a; });
}
inline __m512 _mm512_castsi512_ps(__m512i a) { return emulation::load<__m512>(&a); }
inline __m512i _mm512_castps_si512(__m512 a) { return emulation::load<__m512i>(&a); }
inline __m256i _mm512_castsi512_si256(__m512i a) { return emulation::load<__m256i>(&a); }
inline __m512i _mm512_castsi256_si512(__m256i a) {
    __m512i made;
    std::memset(&made, 0xA5, sizeof made);  // the upper half is undefined
    std::memcpy(&made, &a, sizeof a);
    return made;
}
inline __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
    return emulation::load<__m256i>(a.bytes + 32 * (half & 1));
}
inline __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
    std::memcpy(a.bytes + 32 * (half & 1), &b, sizeof b);
    return a;
}

inline __m512i _mm512_broadcast_i64x4(__m256i a) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), a, 1); }

// --- arithmetic, logic and comparisons, element by element ---

#define CACHEGEN_EMULATE_MAP(name, Type, expression)     \
    inline __m512i name(__m512i first, __m512i second) { \
        const emulation::Of<Type> a(first), b(second);   \
        return emulation::make<Type>([&](int i) {        \
            const uint32_t x = a.at[i], y = b.at[i];     \
            return expression;                           \
        });                                              \
    }
#define CACHEGEN_EMULATE_MASKED_MAP(name, plain, Type, Mask)         \
    inline __m512i name(__m512i src, Mask k, __m512i a, __m512i b) { \
        return emulation::select<Type>(k, plain(a, b), src);         \
    }
#define CACHEGEN_EMULATE_COMPARE(name, Type, Mask, expression)             \
    inline Mask name(__m512i first, __m512i second) {                      \
        const emulation::Of<Type> a(first), b(second);                     \
        return static_cast<Mask>(emulation::mask_of<a.kCount>([&](int i) { \
            const Type x = a.at[i], y = b.at[i];                           \
            return expression;                                             \
        }));                                                               \
    }
CACHEGEN_EMULATE_MAP(_mm512_add_epi8, uint8_t, x + y)
CACHEGEN_EMULATE_MAP(_mm512_add_epi16, uint16_t, x + y)
CACHEGEN_EMULATE_MAP(_mm512_add_epi32, uint32_t, x + y)
CACHEGEN_EMULATE_MAP(_mm512_sub_epi8, uint8_t, x - y)
CACHEGEN_EMULATE_MAP(_mm512_sub_epi16, uint16_t, x - y)
CACHEGEN_EMULATE_MAP(_mm512_sub_epi32, uint32_t, x - y)
CACHEGEN_EMULATE_MAP(_mm512_mullo_epi16, uint16_t, x* y)
CACHEGEN_EMULATE_MAP(_mm512_mullo_epi32, uint32_t, x* y)
CACHEGEN_EMULATE_MAP(_mm512_mulhi_epu16, uint16_t, x* y >> 16)
CACHEGEN_EMULATE_MAP(_mm512_max_epu16, uint16_t, std::max(x, y))
CACHEGEN_EMULATE_MAP(_mm512_max_epu32, uint32_t, std::max(x, y))
CACHEGEN_EMULATE_MAP(_mm512_min_epu16, uint16_t, std::min(x, y))
CACHEGEN_EMULATE_MAP(_mm512_max_epi32, uint32_t, static_cast<int32_t>(x) > static_cast<int32_t>(y) ? x : y)
CACHEGEN_EMULATE_MAP(_mm512_min_epi32, uint32_t, static_cast<int32_t>(x) < static_cast<int32_t>(y) ? x : y)
CACHEGEN_EMULATE_MAP(_mm512_max_epi16, uint16_t, static_cast<int16_t>(x) > static_cast<int16_t>(y) ? x : y)
CACHEGEN_EMULATE_MAP(_mm512_min_epi16, uint16_t, static_cast<int16_t>(x) < static_cast<int16_t>(y) ? x : y)
CACHEGEN_EMULATE_MAP(_mm512_and_si512, uint32_t, x& y)
CACHEGEN_EMULATE_MAP(_mm512_or_si512, uint32_t, x | y)
CACHEGEN_EMULATE_MASKED_MAP(_mm512_mask_add_epi16, _mm512_add_epi16, uint16_t, __mmask32)
CACHEGEN_EMULATE_MASKED_MAP(_mm512_mask_add_epi32, _mm512_add_epi32, uint32_t, __mmask16)
CACHEGEN_EMULATE_MASKED_MAP(_mm512_mask_sub_epi32, _mm512_sub_epi32, uint32_t, __mmask16)
CACHEGEN_EMULATE_MASKED_MAP(_mm512_mask_sub_epi16, _mm512_sub_epi16, uint16_t, __mmask32)
CACHEGEN_EMULATE_COMPARE(_mm512_cmpeq_epi16_mask, uint16_t, __mmask32, x == y)
CACHEGEN_EMULATE_COMPARE(_mm512_cmpneq_epi16_mask, uint16_t, __mmask32, x != y)
CACHEGEN_EMULATE_COMPARE(_mm512_cmpge_epu16_mask, uint16_t, __mmask32, x >= y)
CACHEGEN_EMULATE_COMPARE(_mm512_cmpgt_epu16_mask, uint16_t, __mmask32, x > y)
CACHEGEN_EMULATE_COMPARE(_mm512_cmplt_epu16_mask, uint16_t, __mmask32, x < y)
CACHEGEN_EMULATE_COMPARE(_mm512_cmpge_epu32_mask, uint32_t, __mmask16, x >= y)
CACHEGEN_EMULATE_COMPARE(_mm512_test_epi16_mask, uint16_t, __mmask32, (x & y) != 0)
CACHEGEN_EMULATE_COMPARE(_mm512_test_epi32_mask, uint32_t, __mmask16, (x & y) != 0)
CACHEGEN_EMULATE_COMPARE(_mm512_testn_epi16_mask, uint16_t, __mmask32, (x & y) == 0)
CACHEGEN_EMULATE_COMPARE(_mm512_testn_epi32_mask, uint32_t, __mmask16, (x & y) == 0)
#undef CACHEGEN_EMULATE_MAP
#undef CACHEGEN_EMULATE_MASKED_MAP
#undef CACHEGEN_EMULATE_COMPARE

inline __mmask16 _mm512_mask_cmpgt_epu32_mask(__mmask16 k, __m512i first, __m512i second) {
    const emulation::Of<uint32_t> a(first), b(second);
    return static_cast<__mmask16>(k & emulation::mask_of<16>([&](int i) { return a.at[i] > b.at[i]; }));
}
inline __mmask16 _mm512_mask_cmpneq_epi32_mask(__mmask16 k, __m512i first, __m512i second) {
    const emulation::Of<uint32_t> a(first), b(second);
    return static_cast<__mmask16>(k & emulation::mask_of<16>([&](int i) { return a.at[i] != b.at[i]; }));
}
inline __mmask16 _mm512_movepi32_mask(__m512i a) {
    const emulation::Of<uint32_t> x(a);
    return static_cast<__mmask16>(emulation::mask_of<16>([&](int i) { return x.at[i] >> 31; }));
}
inline __mmask32 _mm256_test_epi8_mask(__m256i a, __m256i b) {
    return emulation::mask_of<32>([&](int i) { return a.bytes[i] & b.bytes[i]; });
}
// Bit 4 a + 2 b + c of `table` is the result for bits a, b and c.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    __m512i made{};
    for (int i = 0; i < 512; ++i) {
        const auto bit = [&](const __m512i& vector) { return vector.bytes[i / 8] >> i % 8 & 1; };
        made.bytes[i / 8] |= static_cast<unsigned char>((table >> (4 * bit(a) + 2 * bit(b) + bit(c)) & 1) << i % 8);
    }
    return made;
}
inline uint32_t _mm512_reduce_max_epu32(__m512i a) {
    const emulation::Of<uint32_t> x(a);
    return *std::max_element(x.at, x.at + x.kCount);
}
inline __m512i _mm512_mask_mov_epi16(__m512i src, __mmask32 k, __m512i a) {
    return emulation::select<uint16_t>(k, a, src);
}
inline __m512i _mm512_mask_mov_epi32(__m512i src, __mmask16 k, __m512i a) {
    return emulation::select<uint32_t>(k, a, src);
}
inline __m512i _mm512_maskz_mov_epi16(__mmask32 k, __m512i a) { return emulation::select<uint16_t>(k, a, __m512i{}); }
inline __m512i _mm512_maskz_mov_epi32(__mmask16 k, __m512i a) { return emulation::select<uint32_t>(k, a, __m512i{}); }

inline __m512i _mm512_slli_epi16(__m512i a, uint32_t count) { return emulation::shift_left<uint16_t>(a, count); }
inline __m512i _mm512_slli_epi32(__m512i a, uint32_t count) { return emulation::shift_left<uint32_t>(a, count); }
inline __m512i _mm512_srli_epi16(__m512i a, uint32_t count) { return emulation::shift_right<uint16_t>(a, count); }
inline __m512i _mm512_srli_epi32(__m512i a, uint32_t count) { return emulation::shift_right<uint32_t>(a, count); }
inline __m512i _mm512_srai_epi32(__m512i a, uint32_t count) {
    const emulation::Of<int32_t> x(a);
    return emulation::make<int32_t>([&](int i) { return x.at[i] >> (count < 31 ? count : 31); });
}
inline __m512i _mm512_mask_srli_epi32(__m512i src, __mmask16 k, __m512i a, uint32_t count) {
    return emulation::select<uint32_t>(k, _mm512_srli_epi32(a, count), src);
}
inline __m512i _mm512_sll_epi16(__m512i a, __m128i count) {
    return emulation::shift_left<uint16_t>(a, emulation::count_of(count));
}
inline __m512i _mm512_sll_epi32(__m512i a, __m128i count) {
    return emulation::shift_left<uint32_t>(a, emulation::count_of(count));
}
inline __m512i _mm512_srl_epi16(__m512i a, __m128i count) {
    return emulation::shift_right<uint16_t>(a, emulation::count_of(count));
}
inline __m512i _mm512_srl_epi32(__m512i a, __m128i count) {
    return emulation::shift_right<uint32_t>(a, emulation::count_of(count));
}

// --- moving elements ---

inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) { return emulation::unpack<uint16_t, 0>(a, b); }
inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) { return emulation::unpack<uint16_t, 1>(a, b); }
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return emulation::unpack<uint32_t, 0>(a, b); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return emulation::unpack<uint32_t, 1>(a, b); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return emulation::unpack<uint64_t, 0>(a, b); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return emulation::unpack<uint64_t, 1>(a, b); }
inline __m512i _mm512_packs_epi32(__m512i a, __m512i b) { return emulation::pack<int32_t, int16_t>(a, b); }
inline __m512i _mm512_packs_epi16(__m512i a, __m512i b) { return emulation::pack<int16_t, int8_t>(a, b); }
inline __m512i _mm512_packus_epi16(__m512i a, __m512i b) { return emulation::pack<int16_t, uint8_t>(a, b); }
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int control) {
    __m512i made;
    for (int lane = 0; lane < 4; ++lane)
        std::memcpy(made.bytes + 16 * lane, (lane < 2 ? a : b).bytes + 16 * (control >> 2 * lane & 3), 16);
    return made;
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
    const emulation::Of<uint16_t> from(index), x(a);
    return emulation::make<uint16_t>([&](int i) { return x.at[from.at[i] % 32]; });
}
inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
    const emulation::Of<uint32_t> from(index), x(a);
    return emulation::make<uint32_t>([&](int i) { return x.at[from.at[i] % 16]; });
}
inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    return emulation::permute_two(emulation::Of<uint16_t>(a), index, emulation::Of<uint16_t>(b));
}
inline __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b) {
    return emulation::permute_two(emulation::Of<uint32_t>(a), index, emulation::Of<uint32_t>(b));
}
inline __m512i _mm512_permutex2var_epi64(__m512i a, __m512i index, __m512i b) {
    return emulation::permute_two(emulation::Of<uint64_t>(a), index, emulation::Of<uint64_t>(b));
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
    return emulation::permute_two(emulation::Of<float>(a), index, emulation::Of<float>(b));
}
inline __m512i _mm512_mask_expand_epi16(__m512i src, __mmask32 k, __m512i a) {
    const emulation::Of<uint16_t> x(a), y(src);
    int next = 0;
    return emulation::make<uint16_t>([&](int i) { return k >> i & 1 ? x.at[next++] : y.at[i]; });
}
inline __m512i _mm512_maskz_compress_epi16(__mmask32 k, __m512i a) {
    const emulation::Of<uint16_t> x(a);
    emulation::Of<uint16_t> made{};
    int next = 0;
    for (int i = 0; i < x.kCount; ++i)
        if (k >> i & 1) made.at[next++] = x.at[i];
    return made;
}

// --- conversions and fp32 ---

inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
    const emulation::Of<uint32_t> x(a);
    emulation::Elements<uint16_t, __m256i> made;
    for (int i = 0; i < made.kCount; ++i) made.at[i] = static_cast<uint16_t>(x.at[i]);
    return made;
}
inline __m512i _mm512_cvtepi16_epi32(__m256i a) {
    const emulation::Elements<int16_t, __m256i> x(a);
    return emulation::make<int32_t>([&](int i) { return x.at[i]; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    const emulation::Elements<uint16_t, __m256i> x(a);
    return emulation::make<uint32_t>([&](int i) { return x.at[i]; });
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
    return emulation::make<uint32_t>([&](int i) { return a.bytes[i]; });
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    const emulation::Of<int32_t> x(a);
    return emulation::make<float>([&](int i) { return x.at[i]; });
}
inline __m512 _mm512_cvtepu32_ps(__m512i a) {
    const emulation::Of<uint32_t> x(a);
    return emulation::make<float>([&](int i) { return x.at[i]; });
}
inline __m512i _mm512_cvtps_epi32(__m512 a) {
    const emulation::Of<float> x(a);
    return emulation::make<int32_t>([&](int i) { return emulation::to_int32(std::nearbyint(x.at[i])); });
}
inline __m512i _mm512_cvttps_epi32(__m512 a) {
    const emulation::Of<float> x(a);
    return emulation::make<int32_t>([&](int i) { return emulation::to_int32(std::trunc(x.at[i])); });
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
    const emulation::Elements<uint16_t, __m256i> x(a);
    return emulation::make<float>([&](int i) { return emulation::from_half(x.at[i]); });
}
inline __m256i _mm512_cvtps_ph(__m512 a, int) {
    const emulation::Of<float> x(a);
    emulation::Elements<uint16_t, __m256i> made;
    for (int i = 0; i < made.kCount; ++i) made.at[i] = emulation::to_half(x.at[i]);
    return made;
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    const emulation::Of<float> x(a), y(b);
    return emulation::make<float>([&](int i) { return x.at[i] * y.at[i]; });
}
inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    const emulation::Of<float> x(a), y(b);
    return emulation::make<float>([&](int i) { return x.at[i] + y.at[i]; });
}
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
    const emulation::Of<float> x(a), y(b);
    return emulation::make<float>([&](int i) { return x.at[i] - y.at[i]; });
}
// The second where either is no number, or both are zero.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
    const emulation::Of<float> x(a), y(b);
    return emulation::make<float>([&](int i) { return x.at[i] > y.at[i] ? x.at[i] : y.at[i]; });
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
    const emulation::Of<float> x(a), y(b);
    return emulation::make<float>([&](int i) { return x.at[i] < y.at[i] ? x.at[i] : y.at[i]; });
}
inline __m512 _mm512_abs_ps(__m512 a) {
    const emulation::Of<float> x(a);
    return emulation::make<float>([&](int i) { return std::fabs(x.at[i]); });
}
inline __m512i _mm512_abs_epi8(__m512i a) {
    const emulation::Of<int8_t> x(a);
    return emulation::make<uint8_t>([&](int i) { return x.at[i] < 0 ? -x.at[i] : x.at[i]; });
}
// Of four bytes each, unsigned ones times signed ones.
inline __m512i _mm512_dpbusd_epi32(__m512i src, __m512i a, __m512i b) {
    const emulation::Of<uint8_t> x(a);
    const emulation::Of<int8_t> y(b);
    const emulation::Of<uint32_t> z(src);
    return emulation::make<uint32_t>([&](int i) {
        int32_t sum = 0;
        for (int j = 4 * i; j < 4 * i + 4; ++j) sum += x.at[j] * y.at[j];
        return z.at[i] + static_cast<uint32_t>(sum);
    });
}
inline __m512 _mm512_div_ps(__m512 a, __m512 b) {
    const emulation::Of<float> x(a), y(b);
    return emulation::make<float>([&](int i) { return x.at[i] / y.at[i]; });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    const emulation::Of<float> x(a), y(b), z(c);
    return emulation::make<float>([&](int i) { return std::fma(x.at[i], y.at[i], z.at[i]); });
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
    const emulation::Of<float> x(a), y(b), z(c);
    return emulation::make<float>([&](int i) { return std::fma(-x.at[i], y.at[i], z.at[i]); });
}
inline __m512 _mm512_rcp14_ps(__m512 a) {
    const emulation::Of<float> x(a);
    return emulation::make<float>([&](int i) { return emulation::rough_reciprocal(x.at[i]); });
}

}  // namespace cachegen::avx512
