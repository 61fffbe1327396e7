// The vectors of avx512_emulation.h, and what its intrinsics have in common: elements, masks, memory, halves.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

namespace cachegen::avx512 {

struct __m128i {
    unsigned char bytes[16];
};
struct __m256i {
    unsigned char bytes[32];
};
struct __m512i {
    unsigned char bytes[64];
};
struct __m512 {
    unsigned char bytes[64];
};
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;

enum { _MM_HINT_T1 = 2, _MM_HINT_T0 = 3, _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8 };

namespace emulation {

template <class T, class Vector>
struct Elements {
    static constexpr int kCount = sizeof(Vector) / sizeof(T);
    T at[kCount];

    Elements() = default;
    explicit Elements(const Vector& vector) { std::memcpy(at, &vector, sizeof at); }
    operator Vector() const {
        Vector vector;
        std::memcpy(&vector, at, sizeof at);
        return vector;
    }
};

template <class T>
using Of = Elements<T, std::conditional_t<std::is_same_v<T, float>, __m512, __m512i>>;

// Each element of the result from its place.
template <class T, class Function>
inline Of<T> make(Function function) {
    Of<T> made;
    for (int i = 0; i < made.kCount; ++i) made.at[i] = static_cast<T>(function(i));
    return made;
}

// The elements for which something holds, as bits.
template <int kCount, class Function>
inline uint32_t mask_of(Function function) {
    uint32_t mask = 0;
    for (int i = 0; i < kCount; ++i) mask |= static_cast<uint32_t>(static_cast<bool>(function(i))) << i;
    return mask;
}

template <class T, class Vector>
inline Vector select(uint32_t mask, const Vector& where_set, const Vector& elsewhere) {
    const Elements<T, Vector> a(where_set), b(elsewhere);
    Elements<T, Vector> made;
    for (int i = 0; i < made.kCount; ++i) made.at[i] = mask >> i & 1 ? a.at[i] : b.at[i];
    return made;
}

template <class T>
inline T read(const void* address, int i) {
    T value;
    std::memcpy(&value, static_cast<const char*>(address) + i * sizeof value, sizeof value);
    return value;
}

template <class T, class Vector>
inline Vector masked_load(const Vector& elsewhere, uint32_t mask, const void* address) {
    Elements<T, Vector> made(elsewhere);
    for (int i = 0; i < made.kCount; ++i)
        if (mask >> i & 1) made.at[i] = read<T>(address, i);
    return made;
}

template <class T, class Vector>
inline void masked_store(void* address, uint32_t mask, const Vector& vector) {
    const Elements<T, Vector> elements(vector);
    for (int i = 0; i < elements.kCount; ++i)
        if (mask >> i & 1) std::memcpy(static_cast<char*>(address) + i * sizeof(T), &elements.at[i], sizeof(T));
}

template <class Vector>
inline void check_aligned(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(Vector) == 0) return;
    std::fprintf(stderr, "an aligned access of %zu bytes to %p\n", sizeof(Vector), address);
    std::abort();
}

template <class Vector>
inline Vector load(const void* address) {
    Vector vector;
    std::memcpy(&vector, address, sizeof vector);
    return vector;
}

template <class Vector>
inline Vector load_aligned(const void* address) {
    check_aligned<Vector>(address);
    return load<Vector>(address);
}

template <class Vector>
inline void store_aligned(void* address, const Vector& vector) {
    check_aligned<Vector>(address);
    std::memcpy(address, &vector, sizeof vector);
}

inline uint64_t count_of(__m128i count) { return Elements<uint64_t, __m128i>(count).at[0]; }

template <class T>
inline __m512i shift_left(__m512i a, uint64_t count) {
    const Of<T> x(a);
    return make<T>([&](int i) { return count < 8 * sizeof(T) ? uint32_t{x.at[i]} << count : 0; });
}

template <class T>
inline __m512i shift_right(__m512i a, uint64_t count) {
    const Of<T> x(a);
    return make<T>([&](int i) { return count < 8 * sizeof(T) ? x.at[i] >> count : 0; });
}

// The elements of the lower (kHalf 0) or upper halves of 128-bit lanes, alternately of a and b.
template <class T, int kHalf>
inline __m512i unpack(__m512i a, __m512i b) {
    constexpr int kPerLane = 16 / sizeof(T);
    const Of<T> x(a), y(b);
    return make<T>([&](int i) {
        const int from = i / kPerLane * kPerLane + kHalf * kPerLane / 2 + i % kPerLane / 2;
        return i % 2 == 0 ? x.at[from] : y.at[from];
    });
}

// Wide elements of a, then of b, in each 128-bit lane, as the nearest Narrow.
template <class Wide, class Narrow>
inline __m512i pack(__m512i a, __m512i b) {
    constexpr int kPerLane = 16 / sizeof(Wide);
    const Of<Wide> x(a), y(b);
    return make<Narrow>([&](int i) {
        const int lane = i / (2 * kPerLane), within = i % (2 * kPerLane);
        const Wide wide = (within < kPerLane ? x : y).at[lane * kPerLane + within % kPerLane];
        return std::clamp<Wide>(wide, std::numeric_limits<Narrow>::min(), std::numeric_limits<Narrow>::max());
    });
}

template <class T>
inline Of<T> permute_two(const Of<T>& a, __m512i index, const Of<T>& b) {
    using Index = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    const Of<Index> from(index);
    return make<T>([&](int i) {
        const int place = static_cast<int>(from.at[i] % (2 * a.kCount));
        return place < a.kCount ? a.at[place] : b.at[place - a.kCount];
    });
}

// What conversions give for what no int32 holds, NaN included.
inline int32_t to_int32(float rounded) {
    return rounded >= -0x1p31f && rounded < 0x1p31f ? static_cast<int32_t>(rounded)
                                                    : std::numeric_limits<int32_t>::min();
}

inline float from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float magnitude = exponent == 31  ? (fraction ? std::numeric_limits<float>::quiet_NaN() : INFINITY)
                            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                            : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return std::copysign(magnitude, bits >> 15 ? -1.0f : 1.0f);
}

inline uint16_t to_half(float value) {
    const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
    const double magnitude = std::fabs(static_cast<double>(value));
    if (std::isnan(value)) return sign | 0x7E00;
    if (magnitude >= 65520.0) return sign | 0x7C00;
    const int exponent = magnitude == 0 ? -14 : std::max(std::ilogb(magnitude), -14);
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units));
}

// Relative errors up to 2^-14 are allowed: about that much, up or down by the bits of the operand.
inline float rough_reciprocal(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const double error = (bits * 0x9E3779B1u) >> 31 ? 0.99 / 16384 : -0.99 / 16384;
    return static_cast<float>((1 + error) / static_cast<double>(value));
}

}  // namespace emulation

}  // namespace cachegen::avx512
