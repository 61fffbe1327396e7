// The kernels' paths: portable C++, AVX2 and AVX-512. All give the same bytes and the same values; which one runs is
// decided at run time, so that one build serves every machine.

#pragma once

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define CACHEGEN_X86 1
#else
#define CACHEGEN_X86 0
#endif

namespace cachegen {

enum class CpuPath : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Whether this processor and its operating system run a path.
inline bool supports(CpuPath path) {
#if CACHEGEN_X86
    if (path == CpuPath::kAvx2)
        // F16C, too, is in every processor with AVX2; older clangs do not know its name.
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
               __builtin_cpu_supports("fma");
#ifdef CACHEGEN_EMULATION
    if (path == CpuPath::kAvx512) return true;
#endif
    if (path == CpuPath::kAvx512)
        return supports(CpuPath::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vbmi2");
#endif
    return path == CpuPath::kPortable;
}

inline CpuPath best_path() {
    static const CpuPath best = supports(CpuPath::kAvx512) ? CpuPath::kAvx512
                                : supports(CpuPath::kAvx2) ? CpuPath::kAvx2
                                                           : CpuPath::kPortable;
    return best;
}

}  // namespace cachegen
