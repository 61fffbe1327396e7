// The inverse transform before and behind its matrix product, which is a library's: components become digits in bf16,
// and products keys and values. Each value is read once and written once.
//
// The twin of the torch code in src/cachegen/methods/transform/batched.py; the tests hold the two to the same values.
// What torch sums by a fused multiply-add is one here, too; nvcc makes none of its own (-fmad=false).

#pragma once

#include <cmath>

#include "cuda/planes.cuh"

namespace cachegen {
namespace cuda {

constexpr int kRunTokens = 16;  // of a block: what a thread knows of its channels serves all of them
constexpr int kDigitBits = 8;
constexpr uint32_t kMaxExact = 256;  // integers up to here are exact in bf16
constexpr int kDigitWidth = 8;       // components that a thread splits at a time: 16 bytes of digits
constexpr int kPlacedWidth = 4;      // values that a thread loads at a time: 16 bytes of fp32

// Values that are read or written in one instruction, or in a few of 16 bytes.
template <class Value, int kWidth>
struct alignas(kWidth * sizeof(Value) < 16 ? kWidth * sizeof(Value) : 16) Run {
    Value values[kWidth];
};

template <int kWidth, class Value>
__device__ Run<Value, kWidth> load_run(const Value* source) {
    const auto* place = reinterpret_cast<const Run<Value, kWidth>*>(source);
    return CACHEGEN_LOAD(place);
}

template <class Value, int kWidth>
__device__ void store_run(Value* target, const Run<Value, kWidth>& run) {
    auto* place = reinterpret_cast<Run<Value, kWidth>*>(target);
    CACHEGEN_STORE(place, run);
}

// The part of a thread in work on some tokens of equally many items: neighbouring threads have neighbouring items.
struct ItemWalk {
    int first_item;
    int item_step;
    int first_token;  // of the tokens of a block
    int token_step;

    __device__ explicit ItemWalk(int num_items) {
        const int thread = static_cast<int>(threadIdx.x);
        item_step = num_items < kThreadsPerBlock ? num_items : kThreadsPerBlock;
        token_step = kThreadsPerBlock / item_step;
        first_token = thread / item_step;
        first_item = first_token < token_step ? thread % item_step : num_items;  // threads too many have none
    }
};

__device__ inline uint32_t magnitude_of(int32_t value) {
    return value < 0 ? 0u - static_cast<uint32_t>(value) : static_cast<uint32_t>(value);
}

__device__ inline uint16_t to_bf16(int32_t value) { return Bfloat16::narrow(static_cast<float>(value)); }

// Split the components of tokens [first, last) of a group, kWidth at a time; returns whether this thread has found one
// beyond what its digits have exactly.
template <int kWidth>
__device__ bool split_tokens(const DigitLaunch& launch, int64_t group, int first, int last) {
    const int depth = launch.num_components + launch.num_large;
    const int num_items = launch.num_components / kWidth;
    const ItemWalk walk(num_items);
    bool is_beyond = false;
    for (int item = walk.first_item; item < num_items; item += walk.item_step) {
        const int component = item * kWidth;
        const bool has_high = component < launch.num_large;
        const uint32_t limit = has_high ? (kMaxExact << kDigitBits) - 1 : kMaxExact;
        for (int token = first + walk.first_token; token < last; token += walk.token_step) {
            const auto values = load_run<kWidth>(launch.components + group * launch.group_stride +
                                                 token * launch.token_stride + component);
            uint16_t* digits = launch.digits + (group * launch.num_tokens + token) * depth;
            CACHEGEN_ASSUME_GLOBAL(digits);
            Run<uint16_t, kWidth> lows, highs;
            for (int i = 0; i < kWidth; ++i) {
                const int32_t value = values.values[i];
                is_beyond |= magnitude_of(value) > limit;
                // Unsigned: what overflows is beyond anyway.
                const int32_t rounded = static_cast<int32_t>(static_cast<uint32_t>(value) + (1u << (kDigitBits - 1)));
                const int32_t high = has_high ? rounded >> kDigitBits : 0;
                lows.values[i] = to_bf16(
                    static_cast<int32_t>(static_cast<uint32_t>(value) - (static_cast<uint32_t>(high) << kDigitBits)));
                highs.values[i] = to_bf16(high);
            }
            store_run(digits + component, lows);
            if (has_high) store_run(digits + launch.num_components + component, highs);
        }
    }
    return is_beyond;
}

// Grid: x = runs of tokens, y = groups, as many as there are or fewer.
__global__ void __launch_bounds__(kThreadsPerBlock) split_digits_kernel(DigitLaunch launch) {
    const int first = static_cast<int>(blockIdx.x) * kRunTokens;
    const int last = launch.num_tokens - first < kRunTokens ? launch.num_tokens : first + kRunTokens;
    const bool in_runs =
        (launch.num_components | launch.num_large) % kDigitWidth == 0 &&
        (launch.group_stride | launch.token_stride) % 4 == 0 &&
        (reinterpret_cast<uintptr_t>(launch.components) | reinterpret_cast<uintptr_t>(launch.digits)) % 16 == 0;
    bool is_beyond = false;
    for (int64_t group = blockIdx.y; group < launch.num_groups; group += gridDim.y)
        is_beyond |= in_runs ? split_tokens<kDigitWidth>(launch, group, first, last)
                             : split_tokens<1>(launch, group, first, last);
    if (is_beyond) atomicOr(launch.beyond, 1u);
}

// Where the vectors of a plane come from and go to.
template <class Dtype>
struct PlacedVectors {
    using Storage = typename Dtype::Storage;

    const PlaneKind& kind;
    const float* product;  // of the plane's first channel; so the means
    const float* means;
    int64_t num_channels;  // of a group
    Storage* values;
    int64_t token_stride;
    int64_t head_stride;
    bool in_runs;  // whether kPlacedWidth values lie together, aligned, wherever they are read or written

    __device__ PlacedVectors(const PlaceLaunch& launch, const PlacedPlane& plane, int index)
        : kind(launch.kinds[index % 2]), token_stride(plane.token_stride), head_stride(plane.head_stride) {
        const int layer_channels = launch.kinds[0].num_channels() + launch.kinds[1].num_channels();
        num_channels = int64_t{launch.num_layers} * layer_channels;
        const int group = index / (2 * launch.num_layers), layer = index % (2 * launch.num_layers) / 2;
        const int first = layer * layer_channels + (index % 2 == 0 ? 0 : launch.kinds[0].num_channels());
        product = launch.product + group * num_channels * launch.num_tokens + first;
        means = launch.means + group * num_channels + first;
        values = reinterpret_cast<Storage*>(plane.values);
        CACHEGEN_ASSUME_GLOBAL(values);
        const auto address = [](const float* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
        in_runs =
            (num_channels | token_stride | head_stride | kind.head_dim | kind.offset | kind.num_pairs) % kPlacedWidth ==
                0 &&
            (address(product) | address(means) | address(kind.cosines) | address(kind.sines)) % 16 == 0 &&
            plane.values % (kPlacedWidth * sizeof(Storage)) == 0;
    }
};

// How the values of an item turn.
enum class Pairs { kNone, kHalves, kInterleaved };

// What a thread places at a time: runs of kWidth values. Neighbouring threads have neighbouring runs, so that whatever
// a warp reads or writes by one instruction lies together.
template <Pairs kPairs, int kWidth>
struct Item {
    static constexpr bool kIsSplit = kPairs == Pairs::kHalves || (kPairs == Pairs::kInterleaved && kWidth == 1);
    static constexpr int kNumRuns = kIsSplit ? 2 : 1;
    static constexpr int kNumPairs = kPairs == Pairs::kNone ? 0 : kNumRuns * kWidth / 2;
    // From the members of a pair to those of the next one, and from its first member to its second.
    static constexpr int kStep = kPairs == Pairs::kHalves ? 1 : 2;
    static constexpr int kDistance = kPairs == Pairs::kHalves ? kWidth : 1;
};

// Place an item of a head, of every token_step-th token of [token, last).
//
// dim: where its values begin, and a second run `distance` behind; pair: its first.
template <class Dtype, int kWidth, Pairs kPairs>
__device__ void place_item(const PlacedVectors<Dtype>& vectors, float step, int head, int dim, int distance, int pair,
                           int token, int last, int token_step) {
    using Storage = typename Dtype::Storage;
    using ItemOf = Item<kPairs, kWidth>;
    constexpr int kNumRuns = ItemOf::kNumRuns;
    const PlaneKind& kind = vectors.kind;
    const int first = head * kind.head_dim + dim;
    const float* __restrict__ product = vectors.product + token * vectors.num_channels + first;
    const int64_t angle = int64_t{token} * kind.num_pairs + pair;
    const float *cosine_at = kind.cosines + angle, *sine_at = kind.sines + angle;
    Storage* target = vectors.values + token * vectors.token_stride + head * vectors.head_stride + dim;
    Run<float, kWidth> means[kNumRuns];
    for (int run = 0; run < kNumRuns; ++run) means[run] = load_run<kWidth>(vectors.means + first + run * distance);
    // As it is, registers leave room for 40 warps, whose loads are under way together.
    CACHEGEN_NO_UNROLL
    for (; token < last; token += token_step) {
        float values[kNumRuns * kWidth];
        for (int run = 0; run < kNumRuns; ++run) {
            const auto products = load_run<kWidth>(product + run * distance);
            for (int i = 0; i < kWidth; ++i)
                values[run * kWidth + i] = fmaf(step, products.values[i], means[run].values[i]);
        }
        if constexpr (kPairs != Pairs::kNone) {
            const auto cosines = load_run<ItemOf::kNumPairs>(cosine_at);
            const auto sines = load_run<ItemOf::kNumPairs>(sine_at);
            cosine_at += token_step * kind.num_pairs;
            sine_at += token_step * kind.num_pairs;
            for (int i = 0; i < ItemOf::kNumPairs; ++i) {
                float& first_member = values[i * ItemOf::kStep];
                float& second_member = values[i * ItemOf::kStep + ItemOf::kDistance];
                const float x = first_member, y = second_member, cosine = cosines.values[i], sine = sines.values[i];
                first_member = fmaf(-y, sine, x * cosine) * kind.scaling;
                second_member = fmaf(x, sine, y * cosine) * kind.scaling;
            }
        }
        for (int run = 0; run < kNumRuns; ++run) {
            Run<Storage, kWidth> narrowed;
            for (int i = 0; i < kWidth; ++i) narrowed.values[i] = Dtype::narrow(values[run * kWidth + i]);
            store_run(target + run * distance, narrowed);
        }
        product += token_step * vectors.num_channels;
        target += token_step * vectors.token_stride;
    }
}

// Place tokens [first, last) of a plane whose pairs, if any, are kPairs.
template <class Dtype, int kWidth, Pairs kPairs>
__device__ void place_tokens(const PlacedVectors<Dtype>& vectors, float step, int first, int last) {
    using ItemOf = Item<kPairs, kWidth>;
    const PlaneKind& kind = vectors.kind;
    const int num_turned = kind.num_pairs / ItemOf::kNumPairs;  // items of pairs in a head; then those of other dims
    const int per_head = num_turned + (kind.head_dim - 2 * kind.num_pairs) / kWidth;
    const int num_items = kind.num_heads * per_head;
    const int distance = kPairs == Pairs::kHalves ? kind.num_pairs : 1;
    const ItemWalk walk(num_items);
    for (int item = walk.first_item; item < num_items; item += walk.item_step) {
        const int head = item / per_head, within = item % per_head, token = first + walk.first_token;
        if (within < num_turned) {
            const int pair = within * ItemOf::kNumPairs, dim = kind.offset + pair * ItemOf::kStep;
            place_item<Dtype, kWidth, kPairs>(vectors, step, head, dim, distance, pair, token, last, walk.token_step);
        } else {
            const int still = (within - num_turned) * kWidth;
            const int dim = still < kind.offset ? still : still + 2 * kind.num_pairs;
            place_item<Dtype, kWidth, Pairs::kNone>(vectors, step, head, dim, 0, 0, token, last, walk.token_step);
        }
    }
}

template <class Dtype, int kWidth>
__device__ void place_tokens(const PlacedVectors<Dtype>& vectors, float step, int first, int last) {
    if (vectors.kind.is_interleaved)
        place_tokens<Dtype, kWidth, Pairs::kInterleaved>(vectors, step, first, last);
    else
        place_tokens<Dtype, kWidth, Pairs::kHalves>(vectors, step, first, last);
}

// Grid: x = runs of tokens, y = planes.
template <class Dtype>
__global__ void __launch_bounds__(kThreadsPerBlock)
    place_vectors_kernel(PlaceLaunch launch, PlacedPlanes planes, int first_plane) {
    const int plane = static_cast<int>(blockIdx.y), first = static_cast<int>(blockIdx.x) * kRunTokens;
    const int last = launch.num_tokens - first < kRunTokens ? launch.num_tokens : first + kRunTokens;
    const PlacedVectors<Dtype> vectors(launch, planes.at[plane], first_plane + plane);
    if (vectors.in_runs)
        place_tokens<Dtype, kPlacedWidth>(vectors, launch.step, first, last);
    else
        place_tokens<Dtype, 1>(vectors, launch.step, first, last);
}

}  // namespace cuda
}  // namespace cachegen
