// The arithmetic coder of one stream on the CPU: a code per channel, several channels at a time.
//
// Bytes of a stream (docs/format.md, "Coder `ac`"):
//   low bits, to a multiple of 4 | u16 length of every channel's code, to a multiple of 4 | the codes
// The low bits are those of a stream of coder `packed`, and so is the code here that writes and reads them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arithmetic_coder.h"
#include "cpu/rans_portable.h"

namespace cachegen {

inline PlaneCoding low_bits_coding(const PlaneCoding& coding) {
    PlaneCoding low_bits;
    low_bits.low_bits = coding.low_bits;
    return low_bits;
}

// Encode one stream of up to kMaxCodeTokens tokens and append it to `output`; see encode_stream. There are no words.
inline Status encode_arithmetic_stream(const uint16_t* symbols, int64_t symbol_stride, const StreamShape& shape,
                                       const PlaneCoding& coding, StreamWorkspace& workspace,
                                       std::vector<uint8_t>& output, uint32_t* num_words) {
    const Status status =
        encode_stream(symbols, symbol_stride, shape, low_bits_coding(coding), workspace, output, num_words);
    if (status != Status::kOk) return status;
    const size_t lengths_at = output.size();
    output.resize(lengths_at + round_up(kCodeLengthBytes * shape.num_channels, 4), 0);
    const int64_t capacity = max_code_bytes(shape.num_tokens);
    workspace.code.resize(std::max<size_t>(workspace.code.size(), capacity));
    for (int64_t channel = 0; channel < shape.num_channels; ++channel) {
        const FrequencyTable& table = coding.table_of(channel);
        const uint16_t* channel_symbols = symbols + channel * symbol_stride;
        ArithmeticEncoder encoder(workspace.code.data(), capacity);
        for (int64_t token = 0; token < shape.num_tokens; ++token) {
            const uint32_t high = channel_symbols[token] >> coding.low_bits;
            if (high >= kTableSize || table.frequency[high] == 0) return Status::kNoFrequency;
            encoder.encode(table.start[high], table.frequency[high]);
        }
        const int64_t num_bytes = encoder.finish();
        store_u16(&output[lengths_at + kCodeLengthBytes * channel], static_cast<uint32_t>(num_bytes));
        output.insert(output.end(), workspace.code.begin(), workspace.code.begin() + num_bytes);
    }
    return Status::kOk;
}

// Decode `Count` neighbouring channels in step, so that their chains of dependent instructions overlap. Adds the high
// parts to the symbols at tile + i * symbol_stride. Returns whether all codes end as they must.
template <int Count>
bool decode_channels(const uint8_t* code, const uint8_t* lengths, const FrequencyTable* const tables[],
                     int64_t num_tokens, int low_bits, int64_t symbol_stride, uint16_t* tile) {
    ArithmeticDecoder decoders[Count];
    for (int i = 0; i < Count; ++i) {
        const int64_t num_bytes = load_u16(lengths + kCodeLengthBytes * i);
        decoders[i] = ArithmeticDecoder(code, num_bytes);
        code += num_bytes;
    }
    for (int64_t token = 0; token < num_tokens; ++token) {
        for (int i = 0; i < Count; ++i) {
            const int high = decoders[i].decode(*tables[i]);
            tile[i * symbol_stride + token] |= static_cast<uint16_t>(high << low_bits);
        }
    }
    bool is_at_end = true;
    for (const ArithmeticDecoder& decoder : decoders) is_at_end &= decoder.is_at_end();
    return is_at_end;
}

// Decode one stream; see decode_stream.
inline Status decode_arithmetic_stream(const uint8_t* bytes, int64_t num_bytes, uint32_t num_words,
                                       const StreamShape& shape, const PlaneCoding& coding, StreamWorkspace& workspace,
                                       const TileSink& sink) {
    const CodeParts parts = lay_out_codes(shape, coding.low_bits);
    int64_t end = parts.codes;
    if (end > num_bytes) return Status::kTruncated;
    const uint8_t* length = bytes + parts.lengths;
    const uint8_t* code = bytes + end;
    for (int64_t channel = 0; channel < shape.num_channels; ++channel)
        end += load_u16(length + kCodeLengthBytes * channel);
    if (end != num_bytes) return Status::kTruncated;
    if (num_words != 0) return Status::kCorrupt;

    constexpr int kCount = 4;
    bool is_at_end = true;
    const auto add_high_parts = [&](int64_t first, int64_t num_channels, const uint16_t*, int64_t symbol_stride) {
        uint16_t* tile = workspace.symbols.data();  // where decode_stream has put the low bits
        const FrequencyTable* tables[kPortableTile];
        for (int64_t channel = 0; channel < num_channels; ++channel)
            tables[channel] = &coding.table_of(first + channel);
        for (int64_t channel = 0; channel < num_channels;) {
            const bool is_full = channel + kCount <= num_channels;
            const int count = is_full ? kCount : 1;
            const auto decode = is_full ? decode_channels<kCount> : decode_channels<1>;
            is_at_end &= decode(code, length, tables + channel, shape.num_tokens, coding.low_bits, symbol_stride,
                                tile + channel * symbol_stride);
            for (int i = 0; i < count; ++i, length += kCodeLengthBytes) code += load_u16(length);
            channel += count;
        }
        sink(first, num_channels, tile, symbol_stride);
    };
    const Status status =
        decode_stream(bytes, parts.lengths, 0, shape, low_bits_coding(coding), workspace, add_high_parts);
    if (status != Status::kOk) return status;
    return is_at_end ? Status::kOk : Status::kCorrupt;
}

}  // namespace cachegen
