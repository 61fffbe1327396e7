// AVX-512 as a path.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86
#include "cpu/avx512.h"
#endif

namespace cachegen {

extern const CpuKernels kAvx512Kernels;

#if CACHEGEN_X86
namespace {

bool supports_avx512() {
#ifdef CACHEGEN_EMULATION
    return true;
#else
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
           __builtin_cpu_supports("fma");
#endif
}

}  // namespace

const CpuKernels kAvx512Kernels = {"AVX512",
                                   supports_avx512,
                                   avx512::measure_plane,
                                   avx512::encode_batch,
                                   avx512::decode_batch,
                                   avx512::encode_components,
                                   avx512::decode_components,
                                   &avx512::kSynthesis,
                                   &avx512::kByteAnalysis};
#else
const CpuKernels kAvx512Kernels = {"AVX512", [] { return false; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                   nullptr};
#endif

}  // namespace cachegen
