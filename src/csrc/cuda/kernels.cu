// The launches of launch.h: grids from sizes, and one instance of each kernel per dtype. Compiled by nvcc into
// torchac_cuda, and by g++ under the emulation of the tests.

#include "cuda/arithmetic.cuh"
#include "cuda/components.cuh"
#include "cuda/launch.h"
#include "cuda/measure.cuh"
#include "cuda/rans_decode.cuh"
#include "cuda/rans_encode.cuh"
#include "cuda/simt.h"
#include "cuda/synthesis.cuh"

namespace cachegen {
namespace cuda {
namespace {

constexpr int64_t kMaxGridY = 65535;  // and z; the kernels walk on where there is more to do

dim3 make_grid(int64_t x, int64_t y, int64_t z = 1) {
    const auto bounded = [](int64_t size) { return static_cast<unsigned>(size < kMaxGridY ? size : kMaxGridY); };
    return dim3(static_cast<unsigned>(x), bounded(y), bounded(z));
}

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Make the device current while its kernels are launched: this module's CUDA runtime is not torch's.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        cudaGetDevice(&previous_);
        cudaSetDevice(device);
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
};

const char* take_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Call launch_it(Dtype tag) on the launch's device; returns what went wrong.
template <class AnyLaunch, class LaunchIt>
const char* launch_for_dtype(const AnyLaunch& launch, LaunchIt&& launch_it) {
    const DeviceGuard guard(launch.device);
    cudaGetLastError();  // an earlier error is not this launch's
    if (!with_dtype(static_cast<Dtype>(launch.dtype), launch_it)) return "unknown dtype";
    return take_error();
}

// Call launch_it(grid) on the launch's device, a warp for every stream; returns what went wrong.
template <class LaunchIt>
const char* launch_for_groups(const ComponentLaunch& launch, LaunchIt&& launch_it) {
    const DeviceGuard guard(launch.device);
    cudaGetLastError();
    launch_it(make_grid(launch.num_groups, divide_up(launch.max_streams, kWarpsPerBlock)));
    return take_error();
}

}  // namespace

const char* launch_find_scales(const Launch& launch, uint32_t* bad_tokens) {
    const dim3 grid = make_grid(launch.num_planes, divide_up(launch.num_tokens, kWarpsPerBlock));
    return launch_for_dtype(launch, [&](auto tag) {
        CACHEGEN_LAUNCH(find_scales_kernel<decltype(tag)>, grid, kThreadsPerBlock, launch.stream, launch.planes,
                        launch.num_tokens, bad_tokens);
    });
}

const char* launch_count_symbols(const Launch& launch, int64_t max_channels, uint32_t* counts) {
    const dim3 grid = make_grid(launch.num_planes, divide_up(max_channels, kCountedChannels),
                                divide_up(launch.num_tokens, kCountedTokens));
    return launch_for_dtype(launch, [&](auto tag) {
        CACHEGEN_LAUNCH(count_symbols_kernel<decltype(tag)>, grid, kCountedChannels, launch.stream, launch.planes,
                        launch.num_tokens, counts);
    });
}

const char* launch_encode(const Launch& launch, uint8_t* slots, StreamRecord* streams, int32_t* statuses) {
    const dim3 grid = make_grid(launch.num_planes, divide_up(launch.max_streams, kWarpsPerBlock));
    return launch_for_dtype(launch, [&](auto tag) {
        CACHEGEN_LAUNCH(encode_kernel<decltype(tag)>, grid, kThreadsPerBlock, launch.stream, launch.planes,
                        launch.num_tokens, launch.tables, slots, streams, statuses);
    });
}

const char* launch_compact(const Launch& launch, const uint8_t* slots, const StreamRecord* streams, uint8_t* payload,
                           int64_t payload_bytes) {
    const dim3 grid = make_grid(launch.num_planes, launch.max_streams);
    return launch_for_dtype(launch, [&](auto) {
        CACHEGEN_LAUNCH(compact_kernel, grid, kThreadsPerBlock, launch.stream, launch.planes, launch.num_tokens,
                        launch.tables != nullptr, slots, streams, payload, payload_bytes);
    });
}

const char* launch_decode(const Launch& launch, const uint8_t* payload, int64_t payload_bytes,
                          const StreamRecord* streams, int32_t* statuses) {
    const dim3 grid = make_grid(launch.num_planes, divide_up(launch.max_streams, kWarpsPerBlock));
    return launch_for_dtype(launch, [&](auto tag) {
        CACHEGEN_LAUNCH(decode_kernel<decltype(tag)>, grid, kThreadsPerBlock, launch.stream, launch.planes,
                        launch.num_tokens, launch.tables, payload, payload_bytes, streams, statuses);
    });
}

const char* launch_encode_codes(const Launch& launch, uint8_t* slots, StreamRecord* streams, int32_t* statuses) {
    const dim3 grid = make_grid(launch.num_planes, launch.max_streams);
    return launch_for_dtype(launch, [&](auto tag) {
        CACHEGEN_LAUNCH(encode_codes_kernel<decltype(tag)>, grid, kThreadsPerBlock, launch.stream, launch.planes,
                        launch.num_tokens, launch.tables, slots, streams, statuses);
    });
}

const char* launch_compact_codes(const Launch& launch, const uint8_t* slots, const StreamRecord* streams,
                                 uint8_t* payload, int64_t payload_bytes) {
    const dim3 grid = make_grid(launch.num_planes, launch.max_streams);
    return launch_for_dtype(launch, [&](auto) {
        CACHEGEN_LAUNCH(compact_codes_kernel, grid, kThreadsPerBlock, launch.stream, launch.planes, launch.num_tokens,
                        slots, streams, payload, payload_bytes);
    });
}

const char* launch_decode_codes(const Launch& launch, const uint8_t* payload, int64_t payload_bytes,
                                const StreamRecord* streams, int32_t* statuses) {
    const dim3 grid = make_grid(launch.num_planes, launch.max_streams);
    return launch_for_dtype(launch, [&](auto tag) {
        CACHEGEN_LAUNCH(decode_codes_kernel<decltype(tag)>, grid, kThreadsPerBlock, launch.stream, launch.planes,
                        launch.num_tokens, launch.tables, payload, payload_bytes, streams, statuses);
    });
}

const char* launch_encode_components(const ComponentLaunch& launch, uint8_t* slots, StreamRecord* streams,
                                     int32_t* statuses) {
    return launch_for_groups(launch, [&](const dim3& grid) {
        CACHEGEN_LAUNCH(encode_components_kernel, grid, kThreadsPerBlock, launch.stream, launch.groups,
                        launch.num_tokens, launch.components, launch.tables, launch.num_tables, slots, streams,
                        statuses);
    });
}

const char* launch_compact_components(const ComponentLaunch& launch, const uint8_t* slots, const StreamRecord* streams,
                                      uint8_t* payload, int64_t payload_bytes) {
    return launch_for_groups(launch, [&](const dim3& grid) {
        CACHEGEN_LAUNCH(compact_components_kernel, grid, kThreadsPerBlock, launch.stream, launch.groups,
                        launch.num_tokens, launch.components, launch.tables, launch.num_tables, slots, streams, payload,
                        payload_bytes);
    });
}

const char* launch_decode_components(const ComponentLaunch& launch, const uint8_t* payload, int64_t payload_bytes,
                                     const StreamRecord* streams, int32_t* statuses) {
    return launch_for_groups(launch, [&](const dim3& grid) {
        CACHEGEN_LAUNCH(decode_components_kernel, grid, kThreadsPerBlock, launch.stream, launch.groups,
                        launch.num_tokens, launch.components, launch.tables, launch.num_tables, payload, payload_bytes,
                        streams, statuses);
    });
}

const char* launch_split_digits(const DigitLaunch& launch) {
    const DeviceGuard guard(launch.device);
    cudaGetLastError();
    const dim3 grid = make_grid(divide_up(launch.num_tokens, kRunTokens), launch.num_groups);
    CACHEGEN_LAUNCH(split_digits_kernel, grid, kThreadsPerBlock, launch.stream, launch);
    return take_error();
}

const char* launch_place_vectors(const PlaceLaunch& launch, const PlacedPlane* planes, int64_t num_planes) {
    const int64_t num_runs = divide_up(launch.num_tokens, kRunTokens);
    return launch_for_dtype(launch, [&](auto tag) {
        for (int64_t first = 0; first < num_planes; first += kMaxPlacedPlanes) {
            const int64_t count = num_planes - first < kMaxPlacedPlanes ? num_planes - first : kMaxPlacedPlanes;
            PlacedPlanes placed{};
            for (int64_t i = 0; i < count; ++i) placed.at[i] = planes[first + i];
            CACHEGEN_LAUNCH(place_vectors_kernel<decltype(tag)>, make_grid(num_runs, count), kThreadsPerBlock,
                            launch.stream, launch, placed, static_cast<int>(first));
        }
    });
}

const char* find_problem(int device) {
    int num_devices = 0;
    cudaError_t error = cudaGetDeviceCount(&num_devices);
    if (error == cudaSuccess && (device < 0 || device >= num_devices)) return "there is no such device";
    if (error == cudaSuccess) {
        const DeviceGuard guard(device);
        cudaFuncAttributes attributes;  // of a kernel in a build that this device cannot run
        error = cudaFuncGetAttributes(&attributes, compact_kernel);
    }
    cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace cachegen
