// A GPU for tests: runs the kernels of src/csrc/cuda, compiled by g++, thread by thread on the CPU.
//
// Every CUDA thread of a block is a fiber with its own stack. Fibers switch only where CUDA's threads wait for each
// other: at ballots, shuffles and barriers. A block's shared memory is static storage, since blocks run one after
// another. Where threads wait for what never comes (a ballot that not all lanes reach, a barrier in a branch), the
// launch fails with a message. The order in which threads run can be reversed: kernels that lack a barrier then give
// different bytes.
//
// It decodes thousands of times slower than the CPU's kernels: for tests only, and no part of the package.

#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class Operation { kNone, kBallot, kShuffle, kSyncWarp };

// Where the lanes of a warp, or all threads of a block, wait for each other.
struct Meeting {
    int num_members = 0;
    int num_arrived = 0;
    uint64_t generation = 0;
    Operation operation = Operation::kNone;
    // Two generations: a fast lane may be at the next meeting while a slow one still reads what this one gave.
    uint64_t values[2][kWarpSize];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Meeting* waits_at = nullptr;
    uint64_t generation = 0;
    int num_stores = 0;  // since the last meeting
    bool is_done = false;
};

constexpr uintptr_t kSectorBytes = 32;

// What the watched stores of warps did to memory: a GPU writes sectors, and must first read those it gets in part.
struct StoreCounts {
    uint64_t num_stores = 0;   // of a warp
    uint64_t num_sectors = 0;  // touched, summed over stores
    uint64_t num_whole = 0;    // of them, written whole by their store
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Meeting> warps;
    Meeting block;
    ucontext_t scheduler;
    const std::function<void()>* body = nullptr;
    int current = 0;
    bool is_reversed = false;
    std::string error;
    // Of a warp's k-th store since its last meeting: per sector, a bit for every byte.
    std::map<std::pair<int, int>, std::map<uintptr_t, uint32_t>> stores;
    StoreCounts store_counts;
};

static Machine machine;

inline void yield() { swapcontext(&machine.fibers[machine.current]->context, &machine.scheduler); }

template <class Value>
void check_aligned(const Value* address) {
    if (reinterpret_cast<uintptr_t>(address) % alignof(Value) == 0) return;
    machine.error = "misaligned address";
    for (;;) yield();
}

template <class Value>
const Value& load(const Value* source) {
    check_aligned(source);
    return *source;
}

// Store a lane's part of a store that is the warp's: lanes between two meetings store in step.
template <class Value>
void store(Value* target, const Value& value) {
    check_aligned(target);
    *target = value;
    const int lane_store = machine.fibers[machine.current]->num_stores++;
    auto& sectors = machine.stores[{machine.current / kWarpSize, lane_store}];
    const auto first = reinterpret_cast<uintptr_t>(target);
    for (uintptr_t byte = first; byte < first + sizeof(Value); ++byte)
        sectors[byte / kSectorBytes] |= 1u << byte % kSectorBytes;
}

// Count the stores of a warp that all its lanes have passed.
inline void count_stores(int warp) {
    const auto first = machine.stores.lower_bound({warp, 0}), last = machine.stores.lower_bound({warp + 1, 0});
    for (auto store = first; store != last; ++store) {
        ++machine.store_counts.num_stores;
        machine.store_counts.num_sectors += store->second.size();
        for (const auto& sector : store->second) machine.store_counts.num_whole += sector.second == ~uint32_t{0};
    }
    machine.stores.erase(first, last);
}

// Wait for all members of a meeting; returns the generation whose values are now complete.
inline uint64_t meet(Meeting& meeting, Operation operation, uint64_t value) {
    const uint64_t generation = meeting.generation;
    if (meeting.num_arrived == 0) meeting.operation = operation;
    if (meeting.operation != operation) {
        machine.error = "the lanes of a warp wait at different operations";
        for (;;) yield();
    }
    meeting.values[generation & 1][machine.current % kWarpSize] = value;
    machine.fibers[machine.current]->num_stores = 0;
    if (++meeting.num_arrived == meeting.num_members) {
        if (meeting.num_members == kWarpSize) count_stores(machine.current / kWarpSize);
        meeting.num_arrived = 0;
        ++meeting.generation;
        return generation;
    }
    Fiber& fiber = *machine.fibers[machine.current];
    fiber.waits_at = &meeting;
    fiber.generation = generation;
    yield();
    return generation;
}

inline const uint64_t* exchange(Operation operation, uint64_t value) {
    Meeting& warp = machine.warps[machine.current / kWarpSize];
    return warp.values[meet(warp, operation, value) & 1];
}

inline void run_fiber() {
    (*machine.body)();
    machine.fibers[machine.current]->is_done = true;
    for (;;) yield();
}

// Run the threads of one block until all are done, or none can go on.
inline void run_block(int num_threads) {
    while (static_cast<int>(machine.fibers.size()) < num_threads) machine.fibers.emplace_back(new Fiber);
    machine.warps.assign((num_threads + kWarpSize - 1) / kWarpSize, Meeting());
    for (Meeting& warp : machine.warps) warp.num_members = kWarpSize;
    machine.block = Meeting();
    machine.block.num_members = num_threads;
    for (int i = 0; i < num_threads; ++i) {
        Fiber& fiber = *machine.fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
        fiber.waits_at = nullptr;
        fiber.num_stores = 0;
        fiber.is_done = false;
    }
    for (int num_done = 0; num_done < num_threads && machine.error.empty();) {
        bool has_progress = false;
        for (int i = 0; i < num_threads && machine.error.empty(); ++i) {
            machine.current = machine.is_reversed ? num_threads - 1 - i : i;
            Fiber& fiber = *machine.fibers[machine.current];
            const bool is_waiting = fiber.waits_at != nullptr && fiber.waits_at->generation == fiber.generation;
            if (fiber.is_done || is_waiting) continue;
            fiber.waits_at = nullptr;
            threadIdx.x = static_cast<unsigned>(machine.current);
            swapcontext(&machine.scheduler, &fiber.context);
            has_progress = true;
            num_done += fiber.is_done;
        }
        if (!has_progress) machine.error = "threads wait at a ballot, shuffle or barrier that not all of them reach";
    }
    for (int warp = 0; warp * kWarpSize < num_threads; ++warp) count_stores(warp);  // since its last meeting
    machine.stores.clear();
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || block.x % kWarpSize != 0)
        machine.error = "invalid configuration of a launch";
    machine.body = &body;
    gridDim = grid;
    blockDim = block;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x && machine.error.empty(); ++x) {
                blockIdx = dim3(x, y, z);
                run_block(static_cast<int>(block.x));
            }
}

}  // namespace simt

#define CACHEGEN_LAUNCH(kernel, grid, block, stream, ...) \
    ((void)(stream), simt::launch(grid, block, [&] { kernel(__VA_ARGS__); }))

#define CACHEGEN_SHARED_ADDRESS(pointer) static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointer))
#define CACHEGEN_STORE(pointer, value) simt::store(pointer, value)
#define CACHEGEN_LOAD(pointer) simt::load(pointer)
#define CACHEGEN_NO_UNROLL
#define CACHEGEN_ASSUME_GLOBAL(pointer) ((void)(pointer))

inline void __syncthreads() { simt::meet(simt::machine.block, simt::Operation::kNone, 0); }
inline void __syncwarp() { simt::exchange(simt::Operation::kSyncWarp, 0); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
    const uint64_t* values = simt::exchange(simt::Operation::kBallot, predicate);
    uint32_t ballot = 0;
    for (int lane = 0; lane < simt::kWarpSize; ++lane) ballot |= static_cast<uint32_t>(values[lane] != 0) << lane;
    return ballot;
}

template <class Value>
Value shuffle_from(Value value, int source) {
    const uint64_t* values = simt::exchange(simt::Operation::kShuffle, static_cast<uint64_t>(value));
    return static_cast<Value>(values[source]);
}

inline int lane_of_fiber() { return simt::machine.current % simt::kWarpSize; }

template <class Value>
Value __shfl_sync(uint32_t, Value value, int source) {
    return shuffle_from(value, source);
}

template <class Value>
Value __shfl_up_sync(uint32_t, Value value, int distance) {
    const int lane = lane_of_fiber();
    return shuffle_from(value, lane >= distance ? lane - distance : lane);
}

template <class Value>
Value __shfl_xor_sync(uint32_t, Value value, int distance) {
    return shuffle_from(value, lane_of_fiber() ^ distance);
}

inline void atomicAdd(uint32_t* target, uint32_t value) { *target += value; }
inline void atomicOr(uint32_t* target, uint32_t value) { *target |= value; }
inline void atomicMax(uint32_t* target, uint32_t value) { *target = value > *target ? value : *target; }
inline void atomicMin(uint32_t* target, uint32_t value) { *target = value < *target ? value : *target; }

// The runtime: one device, and errors that are the emulation's.
using cudaError_t = int;
using cudaStream_t = void*;
struct cudaFuncAttributes {};
constexpr cudaError_t cudaSuccess = 0;

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}

static std::string last_error;
inline cudaError_t cudaGetLastError() {
    last_error = std::move(simt::machine.error);
    simt::machine.error.clear();
    return last_error.empty() ? cudaSuccess : 1;
}
inline const char* cudaGetErrorString(cudaError_t) { return last_error.c_str(); }

// For the tests, through ctypes: run the threads of each block from the last to the first.
extern "C" __attribute__((visibility("default"))) void cachegen_emulation_reverse(int is_reversed) {
    simt::machine.is_reversed = is_reversed != 0;
}

// For the tests: the watched stores since the last call.
extern "C" __attribute__((visibility("default"))) void cachegen_emulation_stores(simt::StoreCounts* counts) {
    *counts = std::exchange(simt::machine.store_counts, {});
}
