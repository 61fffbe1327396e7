// The quantizer of methods `cachegen` and `uniform`, and the conversions between fp32 and the cache's dtypes.
//
// The twin of src/cachegen/methods/absmax/quantization.py, which says what is computed and why; the tests hold the two
// to the same bits. Compile without fused multiply-add (-ffp-contract=off, -fmad=false): each operation here rounds
// once.

#pragma once

#include <cstdint>
#include <cstring>

#include "rans.h"

namespace cachegen {

// The numbers stand in the chunk header.
enum class Dtype : int { kFloat16 = 1, kBfloat16 = 2, kFloat32 = 3 };

CACHEGEN_HOST_DEVICE inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

CACHEGEN_HOST_DEVICE inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// A dtype's storage type, and its exact widening to and correctly rounded narrowing from fp32. On a GPU one instruction
// does what the integers spell out here; both round to nearest, ties to even.
struct Float32 {
    static constexpr Dtype kDtype = Dtype::kFloat32;
    using Storage = float;
    CACHEGEN_HOST_DEVICE static float widen(Storage value) { return value; }
    CACHEGEN_HOST_DEVICE static Storage narrow(float value) { return value; }
};

struct Bfloat16 {
    static constexpr Dtype kDtype = Dtype::kBfloat16;
    using Storage = uint16_t;
    CACHEGEN_HOST_DEVICE static float widen(Storage value) { return float_of(static_cast<uint32_t>(value) << 16); }
    // Finite input only: adding half a unit, or just below it where the result is even, rounds ties to even.
    CACHEGEN_HOST_DEVICE static Storage narrow(float value) {
#if defined(__CUDA_ARCH__)
        Storage narrowed;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrowed) : "f"(value));
        return narrowed;
#else
        const uint32_t bits = bits_of(value);
        return static_cast<Storage>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#endif
    }
};

struct Float16 {
    static constexpr Dtype kDtype = Dtype::kFloat16;
    using Storage = uint16_t;
    // Scaling by 2^112 moves the exponent bias from 15 to 127 and makes subnormals come out right.
    CACHEGEN_HOST_DEVICE static float widen(Storage value) {
#if defined(__CUDA_ARCH__)
        float widened;
        asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(value));
        return widened;
#else
        const uint32_t magnitude = static_cast<uint32_t>(value & 0x7FFFu) << 13;
        const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
        if (magnitude >= 0x0F800000u) return float_of(sign | magnitude | 0x7F800000u);  // infinity and NaN
        return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
#endif
    }
    // Finite input only. Normal results round in the integer domain, subnormal ones by adding 0.5, whose fp32 unit in
    // the last place is fp16's smallest subnormal.
    CACHEGEN_HOST_DEVICE static Storage narrow(float value) {
#if defined(__CUDA_ARCH__)
        Storage narrowed;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed) : "f"(value));
        return narrowed;
#else
        const uint32_t bits = bits_of(value);
        const uint32_t sign = (bits >> 16) & 0x8000u;
        const uint32_t magnitude = bits & 0x7FFFFFFFu;
        uint32_t result;
        if (magnitude >= 0x38800000u) {  // at least 2^-14, the smallest normal fp16
            result = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
            if (result > 0x7C00u) result = 0x7C00u;
        } else {
            result = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        }
        return static_cast<Storage>(sign | result);
#endif
    }
};

// Call work(Float16{}), work(Bfloat16{}) or work(Float32{}); returns false, without a call, where `dtype` is none of
// them.
template <class Work>
bool with_dtype(Dtype dtype, Work&& work) {
    switch (dtype) {
        case Dtype::kFloat16:
            work(Float16{});
            return true;
        case Dtype::kBfloat16:
            work(Bfloat16{});
            return true;
        case Dtype::kFloat32:
            work(Float32{});
            return true;
    }
    return false;
}

// The size of a value of a known dtype.
inline int64_t value_bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// M, the largest quantized magnitude: symbols run from 0 to 2M and M stands for zero.
CACHEGEN_HOST_DEVICE inline int zero_symbol_of(int num_bins) { return num_bins / 2 - 1; }

// The factor from values to steps. A scale so small that it overflows counts as zero: its token becomes zeros.
CACHEGEN_HOST_DEVICE inline float inverse_step(float scale, int zero_symbol) {
    const float inverse = static_cast<float>(zero_symbol) / scale;
    return inverse <= 3.402823466e38f ? inverse : 0.0f;
}

CACHEGEN_HOST_DEVICE inline int quantize(float value, float inverse, int zero_symbol) {
    // 1.5 * 2^23: adding it rounds to an integer, ties to even, and leaves the integer in the low mantissa bits.
    constexpr float kRounder = 12582912.0f;
    const int rounded = static_cast<int>(bits_of(value * inverse + kRounder)) - static_cast<int>(bits_of(kRounder));
    return rounded + zero_symbol;
}

// The level of a symbol in units of the scale, (symbol - M) / M.
CACHEGEN_HOST_DEVICE inline float level_of(int symbol, int zero_symbol) {
    return static_cast<float>(symbol - zero_symbol) / static_cast<float>(zero_symbol);
}

}  // namespace cachegen
