// The paths of this processor, for fuzzers that compare them.

#pragma once

#include <vector>

#include "cpu/cpu_kernels.h"

namespace cachegen {

// The first is portable.
inline std::vector<const CpuKernels*> supported_paths() {
    std::vector<const CpuKernels*> paths;
    for (const CpuKernels* path : cpu_paths())
        if (path->is_supported()) paths.push_back(path);
    return paths;
}

}  // namespace cachegen
