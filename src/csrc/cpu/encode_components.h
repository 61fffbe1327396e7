// Encoding the components of a group of layers at one level, on the CPU.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/component_source.h"
#include "cpu/components.h"
#include "cpu/cpu_kernels.h"
#include "cpu/decode_components.h"
#include "cpu/encode_planes.h"
#include "cpu/parallel.h"

namespace cachegen {

// Encode one stream in portable C++.
inline void encode_portably(const ComponentSource& source, StreamWorkspace& workspace, EncodedStream* encoded) {
    thread_local std::vector<uint8_t> output;
    encoded->status =
        encode_components(source.fine, source.fine_stride, source.coarse, source.coarse_stride, source.shape.num_tokens,
                          *source.coding, workspace, output, &encoded->num_words);
    if (encoded->status != Status::kOk) return;
    std::memcpy(encoded->allocate(static_cast<int64_t>(output.size())), output.data(), output.size());
}

// Encode the components of one group; `coarse` has the level before's.
inline EncodedStreams encode_components(const ComponentRows<const int32_t>& fine,
                                        const ComponentRows<const int32_t>& coarse, const ComponentCoding& coding,
                                        int64_t tokens_per_stream, const CpuKernels& kernels, int num_threads) {
    const int64_t num_streams = (fine.num_tokens + tokens_per_stream - 1) / tokens_per_stream;
    EncodedStreams result;
    result.streams.resize(num_streams);
    result.checksums.resize(num_streams);
    std::vector<SymbolRange> ranges(coding.num_tables);
    for (int64_t i = 0; i < coding.num_tables; ++i) ranges[i] = SymbolRange::of(coding.tables[i]);
    parallel_for(num_streams, num_threads, [&](int64_t i) {
        // Kept from call to call, as in decode_planes.
        thread_local ComponentWorkspace workspace;
        thread_local EscapeKeys escapes;
        const int64_t first = i * tokens_per_stream;
        ComponentSource source;
        source.fine = fine.values + first * fine.stride;
        source.fine_stride = fine.stride;
        source.coarse = coarse.values + first * coarse.stride;
        source.coarse_stride = coarse.stride;
        source.shape = {std::min(tokens_per_stream, fine.num_tokens - first), coding.num_components};
        source.coding = &coding;
        source.ranges = ranges.data();
        EncodedStream& encoded = result.streams[i];
        if (kernels.encode_components == nullptr || source.shape.num_rows() > kMaxBatchRows) {
            encode_portably(source, workspace.portable, &encoded);
        } else {
            LowBits& low_bits = workspace.low_bits[0];
            encoded.status = low_bits.build(source.shape, coding.plane_coding());
            source.low_bits_layout = &low_bits;
            if (encoded.status == Status::kOk) kernels.encode_components(source, workspace.scratch, escapes, &encoded);
        }
        // While the bytes are in the cache.
        result.checksums[i] = checksum(encoded.bytes.get(), encoded.padded_bytes());
    });
    return result;
}

}  // namespace cachegen
