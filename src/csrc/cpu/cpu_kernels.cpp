#include "cpu/cpu_kernels.h"

namespace cachegen {

extern const CpuKernels kPortableKernels, kAvx2Kernels, kAvx512Kernels;

const std::vector<const CpuKernels*>& cpu_paths() {
    static const std::vector<const CpuKernels*> paths = {&kPortableKernels, &kAvx2Kernels, &kAvx512Kernels};
    return paths;
}

}  // namespace cachegen
