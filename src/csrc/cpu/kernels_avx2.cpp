// AVX2 as a path.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86
#include "cpu/avx2.h"
#endif

namespace cachegen {

extern const CpuKernels kAvx2Kernels;

#if CACHEGEN_X86
const CpuKernels kAvx2Kernels = {"AVX2",
                                 [] {
                                     // F16C, too, is in every processor with AVX2; older clangs do not know its name.
                                     return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                                            __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("fma");
                                 },
                                 avx2::measure_plane,
                                 avx2::encode_batch,
                                 avx2::decode_batch,
                                 avx2::encode_components,
                                 avx2::decode_components,
                                 &avx2::kSynthesis,
                                 &avx2::kByteAnalysis};
#else
const CpuKernels kAvx2Kernels = {"AVX2", [] { return false; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                 nullptr};
#endif

}  // namespace cachegen
