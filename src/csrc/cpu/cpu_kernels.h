// The kernels' paths: portable C++, AVX2 and AVX-512. All give the same bytes and the same values; which one runs is
// decided at run time, so that one build serves every machine.
//
// A new path is a kernels_<path>.cpp that defines its CpuKernels, and an entry in cpu_kernels.cpp.

#pragma once

#include <cstdint>
#include <vector>

#include "quantization.h"
#include "rans.h"

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define CACHEGEN_X86 1
#else
#define CACHEGEN_X86 0
#endif

namespace cachegen {

class EscapeKeys;
class Scratch;
struct ByteAnalysisKernels;
struct ComponentBatch;
struct ComponentSource;
struct EncodedStream;
struct Plane;
struct StreamBatch;
struct SynthesisKernels;

// What a path does in its own way. Those of an architecture that this build is not for are null.
struct CpuKernels {
    const char* name;  // of the member of Python's CpuPath

    // Whether this processor and its operating system run it.
    bool (*is_supported)();

    // Fill in the scales of a plane's tokens, and count how often each channel's high part takes each value.
    //
    // counts: [num_channels][32]. Returns the first token that is not finite, or -1.
    int64_t (*measure_plane)(const Plane& plane, Dtype dtype, int64_t num_tokens, uint32_t* counts);

    // Quantize and encode a batch: the same bytes as encode_plane_stream gives. Null, as decode_batch is, where a path
    // keeps no streams in step: they are coded one by one.
    void (*encode_batch)(const StreamBatch& batch, Dtype dtype, Scratch& scratch, EncodedStream* encoded);

    // Decode a batch into the cache, one status per stream: the same as decode_plane_stream gives, whose checks of the
    // parts' sizes the caller has made.
    void (*decode_batch)(const StreamBatch& batch, Dtype dtype, Scratch& scratch, Status* statuses);

    // Encode a stream of components: the same bytes as encode_components (components.h) gives. `escapes` is memory that
    // is kept. Null as encode_batch is.
    void (*encode_components)(const ComponentSource& source, Scratch& scratch, EscapeKeys& escapes,
                              EncodedStream* encoded);

    // Decode a batch of components, one status per stream: the same as decode_components (components.h) gives, whose
    // checks of the parts' sizes the caller has made, but for escapes. Null as decode_batch is.
    void (*decode_components)(const ComponentBatch& batch, Scratch& scratch, Status* statuses);

    // The inverse transform in integers (synthesis.h). Null where a path has none.
    const SynthesisKernels* synthesis;

    // The forward transform in bytes (byte_analysis.h). Null as `synthesis` is.
    const ByteAnalysisKernels* byte_analysis;

    bool takes_batches() const { return encode_batch != nullptr; }
};

// All paths, the slowest first. Their places are the values of Python's CpuPath.
const std::vector<const CpuKernels*>& cpu_paths();

}  // namespace cachegen
