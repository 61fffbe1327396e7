// The streams of the transform: quantized components to bytes and back, on the CPU. component_streams.h has the bytes.

#pragma once

#include <cstdint>
#include <vector>

#include "component_streams.h"
#include "cpu/rans_portable.h"

namespace cachegen {

// How the components of a stream are coded. Component c is coded with tables[table_indices[c]]; the first
// `num_refined` are refined, the others coded anew.
struct ComponentCoding {
    const FrequencyTable* tables = nullptr;
    int64_t num_tables = 0;
    const uint16_t* table_indices = nullptr;
    const uint8_t* low_bits = nullptr;
    int64_t num_components = 0;
    int64_t num_refined = 0;

    PlaneCoding plane_coding() const {
        PlaneCoding coding;
        coding.tables = tables;
        coding.num_tables = num_tables;
        coding.table_indices = table_indices;
        coding.channel_low_bits = low_bits;
        return coding;
    }
};

// Encode one stream.
//
// fine: [num_tokens][fine_stride], this level's components; coarse: [num_tokens][coarse_stride], the level before's,
// of which the first num_refined are read.
inline Status encode_components(const int32_t* fine, int64_t fine_stride, const int32_t* coarse, int64_t coarse_stride,
                                int64_t num_tokens, const ComponentCoding& coding, StreamWorkspace& workspace,
                                std::vector<uint8_t>& output, uint32_t* num_words) {
    const StreamShape shape{num_tokens, coding.num_components};
    const int64_t symbol_stride = shape.num_rows() * kNumLanes;
    workspace.symbols.resize(std::max<size_t>(workspace.symbols.size(), shape.num_channels * symbol_stride));
    std::vector<SymbolRange> ranges(coding.num_tables);
    for (int64_t i = 0; i < coding.num_tables; ++i) ranges[i] = SymbolRange::of(coding.tables[i]);
    std::vector<uint8_t> escapes;
    for (int64_t token = 0; token < num_tokens; ++token) {
        for (int64_t c = 0; c < coding.num_components; ++c) {
            const int32_t value = fine[token * fine_stride + c];
            const ComponentSymbol coded = c < coding.num_refined
                                              ? refinement_symbol(coarse[token * coarse_stride + c], value)
                                              : anew_symbol(value, ranges[coding.table_indices[c]], coding.low_bits[c]);
            if (!coded.is_codable) return Status::kNoFrequency;
            if (coded.is_escape) {
                escapes.resize(escapes.size() + kEscapeBytes);
                uint8_t* escape = escapes.data() + escapes.size() - kEscapeBytes;
                store_u32(escape, static_cast<uint32_t>(token * coding.num_components + c));
                store_u32(escape + 4, static_cast<uint32_t>(value));
            }
            workspace.symbols[c * symbol_stride + token] = static_cast<uint16_t>(coded.symbol);
        }
    }
    output.clear();
    const Status status = encode_stream(workspace.symbols.data(), symbol_stride, shape, coding.plane_coding(),
                                        workspace, output, num_words);
    if (status != Status::kOk || escapes.empty()) return status;
    output.resize(
        bytes_with_escapes(static_cast<int64_t>(output.size()), escapes.size() / kEscapeBytes) - escapes.size(), 0);
    output.insert(output.end(), escapes.begin(), escapes.end());
    return Status::kOk;
}

// Put the escapes of a stream in their places.
inline Status apply_escapes(const uint8_t* bytes, int64_t num_escapes, int64_t num_tokens,
                            const ComponentCoding& coding, int32_t* components, int64_t stride) {
    int64_t place_before = -1;
    for (int64_t i = 0; i < num_escapes; ++i, bytes += kEscapeBytes) {
        const Escape escape{load_u32(bytes), static_cast<int32_t>(load_u32(bytes + 4))};
        if (!escape.is_valid(place_before, num_tokens, static_cast<uint32_t>(coding.num_components),
                             static_cast<uint32_t>(coding.num_refined)))
            return Status::kCorrupt;
        components[escape.place / coding.num_components * stride + escape.place % coding.num_components] =
            escape.component;
        place_before = escape.place;
    }
    return Status::kOk;
}

// Decode one stream into components [num_tokens][stride], whose first num_refined hold the level before's.
//
// Never reads outside the stream. Corrupt bytes give a status, or wrong components: the checksum tells those.
inline Status decode_components(const uint8_t* bytes, int64_t num_bytes, uint32_t num_words, int64_t num_tokens,
                                const ComponentCoding& coding, StreamWorkspace& workspace, int32_t* components,
                                int64_t stride) {
    const StreamShape shape{num_tokens, coding.num_components};
    const PlaneCoding plane_coding = coding.plane_coding();
    const Status built = workspace.low_bits.build(shape, plane_coding);
    if (built != Status::kOk) return built;
    const int64_t words_end = lay_out(shape, plane_coding, workspace.low_bits).words + 2 * int64_t{num_words};
    EscapeList escapes;
    const Status found = escapes.find(words_end, num_bytes);
    if (found != Status::kOk) return found;
    const auto sink = [&](int64_t first, int64_t count, const uint16_t* symbols, int64_t symbol_stride) {
        for (int64_t token = 0; token < num_tokens; ++token) {
            int32_t* const row = components + token * stride;
            for (int64_t c = first; c < first + count; ++c) {
                const int32_t symbol = symbols[(c - first) * symbol_stride + token];
                row[c] = c < coding.num_refined ? refine(row[c], symbol)
                                                : symbol - zero_component_symbol(coding.low_bits[c]);
            }
        }
    };
    const Status status = decode_stream(bytes, words_end, num_words, shape, plane_coding, workspace, sink);
    if (status != Status::kOk) return status;
    return apply_escapes(bytes + escapes.begin, escapes.count, num_tokens, coding, components, stride);
}

}  // namespace cachegen
