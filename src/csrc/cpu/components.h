// The streams of the transform: quantized components to bytes and back, on the CPU.
//
// A stream holds some tokens of one group of layers at one level. Components that the level before coded are refined
// by one of three symbols each; the others are coded anew, as a table-coded high part and raw low bits, with a list of
// escapes for what no symbol stands for. docs/format.md, "Streams of components", has the bytes:
//   states | low bits, to a multiple of 4 | words, to a multiple of 4 | escapes

#pragma once

#include <cstdint>
#include <vector>

#include "cpu/rans_portable.h"

namespace cachegen {

constexpr int kLevelRatio = 3;              // the step of a level over that of the next
constexpr int32_t kMaxComponent = 1 << 24;  // magnitude of a component, in steps of the level that codes it anew
constexpr int kEscapeBytes = 8;             // u32 place in the stream, token after token; i32 component

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

// The symbol of a component of zero: the middle of the middle high part.
inline int32_t zero_component_symbol(int low_bits) { return (kTableSize / 2 << low_bits) + ((1 << low_bits) >> 1); }

// A refinement says which third of the coarse cell it is, mirrored for negative ones: 0 towards zero, 2 away from it.
inline int32_t refine(int32_t coarse, int32_t symbol) {
    return kLevelRatio * coarse + (coarse < 0 ? 1 - symbol : symbol - 1);
}

inline int32_t refinement_symbol(int32_t coarse, int32_t fine) {
    const int32_t third = fine - kLevelRatio * coarse;
    return 1 + (coarse < 0 ? -third : third);
}

// The nearest symbol that the table gives a frequency.
inline int32_t clamp_symbol(int32_t symbol, const FrequencyTable& table, int low_bits) {
    int first = 0, last = kTableSize - 1;
    while (table.frequency[first] == 0) ++first;
    while (table.frequency[last] == 0) --last;
    return std::min(std::max(symbol, first << low_bits), (last << low_bits) + ((1 << low_bits) - 1));
}

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
    std::vector<uint8_t> escapes;
    for (int64_t token = 0; token < num_tokens; ++token) {
        for (int64_t c = 0; c < coding.num_components; ++c) {
            const int32_t value = fine[token * fine_stride + c];
            int32_t symbol;
            if (c < coding.num_refined) {
                symbol = refinement_symbol(coarse[token * coarse_stride + c], value);
                if (symbol < 0 || symbol >= kLevelRatio) return Status::kNoFrequency;
            } else {
                if (value < -kMaxComponent || value > kMaxComponent) return Status::kNoFrequency;
                const int low_bits = coding.low_bits[c];
                const int32_t wanted = value + zero_component_symbol(low_bits);
                symbol = clamp_symbol(wanted, coding.tables[coding.table_indices[c]], low_bits);
                if (symbol != wanted) {
                    escapes.resize(escapes.size() + kEscapeBytes);
                    uint8_t* escape = escapes.data() + escapes.size() - kEscapeBytes;
                    store_u32(escape, static_cast<uint32_t>(token * coding.num_components + c));
                    store_u32(escape + 4, static_cast<uint32_t>(value));
                }
            }
            workspace.symbols[c * symbol_stride + token] = static_cast<uint16_t>(symbol);
        }
    }
    output.clear();
    const Status status = encode_stream(workspace.symbols.data(), symbol_stride, shape, coding.plane_coding(),
                                        workspace, output, num_words);
    if (status != Status::kOk || escapes.empty()) return status;
    output.resize(round_up(static_cast<int64_t>(output.size()), 4), 0);
    output.insert(output.end(), escapes.begin(), escapes.end());
    return Status::kOk;
}

// Put the escapes of a stream in their places: ascending, of components coded anew, within bounds.
inline Status apply_escapes(const uint8_t* bytes, int64_t num_escapes, int64_t num_tokens,
                            const ComponentCoding& coding, int32_t* components, int64_t stride) {
    int64_t previous = -1;
    for (int64_t i = 0; i < num_escapes; ++i) {
        const int64_t place = load_u32(bytes + kEscapeBytes * i);
        const int32_t value = static_cast<int32_t>(load_u32(bytes + kEscapeBytes * i + 4));
        if (place <= previous || place >= num_tokens * coding.num_components) return Status::kCorrupt;
        const int64_t c = place % coding.num_components;
        if (c < coding.num_refined || value < -kMaxComponent || value > kMaxComponent) return Status::kCorrupt;
        components[place / coding.num_components * stride + c] = value;
        previous = place;
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
    const Status built = workspace.bands.build(shape, plane_coding, nullptr);
    if (built != Status::kOk) return built;
    const int64_t words_end = lay_out(shape, plane_coding, workspace.bands).words + 2 * int64_t{num_words};
    if (words_end > num_bytes) return Status::kTruncated;
    const int64_t escapes_at = round_up(words_end, 4);
    const bool has_escapes = num_bytes > words_end;
    if (has_escapes && (num_bytes <= escapes_at || (num_bytes - escapes_at) % kEscapeBytes)) return Status::kCorrupt;
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
    if (status != Status::kOk || !has_escapes) return status;
    return apply_escapes(bytes + escapes_at, (num_bytes - escapes_at) / kEscapeBytes, num_tokens, coding, components,
                         stride);
}

}  // namespace cachegen
