// Portable C++ as a path: one stream at a time.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arithmetic_portable.h"
#include "cpu/cpu_kernels.h"
#include "cpu/planes.h"
#include "cpu/rans_portable.h"
#include "quantization.h"

namespace cachegen {
namespace {

// See CpuKernels::measure_plane.
template <class Dtype>
int64_t measure_values(const Plane& plane, int64_t num_tokens, uint32_t* counts) {
    using Storage = typename Dtype::Storage;
    const auto* values = reinterpret_cast<const Storage*>(plane.values);
    auto* scales = reinterpret_cast<Storage*>(plane.scales);
    const int zero_symbol = zero_symbol_of(plane.num_bins);
    const int low_bits = plane.coding.low_bits;
    for (int64_t token = 0; token < num_tokens; ++token) {
        // Magnitudes order like their bit patterns, and so do infinity and NaN, above all finite ones.
        uint32_t largest = 0;
        for (int64_t head = 0; head < plane.num_heads; ++head) {
            const Storage* row = values + token * plane.token_stride + head * plane.head_stride;
            for (int64_t dim = 0; dim < plane.head_dim; ++dim)
                largest = std::max(largest, bits_of(Dtype::widen(row[dim])) & 0x7FFFFFFFu);
        }
        if (largest >= 0x7F800000u) return token;
        const float scale = float_of(largest);
        scales[token] = Dtype::narrow(scale);  // exact: the scale is one of the values
        const float inverse = inverse_step(scale, zero_symbol);
        uint32_t* channel_counts = counts;
        for (int64_t head = 0; head < plane.num_heads; ++head) {
            const Storage* row = values + token * plane.token_stride + head * plane.head_stride;
            for (int64_t dim = 0; dim < plane.head_dim; ++dim, channel_counts += kTableSize)
                ++channel_counts[quantize(Dtype::widen(row[dim]), inverse, zero_symbol) >> low_bits];
        }
    }
    return -1;
}

// Quantize the tokens of one stream into symbols [num_channels][symbol_stride].
//
// Returns false where a value lies outside its token's scale.
template <class Dtype>
bool quantize_stream(const Plane& plane, const StreamRef& stream, int64_t symbol_stride, uint16_t* symbols) {
    using Storage = typename Dtype::Storage;
    const int zero_symbol = zero_symbol_of(plane.num_bins);
    const auto* scales = reinterpret_cast<const Storage*>(plane.scales);
    bool in_range = true;
    for (int64_t token = 0; token < stream.shape.num_tokens; ++token) {
        const float inverse = inverse_step(Dtype::widen(scales[stream.first_token + token]), zero_symbol);
        const auto* values =
            reinterpret_cast<const Storage*>(plane.values) + (stream.first_token + token) * plane.token_stride;
        uint16_t* symbol = symbols + token;
        for (int64_t head = 0; head < plane.num_heads; ++head) {
            const Storage* row = values + head * plane.head_stride;
            for (int64_t dim = 0; dim < plane.head_dim; ++dim, symbol += symbol_stride) {
                const int quantized = quantize(Dtype::widen(row[dim]), inverse, zero_symbol);
                in_range &= quantized >= 0 && quantized <= 2 * zero_symbol;
                *symbol = static_cast<uint16_t>(quantized);
            }
        }
    }
    return in_range;
}

template <class Dtype>
Status encode_values(const Plane& plane, StreamRef& stream, StreamWorkspace& workspace, std::vector<uint8_t>& output) {
    const int64_t symbol_stride = stream.shape.num_rows() * kNumLanes;
    workspace.symbols.resize(std::max<size_t>(workspace.symbols.size(), stream.shape.num_channels * symbol_stride));
    if (!quantize_stream<Dtype>(plane, stream, symbol_stride, workspace.symbols.data())) return Status::kNotFinite;
    const auto encode = plane.coding.is_arithmetic ? encode_arithmetic_stream : encode_stream;
    const Status status = encode(workspace.symbols.data(), symbol_stride, stream.shape, plane.coding, workspace, output,
                                 &stream.num_words);
    stream.num_bytes = static_cast<uint32_t>(output.size());
    return status;
}

template <class Dtype>
Status decode_values(const Plane& plane, const StreamRef& stream, const uint8_t* payload, StreamWorkspace& workspace) {
    using Storage = typename Dtype::Storage;
    const int zero_symbol = zero_symbol_of(plane.num_bins);
    // Levels of every symbol that bits can spell, so that corrupt streams stay inside the table.
    std::vector<float>& levels = workspace.levels;
    levels.resize(size_t{kTableSize} << plane.coding.low_bits);
    for (size_t symbol = 0; symbol < levels.size(); ++symbol)
        levels[symbol] = level_of(static_cast<int>(symbol), zero_symbol);
    const auto* scales = reinterpret_cast<const Storage*>(plane.scales) + stream.first_token;
    auto* values = reinterpret_cast<Storage*>(plane.values) + stream.first_token * plane.token_stride;
    // Each token's values, where it has more channels than levels.
    const int64_t num_levels = static_cast<int64_t>(levels.size());
    const bool has_tables = num_levels <= stream.shape.num_channels / 2;
    if (has_tables)
        workspace.values.resize(std::max<size_t>(workspace.values.size(), stream.shape.num_tokens * num_levels));
    auto* const tables = reinterpret_cast<Storage*>(workspace.values.data());
    for (int64_t token = 0; has_tables && token < stream.shape.num_tokens; ++token) {
        const float scale = Dtype::widen(scales[token]);
        for (int64_t symbol = 0; symbol < num_levels; ++symbol)
            tables[token * num_levels + symbol] = Dtype::narrow(levels[symbol] * scale);
    }
    const auto dequantize = [&](int64_t first_channel, int64_t num_channels, const uint16_t* symbols,
                                int64_t symbol_stride) {
        // Head by head: the channels of one are contiguous.
        for (int64_t done = 0, count; done < num_channels; done += count) {
            const int64_t head = (first_channel + done) / plane.head_dim, dim = (first_channel + done) % plane.head_dim;
            count = std::min(num_channels - done, plane.head_dim - dim);
            Storage* row = values + head * plane.head_stride + dim;
            const uint16_t* symbol = symbols + done * symbol_stride;
            for (int64_t token = 0; token < stream.shape.num_tokens; ++token, ++symbol, row += plane.token_stride) {
                if (has_tables) {
                    const Storage* const table = tables + token * num_levels;
                    for (int64_t i = 0; i < count; ++i) row[i] = table[symbol[i * symbol_stride]];
                } else {
                    const float scale = Dtype::widen(scales[token]);
                    for (int64_t i = 0; i < count; ++i)
                        row[i] = Dtype::narrow(levels[symbol[i * symbol_stride]] * scale);
                }
            }
        }
    };
    const uint8_t* bytes = payload + stream.offset;
    if (plane.coding.is_arithmetic)
        return decode_arithmetic_stream(bytes, stream.num_bytes, stream.num_words, stream.shape, plane.coding,
                                        workspace, dequantize);
    return decode_stream(bytes, stream.num_bytes, stream.num_words, stream.shape, plane.coding, workspace, dequantize);
}

int64_t measure_plane(const Plane& plane, Dtype dtype, int64_t num_tokens, uint32_t* counts) {
    int64_t bad_token = -1;
    with_dtype(dtype, [&](auto tag) { bad_token = measure_values<decltype(tag)>(plane, num_tokens, counts); });
    return bad_token;
}

}  // namespace

Status encode_plane_stream(const Plane& plane, Dtype dtype, StreamRef& stream, StreamWorkspace& workspace,
                           std::vector<uint8_t>& output) {
    Status status = Status::kOk;
    with_dtype(dtype, [&](auto tag) { status = encode_values<decltype(tag)>(plane, stream, workspace, output); });
    return status;
}

Status decode_plane_stream(const Plane& plane, Dtype dtype, const StreamRef& stream, const uint8_t* payload,
                           StreamWorkspace& workspace) {
    Status status = Status::kOk;
    with_dtype(dtype, [&](auto tag) { status = decode_values<decltype(tag)>(plane, stream, payload, workspace); });
    return status;
}

extern const CpuKernels kPortableKernels;
const CpuKernels kPortableKernels = {
    "PORTABLE", [] { return true; }, measure_plane, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace cachegen
