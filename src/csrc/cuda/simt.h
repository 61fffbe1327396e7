// What the kernels need of CUDA's language and runtime, so that the lines of the kernels compile twice: by nvcc, and by
// g++ under the emulation of tests/emulation, which runs every thread of a block and checks the bytes without a GPU.

#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define CACHEGEN_LAUNCH(kernel, grid, block, stream, ...) \
    kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

// The address of shared memory, in 32 bits.
#define CACHEGEN_SHARED_ADDRESS(pointer) static_cast<uint32_t>(__cvta_generic_to_shared(pointer))

// A store to the cache; the emulation counts the sectors that the lanes of a warp fill with one.
#define CACHEGEN_STORE(pointer, value) (*(pointer) = (value))

// A load of several values at once; the emulation refuses an address that they are not aligned to, as a GPU does.
#define CACHEGEN_LOAD(pointer) (*(pointer))

// Before a loop that nvcc is not to unroll.
#define CACHEGEN_NO_UNROLL _Pragma("unroll 1")

// An address that came as a number could be of any memory, for all nvcc knows.
#define CACHEGEN_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))

#elif defined(CACHEGEN_EMULATION)

#include "simt_emulation.h"

#else
#error "the kernels are compiled by nvcc, or by g++ with tests/emulation"
#endif
