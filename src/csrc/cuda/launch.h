// What the CUDA kernels are given, and the functions that launch them. Plain C++: the bindings need no CUDA header.
//
// Every pointer is to device memory, except `stream`, a cudaStream_t. Nothing here allocates, copies or waits: launches
// go to the caller's stream and return null, or CUDA's words for what went wrong.

#pragma once

#include <cstdint>

#include "arithmetic_coder.h"
#include "component_streams.h"
#include "quantization.h"
#include "rans.h"
#include "stream_layout.h"

namespace cachegen {
namespace cuda {

// One plane, as a row of an int64 tensor: see cpu/planes.h for what the fields of the same name mean.
struct PlaneRecord {
    int64_t values;        // address of token 0
    int64_t token_stride;  // in elements
    int64_t head_stride;
    int64_t num_heads;
    int64_t head_dim;
    int64_t scales;  // address of token 0's
    int64_t num_bins;
    int64_t low_bits;
    int64_t tokens_per_stream;
    int64_t first_stream;  // of the plane, in the chunk's index
    int64_t first_table;   // of the plane, in the tables and the counts; table c codes channel c
    int64_t workspace;     // encoder: bytes from `slots` to its first stream's
};
constexpr int kPlaneFields = 12;
static_assert(sizeof(PlaneRecord) == 8 * kPlaneFields, "a record is a row of int64");

// One stream of a chunk, as a row of an int64 tensor.
struct StreamRecord {
    int64_t offset;  // bytes from the start of the payload, a multiple of 16
    int64_t num_bytes;
    int64_t num_words;
};
constexpr int kStreamFields = 3;

// What all launches share. Tables are packed entries (TableEntry), [num_tables][32]; null: coder `packed`.
struct Launch {
    int device;
    void* stream;
    int dtype;
    const PlaneRecord* planes;
    int64_t num_planes;
    int num_tokens;
    int max_streams;  // of any plane
    const uint32_t* tables;
};

// Scales of all tokens, and the first token of each plane that is not finite; bad_tokens starts as 0xFFFFFFFF.
const char* launch_find_scales(const Launch& launch, uint32_t* bad_tokens);

// Adds to counts [num_tables][32] how often each channel's high part takes each value.
const char* launch_count_symbols(const Launch& launch, int64_t max_channels, uint32_t* counts);

// Bytes of the workspace that the encoder needs for a stream: what precedes its words, and a word for every symbol.
CACHEGEN_HOST_DEVICE inline int64_t slot_bytes(const StreamShape& shape, int64_t low_bits, bool has_tables) {
    const int64_t num_symbols = shape.num_tokens * shape.num_channels;
    const StreamParts parts = lay_out_parts(shape, has_tables, num_symbols * low_bits);
    return round_up(parts.words + (has_tables ? 2 * num_symbols : 0), kStreamAlignment);
}

// Encode all streams, each into its slot; fills num_bytes and num_words of `streams`. A plane's slots lie
// slot_bytes(of tokens_per_stream tokens) apart.
const char* launch_encode(const Launch& launch, uint8_t* slots, StreamRecord* streams, int32_t* statuses);

// Move all streams from their slots to their offsets, each padded with zeros to a multiple of 16 bytes.
const char* launch_compact(const Launch& launch, const uint8_t* slots, const StreamRecord* streams, uint8_t* payload,
                           int64_t payload_bytes);

// Decode all streams into the planes.
const char* launch_decode(const Launch& launch, const uint8_t* payload, int64_t payload_bytes,
                          const StreamRecord* streams, int32_t* statuses);

// The same of coder `ac`, whose streams have at most kMaxCodeTokens tokens; statuses start as zero.
CACHEGEN_HOST_DEVICE inline int64_t code_slot_bytes(const StreamShape& shape, int64_t low_bits) {
    const int64_t codes = shape.num_channels * max_code_bytes(shape.num_tokens);
    return round_up(lay_out_codes(shape, low_bits).codes + codes, kStreamAlignment);
}
const char* launch_encode_codes(const Launch& launch, uint8_t* slots, StreamRecord* streams, int32_t* statuses);
const char* launch_compact_codes(const Launch& launch, const uint8_t* slots, const StreamRecord* streams,
                                 uint8_t* payload, int64_t payload_bytes);
const char* launch_decode_codes(const Launch& launch, const uint8_t* payload, int64_t payload_bytes,
                                const StreamRecord* streams, int32_t* statuses);

// The components of one group of layers at one level, as a row of an int64 tensor.
struct GroupRecord {
    int64_t components;    // address of token 0's, int32; decoder: in, the level before's; out, this level's
    int64_t token_stride;  // in elements
    int64_t coarse;        // encoder: address of the level before's
    int64_t coarse_stride;
    int64_t num_components;
    int64_t num_refined;  // the first so many refine the level before's
    int64_t low_bits;     // of all components of a token together
    int64_t tokens_per_stream;
    int64_t first_stream;     // of the group, in the index
    int64_t first_component;  // of the group, in the ComponentRecords
    int64_t workspace;        // encoder: bytes from `slots` to its first stream's
};
constexpr int kGroupFields = 11;
static_assert(sizeof(GroupRecord) == 8 * kGroupFields, "a record is a row of int64");

// How a component is coded, in an int64.
struct alignas(8) ComponentRecord {
    uint32_t low_bits_before;  // of the group's components before it together
    uint16_t table;
    uint16_t low_bits;
};
static_assert(sizeof(ComponentRecord) == 8, "a record is an int64");

constexpr int kMaxComponentTables = 64;  // what shared memory is reserved for; there are 37

// What the launches for components share. Tables are packed entries, as Launch has them.
struct ComponentLaunch {
    int device;
    void* stream;
    const GroupRecord* groups;
    int64_t num_groups;
    int num_tokens;
    int max_streams;  // of any group
    const ComponentRecord* components;
    const uint32_t* tables;
    int num_tables;
};

// Bytes of the workspace that the encoder needs for a stream of components: as slot_bytes, escapes not counted.
CACHEGEN_HOST_DEVICE inline int64_t component_slot_bytes(const StreamShape& shape, int64_t low_bits_of_token) {
    const StreamParts parts = lay_out_parts(shape, true, shape.num_tokens * low_bits_of_token);
    return round_up(parts.words + 2 * shape.num_tokens * shape.num_channels, kStreamAlignment);
}

// Encode all streams but for their escapes, each into its slot; fills num_bytes, escapes included, and num_words of
// `streams`. A group's slots lie component_slot_bytes(of tokens_per_stream tokens) apart.
const char* launch_encode_components(const ComponentLaunch& launch, uint8_t* slots, StreamRecord* streams,
                                     int32_t* statuses);

// Move all streams from their slots to their offsets, with their escapes, each padded with zeros to a multiple of 16
// bytes.
const char* launch_compact_components(const ComponentLaunch& launch, const uint8_t* slots, const StreamRecord* streams,
                                      uint8_t* payload, int64_t payload_bytes);

// Decode all streams into the groups' components.
const char* launch_decode_components(const ComponentLaunch& launch, const uint8_t* payload, int64_t payload_bytes,
                                     const StreamRecord* streams, int32_t* statuses);

// Components of some groups of layers, to be split into digits for a product in bf16.
struct DigitLaunch {
    int device;
    void* stream;
    const int32_t* components;  // of the first group's first token
    int64_t group_stride;       // in elements
    int64_t token_stride;
    int num_groups;
    int num_tokens;
    int num_components;  // of a token
    int num_large;       // the first so many have a second digit
    uint16_t* digits;  // bf16 [num_groups][num_tokens][num_components + num_large], the second digits behind the first
    uint32_t* beyond;  // becomes 1 where a digit is beyond what bf16 has exactly
};
const char* launch_split_digits(const DigitLaunch& launch);

// What all keys have in common, or all values: see Rotation in src/cachegen/rotation.py for the pairs.
struct PlaneKind {
    int num_heads;
    int head_dim;
    int offset;            // the first dim that turns
    int num_pairs;         // 0: none does
    int is_interleaved;    // 0: halves
    float scaling;         // of what has turned
    const float* cosines;  // [num_tokens][num_pairs]
    const float* sines;

    CACHEGEN_HOST_DEVICE int num_channels() const { return num_heads * head_dim; }
};

// Vectors of some groups of layers, to be turned and rounded into the planes of their layers.
struct PlaceLaunch {
    int device;
    void* stream;
    int dtype;
    const float* product;  // [num_groups][num_tokens][num_layers][channels of a layer's keys, then its values']
    const float* means;    // [num_groups][num_layers][the same channels]; a vector is mean + step * product
    float step;
    int num_layers;  // of a group
    int num_tokens;
    PlaneKind kinds[2];  // keys, values
};

// One plane, as the kernel's argument has it: no copy to the device goes before the launch.
struct PlacedPlane {
    int64_t values;        // address of token 0
    int64_t token_stride;  // in elements
    int64_t head_stride;
};
constexpr int kPlacedFields = 3;
static_assert(sizeof(PlacedPlane) == 8 * kPlacedFields, "a record is a row of int64");
constexpr int kMaxPlacedPlanes = 128;  // of a launch, whose arguments have 4 KiB
struct PlacedPlanes {
    PlacedPlane at[kMaxPlacedPlanes];
};

// Place the vectors of all planes: keys and values of the first group's first layer, of its second, ...
//
// planes: in the host's memory.
const char* launch_place_vectors(const PlaceLaunch& launch, const PlacedPlane* planes, int64_t num_planes);

// Null where `device` can run the kernels, or CUDA's words for why not.
const char* find_problem(int device);

}  // namespace cuda
}  // namespace cachegen
