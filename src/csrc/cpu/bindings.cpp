// The CPU kernels as the Python module cachegen._native.
//
// No torch here: tensors arrive as addresses, strides and sizes, and cachegen/coder/cpu.py makes every check. The
// interpreter lock is released while the kernels run.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/components.h"
#include "cpu/cpu_path.h"
#include "cpu/decode_planes.h"
#include "cpu/encode_planes.h"
#include "cpu/planes.h"
#include "frequency_tables.h"

namespace py = pybind11;

namespace cachegen {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;

template <class Work>
void with_known_dtype(int dtype, Work&& work) {
    if (!with_dtype(static_cast<Dtype>(dtype), work)) throw py::value_error("unknown dtype " + std::to_string(dtype));
}

// Move a vector's memory into a NumPy array without a copy.
template <class Value>
py::array_t<Value> to_array(std::vector<Value>&& values) {
    auto owner = std::make_unique<std::vector<Value>>(std::move(values));
    std::vector<Value>* raw = owner.release();
    py::capsule capsule(raw, [](void* pointer) { delete static_cast<std::vector<Value>*>(pointer); });
    return py::array_t<Value>(static_cast<py::ssize_t>(raw->size()), raw->data(), capsule);
}

// The frequency tables of a document's planes, kept in native memory.
class TableSet {
  public:
    // frequencies: uint16 [num_tables, 32], each row summing to 4096.
    static TableSet from_frequencies(py::array_t<uint16_t, py::array::c_style> frequencies) {
        if (frequencies.ndim() != 2 || frequencies.shape(1) != kTableSize)
            throw py::value_error("frequencies must be [num_tables, 32]");
        TableSet set(frequencies.shape(0));
        for (int64_t index = 0; index < set.num_tables(); ++index) {
            uint32_t start = 0;
            for (int symbol = 0; symbol < kTableSize; ++symbol) {
                const uint16_t frequency = frequencies.at(index, symbol);
                set.tables_[index].start[symbol] = static_cast<uint16_t>(start);
                set.tables_[index].frequency[symbol] = frequency;
                start += frequency;
            }
            if (start != kFrequencyTotal) throw py::value_error("the frequencies of a table must sum to 4096");
            set.traits_[index] = traits_of(set.tables_[index]);
        }
        return set;
    }

    // Parse the compact form: plane after plane, plane_bytes[i] bytes for plane_channels[i] tables of alphabet_sizes[i]
    // symbols. Raises ValueError with the plane's index.
    static TableSet parse(Bytes bytes, std::vector<int64_t> plane_bytes, std::vector<int64_t> plane_channels,
                          std::vector<int> alphabet_sizes, int num_threads) {
        const size_t num_planes = plane_bytes.size();
        if (plane_channels.size() != num_planes || alphabet_sizes.size() != num_planes)
            throw py::value_error("one size, channel count and alphabet per plane are expected");
        std::vector<int64_t> offsets(num_planes + 1, 0), first_tables(num_planes + 1, 0);
        for (size_t plane = 0; plane < num_planes; ++plane) {
            offsets[plane + 1] = offsets[plane] + plane_bytes[plane];
            first_tables[plane + 1] = first_tables[plane] + plane_channels[plane];
            // Before memory is reserved for the tables: a corrupt header may claim millions.
            if (plane_bytes[plane] < 0 || plane_channels[plane] < 0 ||
                plane_channels[plane] * kMinTableBits > 8 * plane_bytes[plane])
                throw py::value_error("plane " + std::to_string(plane));
        }
        if (offsets[num_planes] != bytes.size()) throw py::value_error("the tables' sizes do not add up");
        TableSet set(first_tables[num_planes]);
        std::vector<char> good(num_planes, 0);
        {
            const uint8_t* data = bytes.data();
            py::gil_scoped_release release;
            parallel_for(static_cast<int64_t>(num_planes), num_threads, [&](int64_t plane) {
                good[plane] = read_tables(data + offsets[plane], plane_bytes[plane], plane_channels[plane],
                                          alphabet_sizes[plane], &set.tables_[first_tables[plane]]);
                for (int64_t index = first_tables[plane]; index < first_tables[plane + 1]; ++index)
                    set.traits_[index] = traits_of(set.tables_[index]);
            });
        }
        for (size_t plane = 0; plane < num_planes; ++plane)
            if (!good[plane]) throw py::value_error("plane " + std::to_string(plane));
        return set;
    }

    int64_t num_tables() const { return static_cast<int64_t>(tables_.size()); }
    const FrequencyTable* data() const { return tables_.data(); }
    const uint8_t* traits() const { return traits_.data(); }

    py::array_t<uint16_t> frequencies() const {
        py::array_t<uint16_t> result({num_tables(), int64_t{kTableSize}});
        for (int64_t index = 0; index < num_tables(); ++index)
            std::memcpy(result.mutable_data(index, 0), tables_[index].frequency, sizeof tables_[index].frequency);
        return result;
    }

  private:
    explicit TableSet(int64_t num_tables) : tables_(num_tables), traits_(num_tables) {}
    std::vector<FrequencyTable> tables_;
    std::vector<uint8_t> traits_;  // of each table, see TableTraits
};

// Point a plane at its tables; null tables mean coder `packed`. The caller keeps the set and the arrays alive.
void set_tables(Plane& plane, const TableSet* tables, int64_t first_table, int64_t num_tables) {
    if (tables == nullptr) {
        plane.coding.tables = nullptr;
        plane.coding.num_tables = 0;
        return;
    }
    if (first_table < 0 || num_tables < plane.num_channels() || first_table + num_tables > tables->num_tables())
        throw py::value_error("the plane's tables lie outside the table set");
    plane.coding.tables = tables->data() + first_table;
    plane.coding.table_traits = tables->traits() + first_table;
    plane.coding.num_tables = num_tables;
}

// Make coder `ac` of `rans`, or refuse.
void set_arithmetic(PlaneCoding& coding, bool is_arithmetic, int64_t num_tokens) {
    if (is_arithmetic && (coding.tables == nullptr || num_tokens > kMaxCodeTokens))
        throw py::value_error("coder ac takes tables and at most 16384 tokens");
    coding.is_arithmetic = is_arithmetic;
}

// The compact tables of planes, made from symbol counts uint32 [sum of channels, 32]: a bytes object per plane.
py::list pack_tables(py::array_t<uint32_t, py::array::c_style> counts, std::vector<int64_t> plane_channels,
                     int num_threads) {
    if (counts.ndim() != 2 || counts.shape(1) != kTableSize) throw py::value_error("counts must be [num_tables, 32]");
    const size_t num_planes = plane_channels.size();
    std::vector<int64_t> first_rows(num_planes + 1, 0);
    for (size_t i = 0; i < num_planes; ++i) first_rows[i + 1] = first_rows[i] + plane_channels[i];
    if (first_rows.back() != counts.shape(0)) throw py::value_error("one row of counts per channel is expected");
    std::vector<std::vector<uint8_t>> packed(num_planes);
    std::vector<char> good(num_planes, 0);
    {
        const uint32_t* rows = counts.data();
        py::gil_scoped_release release;
        parallel_for(static_cast<int64_t>(num_planes), num_threads, [&](int64_t i) {
            good[i] = write_tables(rows + first_rows[i] * kTableSize, plane_channels[i], &packed[i]);
        });
    }
    py::list result;
    for (size_t i = 0; i < num_planes; ++i) {
        if (!good[i]) throw py::value_error("a channel of plane " + std::to_string(i) + " has no symbols, or too many");
        result.append(py::bytes(reinterpret_cast<const char*>(packed[i].data()), packed[i].size()));
    }
    return result;
}

void require_supported(CpuPath path) {
    if (!supports(path)) throw py::value_error("this processor does not support the path");
}

struct StreamFailure {
    int64_t index = -1;
    Status status = Status::kOk;
};

StreamFailure first_failure(const std::vector<Status>& statuses) {
    for (size_t i = 0; i < statuses.size(); ++i)
        if (statuses[i] != Status::kOk) return {static_cast<int64_t>(i), statuses[i]};
    return {};
}

// Fill the planes' scales and count symbols. Returns (counts uint32 [sum of channels, 32], plane, token), the last two
// naming the first token that is not finite, or -1.
py::tuple measure(const std::vector<Plane>& planes, int dtype, int64_t num_tokens, int num_threads, CpuPath path) {
    require_supported(path);
    std::vector<int64_t> first_rows(planes.size() + 1, 0);
    for (size_t i = 0; i < planes.size(); ++i) first_rows[i + 1] = first_rows[i] + planes[i].num_channels();
    std::vector<uint32_t> counts(first_rows.back() * kTableSize, 0);
    std::vector<int64_t> bad_tokens(planes.size(), -1);
    {
        py::gil_scoped_release release;
        with_known_dtype(dtype, [&](auto tag) {
            parallel_for(static_cast<int64_t>(planes.size()), num_threads, [&](int64_t i) {
                uint32_t* const plane_counts = &counts[first_rows[i] * kTableSize];
#if CACHEGEN_X86
                if (path != CpuPath::kPortable) {
                    const auto measure = path == CpuPath::kAvx512 ? measure_plane_avx512 : measure_plane_avx2;
                    bad_tokens[i] = measure(planes[i], decltype(tag)::kDtype, num_tokens, plane_counts);
                    return;
                }
#endif
                bad_tokens[i] = measure_plane<decltype(tag)>(planes[i], num_tokens, plane_counts);
            });
        });
    }
    py::ssize_t bad_plane = -1;
    for (size_t i = 0; i < planes.size() && bad_plane < 0; ++i)
        if (bad_tokens[i] >= 0) bad_plane = static_cast<py::ssize_t>(i);
    return py::make_tuple(to_array(std::move(counts)), bad_plane, bad_plane < 0 ? -1 : bad_tokens[bad_plane]);
}

// Memory for a NumPy array that is about to be filled: a vector would be filled with zeros first.
Bytes uninitialized_array(int64_t num_bytes, uint8_t** data) {
    *data = new uint8_t[num_bytes];
    py::capsule owner(*data, [](void* pointer) { delete[] static_cast<uint8_t*>(pointer); });
    return Bytes(num_bytes, *data, owner);
}

// Quantize and encode all planes. Returns (payload uint8, index uint32 [num_streams, 3] of bytes, words and CRC-32C,
// failed stream, status).
py::tuple encode(const std::vector<Plane>& planes, int dtype, int64_t num_tokens, int num_threads, CpuPath path) {
    require_supported(path);
    const std::vector<StreamRef> streams = list_streams(planes, num_tokens);
    EncodedStreams encoded;
    {
        py::gil_scoped_release release;
        with_known_dtype(dtype,
                         [&](auto tag) { encoded = encode_planes<decltype(tag)>(planes, streams, path, num_threads); });
    }
    std::vector<uint32_t> index(3 * streams.size());
    std::vector<int64_t> offsets(streams.size() + 1, 0);
    StreamFailure failure;
    for (size_t i = 0; i < streams.size(); ++i) {
        const EncodedStream& stream = encoded.streams[i];
        index[3 * i] = static_cast<uint32_t>(stream.num_bytes);
        index[3 * i + 1] = stream.num_words;
        index[3 * i + 2] = encoded.checksums[i];
        offsets[i + 1] = offsets[i] + stream.padded_bytes();
        if (failure.index < 0 && stream.status != Status::kOk) failure = {static_cast<int64_t>(i), stream.status};
    }
    uint8_t* payload = nullptr;
    Bytes result = uninitialized_array(offsets.back(), &payload);
    {
        py::gil_scoped_release release;
        parallel_for(static_cast<int64_t>(streams.size()), num_threads, [&](int64_t i) {
            if (encoded.streams[i].bytes)
                std::memcpy(payload + offsets[i], encoded.streams[i].bytes.get(), encoded.streams[i].padded_bytes());
            encoded.streams[i].bytes.reset();
        });
    }
    return py::make_tuple(
        result, to_array(std::move(index)).reshape({static_cast<py::ssize_t>(streams.size()), py::ssize_t{3}}),
        failure.index, static_cast<int>(failure.status));
}

// Decode all planes from a payload, which must hold the streams of `index` at multiples of 16 bytes.
// Returns (failed stream, status).
py::tuple decode(const std::vector<Plane>& planes, int dtype, int64_t num_tokens, Bytes payload,
                 py::array_t<uint32_t, py::array::c_style> index, int num_threads, CpuPath path) {
    require_supported(path);
    std::vector<StreamRef> streams = list_streams(planes, num_tokens);
    const int64_t num_streams = static_cast<int64_t>(streams.size());
    if (index.ndim() != 2 || index.shape(0) != num_streams || index.shape(1) != 3)
        throw py::value_error("the index must have one row of three per stream");
    int64_t offset = 0;
    for (int64_t i = 0; i < num_streams; ++i) {
        streams[i].offset = offset;
        streams[i].num_bytes = index.at(i, 0);
        streams[i].num_words = index.at(i, 1);
        offset += round_up(streams[i].num_bytes, kStreamAlignment);
    }
    if (offset != payload.size()) throw py::value_error("the payload is not as long as its streams");
    std::vector<Status> statuses(streams.size(), Status::kOk);
    {
        const uint8_t* bytes = payload.data();
        py::gil_scoped_release release;
        with_known_dtype(dtype, [&](auto tag) {
            decode_planes<decltype(tag)>(planes, streams, num_tokens, bytes, payload.size(), path, num_threads,
                                         statuses);
        });
    }
    const StreamFailure failure = first_failure(statuses);
    return py::make_tuple(failure.index, static_cast<int>(failure.status));
}

// The checksums of the streams of a payload: uint32 [num_streams].
py::array_t<uint32_t> checksum_streams(Bytes payload, py::array_t<uint32_t, py::array::c_style> index,
                                       int num_threads) {
    const int64_t num_streams = index.shape(0);
    std::vector<int64_t> offsets(num_streams + 1, 0);
    for (int64_t i = 0; i < num_streams; ++i) offsets[i + 1] = offsets[i] + round_up(index.at(i, 0), kStreamAlignment);
    if (offsets.back() != payload.size()) throw py::value_error("the payload is not as long as its streams");
    std::vector<uint32_t> checksums(num_streams);
    {
        const uint8_t* bytes = payload.data();
        py::gil_scoped_release release;
        parallel_for(num_streams, num_threads,
                     [&](int64_t i) { checksums[i] = checksum(bytes + offsets[i], offsets[i + 1] - offsets[i]); });
    }
    return to_array(std::move(checksums));
}

using TableIndices = std::optional<py::array_t<uint16_t, py::array::c_style>>;

// The arrays must outlive the coding.
PlaneCoding make_coding(const TableSet* tables, int low_bits, const TableIndices& table_indices,
                        const StreamShape& shape) {
    if (low_bits < 0 || low_bits > kMaxLowBits) throw py::value_error("low_bits is out of range");
    PlaneCoding coding;
    coding.low_bits = low_bits;
    if (tables != nullptr) {
        coding.tables = tables->data();
        coding.num_tables = tables->num_tables();
    }
    if (table_indices.has_value()) {
        if (table_indices->size() != shape.num_channels)
            throw py::value_error("one table index per channel is expected");
        for (int64_t channel = 0; channel < shape.num_channels; ++channel)
            if (table_indices->at(channel) >= coding.num_tables) throw py::value_error("a table index is out of range");
        coding.table_indices = table_indices->data();
    } else if (tables != nullptr && coding.num_tables < shape.num_channels) {
        throw py::value_error("one table per channel is expected");
    }
    return coding;
}

// Encode one stream of symbols uint16 [num_channels, num_tokens]; see coder/cpu.py. Returns (bytes, words, status).
py::tuple encode_symbols(py::array_t<uint16_t, py::array::c_style> symbols, const TableSet* tables, int low_bits,
                         const TableIndices& table_indices, bool is_arithmetic) {
    const StreamShape shape{symbols.shape(1), symbols.shape(0)};
    PlaneCoding coding = make_coding(tables, low_bits, table_indices, shape);
    set_arithmetic(coding, is_arithmetic, shape.num_tokens);
    const int64_t symbol_stride = shape.num_rows() * kNumLanes;
    std::vector<uint16_t> padded(shape.num_channels * symbol_stride, 0);
    for (int64_t channel = 0; channel < shape.num_channels; ++channel)
        std::memcpy(&padded[channel * symbol_stride], symbols.data(channel, 0), 2 * shape.num_tokens);
    StreamWorkspace workspace;
    std::vector<uint8_t> output;
    uint32_t num_words = 0;
    const auto encode = is_arithmetic ? encode_arithmetic_stream : encode_stream;
    const Status status = encode(padded.data(), symbol_stride, shape, coding, workspace, output, &num_words);
    return py::make_tuple(py::bytes(reinterpret_cast<const char*>(output.data()), output.size()), num_words,
                          static_cast<int>(status));
}

// The inverse of encode_symbols. Returns (symbols uint16 [num_channels, num_tokens], status).
py::tuple decode_symbols(Bytes bytes, uint32_t num_words, int64_t num_tokens, int64_t num_channels,
                         const TableSet* tables, int low_bits, const TableIndices& table_indices, bool is_arithmetic) {
    const StreamShape shape{num_tokens, num_channels};
    PlaneCoding coding = make_coding(tables, low_bits, table_indices, shape);
    set_arithmetic(coding, is_arithmetic, num_tokens);
    py::array_t<uint16_t> symbols({num_channels, num_tokens});
    StreamWorkspace workspace;
    const auto copy = [&](int64_t first_channel, int64_t count, const uint16_t* tile, int64_t symbol_stride) {
        for (int64_t channel = 0; channel < count; ++channel)
            std::memcpy(symbols.mutable_data(first_channel + channel, 0), tile + channel * symbol_stride,
                        2 * num_tokens);
    };
    const Status status =
        is_arithmetic ? decode_arithmetic_stream(bytes.data(), bytes.size(), num_words, shape, coding, workspace, copy)
                      : decode_stream(bytes.data(), bytes.size(), num_words, shape, coding, workspace, copy);
    return py::make_tuple(symbols, static_cast<int>(status));
}

// The coding of components by arrays that must outlive it: table indices uint16 and low bits uint8, one per component.
ComponentCoding make_component_coding(const TableSet& tables,
                                      const py::array_t<uint16_t, py::array::c_style>& table_indices,
                                      const Bytes& low_bits, int64_t num_refined, int64_t tokens_per_stream) {
    ComponentCoding coding;
    coding.tables = tables.data();
    coding.num_tables = tables.num_tables();
    coding.table_indices = table_indices.data();
    coding.low_bits = low_bits.data();
    coding.num_components = table_indices.size();
    coding.num_refined = num_refined;
    if (low_bits.size() != coding.num_components) throw py::value_error("one number of low bits per component");
    if (num_refined < 0 || num_refined > coding.num_components) throw py::value_error("num_refined is out of range");
    if (tokens_per_stream < 1 || tokens_per_stream % kNumLanes != 0 ||
        tokens_per_stream * std::max<int64_t>(coding.num_components, 1) > int64_t{UINT32_MAX})
        throw py::value_error("tokens_per_stream is out of range");
    for (int64_t c = 0; c < coding.num_components; ++c) {
        if (coding.table_indices[c] >= coding.num_tables) throw py::value_error("a table index is out of range");
        if (coding.low_bits[c] > (c < num_refined ? 0 : kMaxLowBits)) throw py::value_error("low_bits out of range");
    }
    return coding;
}

using Components = py::array_t<int32_t, py::array::c_style>;

// Encode the components of one group of layers at one level: fine int32 [num_tokens, num_components], coarse int32
// [num_tokens, >= num_refined]. Returns (payload uint8, index uint32 [num_streams, 3], failed stream, status).
py::tuple encode_components_of(const Components& fine, const Components& coarse, const TableSet& tables,
                               const py::array_t<uint16_t, py::array::c_style>& table_indices, const Bytes& low_bits,
                               int64_t num_refined, int64_t tokens_per_stream, int num_threads) {
    const ComponentCoding coding =
        make_component_coding(tables, table_indices, low_bits, num_refined, tokens_per_stream);
    const int64_t num_tokens = fine.shape(0);
    if (fine.ndim() != 2 || fine.shape(1) != coding.num_components) throw py::value_error("fine has another shape");
    if (coarse.ndim() != 2 || coarse.shape(0) != num_tokens || coarse.shape(1) < num_refined)
        throw py::value_error("coarse has another shape");
    const int64_t num_streams = (num_tokens + tokens_per_stream - 1) / tokens_per_stream;
    std::vector<std::vector<uint8_t>> outputs(num_streams);
    std::vector<uint32_t> index(3 * num_streams);
    std::vector<Status> statuses(num_streams, Status::kOk);
    {
        const int32_t* const fine_data = fine.data();
        const int32_t* const coarse_data = coarse.data();
        const int64_t fine_stride = fine.shape(1), coarse_stride = coarse.shape(1);
        py::gil_scoped_release release;
        parallel_for(num_streams, num_threads, [&](int64_t i) {
            thread_local StreamWorkspace workspace;
            const int64_t first = i * tokens_per_stream;
            const int64_t count = std::min(tokens_per_stream, num_tokens - first);
            std::vector<uint8_t>& output = outputs[i];
            statuses[i] =
                encode_components(fine_data + first * fine_stride, fine_stride, coarse_data + first * coarse_stride,
                                  coarse_stride, count, coding, workspace, output, &index[3 * i + 1]);
            index[3 * i] = static_cast<uint32_t>(output.size());
            output.resize(round_up(static_cast<int64_t>(output.size()), kStreamAlignment), 0);
            index[3 * i + 2] = checksum(output.data(), output.size());
        });
    }
    int64_t total = 0;
    for (const auto& output : outputs) total += static_cast<int64_t>(output.size());
    uint8_t* payload = nullptr;
    Bytes result = uninitialized_array(total, &payload);
    for (const auto& output : outputs) {
        if (!output.empty()) std::memcpy(payload, output.data(), output.size());
        payload += output.size();
    }
    const StreamFailure failure = first_failure(statuses);
    return py::make_tuple(result,
                          to_array(std::move(index)).reshape({static_cast<py::ssize_t>(num_streams), py::ssize_t{3}}),
                          failure.index, static_cast<int>(failure.status));
}

// The inverse: decode into components int32 [num_tokens, >= num_components], whose first num_refined columns hold the
// level before's. Returns (failed stream, status).
py::tuple decode_components_of(const Bytes& payload, const py::array_t<uint32_t, py::array::c_style>& index,
                               Components components, const TableSet& tables,
                               const py::array_t<uint16_t, py::array::c_style>& table_indices, const Bytes& low_bits,
                               int64_t num_refined, int64_t tokens_per_stream, int num_threads) {
    const ComponentCoding coding =
        make_component_coding(tables, table_indices, low_bits, num_refined, tokens_per_stream);
    if (components.ndim() != 2 || components.shape(1) < coding.num_components)
        throw py::value_error("components has another shape");
    const int64_t num_tokens = components.shape(0);
    const int64_t num_streams = (num_tokens + tokens_per_stream - 1) / tokens_per_stream;
    if (index.ndim() != 2 || index.shape(0) != num_streams || index.shape(1) != 3)
        throw py::value_error("the index must have one row of three per stream");
    std::vector<int64_t> offsets(num_streams + 1, 0);
    for (int64_t i = 0; i < num_streams; ++i) offsets[i + 1] = offsets[i] + round_up(index.at(i, 0), kStreamAlignment);
    if (offsets.back() != payload.size()) throw py::value_error("the payload is not as long as its streams");
    std::vector<Status> statuses(num_streams, Status::kOk);
    {
        const uint8_t* const bytes = payload.data();
        const uint32_t* const records = index.data();
        int32_t* const data = components.mutable_data();
        const int64_t stride = components.shape(1);
        py::gil_scoped_release release;
        parallel_for(num_streams, num_threads, [&](int64_t i) {
            thread_local StreamWorkspace workspace;
            const int64_t first = i * tokens_per_stream;
            statuses[i] = decode_components(bytes + offsets[i], records[3 * i], records[3 * i + 1],
                                            std::min(tokens_per_stream, num_tokens - first), coding, workspace,
                                            data + first * stride, stride);
        });
    }
    const StreamFailure failure = first_failure(statuses);
    return py::make_tuple(failure.index, static_cast<int>(failure.status));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU kernels of CacheGen; use them through cachegen.coder.cpu.";

    py::enum_<Status>(module, "Status")
        .value("OK", Status::kOk)
        .value("TRUNCATED", Status::kTruncated)
        .value("CORRUPT", Status::kCorrupt)
        .value("NO_FREQUENCY", Status::kNoFrequency)
        .value("NOT_FINITE", Status::kNotFinite)
        .value("BAD_LOW_BITS", Status::kBadLowBits);

    py::enum_<CpuPath>(module, "CpuPath")
        .value("PORTABLE", CpuPath::kPortable)
        .value("AVX2", CpuPath::kAvx2)
        .value("AVX512", CpuPath::kAvx512);
    module.def("supports", &supports, py::arg("path"));
    module.def("best_path", &best_path);

    py::class_<TableSet>(module, "TableSet")
        .def_static("from_frequencies", &TableSet::from_frequencies, py::arg("frequencies"))
        .def_static("parse", &TableSet::parse, py::arg("bytes"), py::arg("plane_bytes"), py::arg("plane_channels"),
                    py::arg("alphabet_sizes"), py::arg("num_threads"))
        .def_property_readonly("num_tables", &TableSet::num_tables)
        .def("frequencies", &TableSet::frequencies);

    py::class_<Plane>(module, "Plane")
        .def(py::init([](uintptr_t values, int64_t token_stride, int64_t head_stride, int64_t num_heads,
                         int64_t head_dim, uintptr_t scales, int num_bins, int low_bits, int64_t tokens_per_stream,
                         const TableSet* tables, int64_t first_table, int64_t num_tables, bool is_arithmetic) {
                 Plane plane;
                 plane.values = reinterpret_cast<uint8_t*>(values);
                 plane.token_stride = token_stride;
                 plane.head_stride = head_stride;
                 plane.num_heads = num_heads;
                 plane.head_dim = head_dim;
                 plane.scales = reinterpret_cast<uint8_t*>(scales);
                 plane.num_bins = num_bins;
                 plane.tokens_per_stream = tokens_per_stream;
                 plane.coding.low_bits = low_bits;
                 set_tables(plane, tables, first_table, num_tables);
                 set_arithmetic(plane.coding, is_arithmetic, tokens_per_stream);
                 return plane;
             }),
             py::kw_only(), py::arg("values"), py::arg("token_stride"), py::arg("head_stride"), py::arg("num_heads"),
             py::arg("head_dim"), py::arg("scales"), py::arg("num_bins"), py::arg("low_bits"),
             py::arg("tokens_per_stream"), py::arg("tables"), py::arg("first_table"), py::arg("num_tables"),
             py::arg("is_arithmetic") = false, py::keep_alive<1, 11>());

    module.def("pack_tables", &pack_tables, py::arg("counts").noconvert(), py::arg("plane_channels"),
               py::arg("num_threads"));
    module.def("measure", &measure, py::arg("planes"), py::arg("dtype"), py::arg("num_tokens"), py::arg("num_threads"),
               py::arg("path"));
    module.def("encode", &encode, py::arg("planes"), py::arg("dtype"), py::arg("num_tokens"), py::arg("num_threads"),
               py::arg("path"));
    module.def("decode", &decode, py::arg("planes"), py::arg("dtype"), py::arg("num_tokens"),
               py::arg("payload").noconvert(), py::arg("index"), py::arg("num_threads"), py::arg("path"));
    module.def("checksum_streams", &checksum_streams, py::arg("payload").noconvert(), py::arg("index"),
               py::arg("num_threads"));
    module.def("encode_symbols", &encode_symbols, py::arg("symbols"), py::arg("tables"), py::arg("low_bits"),
               py::arg("table_indices") = py::none(), py::arg("is_arithmetic") = false);
    module.def("decode_symbols", &decode_symbols, py::arg("bytes"), py::arg("num_words"), py::arg("num_tokens"),
               py::arg("num_channels"), py::arg("tables"), py::arg("low_bits"), py::arg("table_indices") = py::none(),
               py::arg("is_arithmetic") = false);
    module.def("encode_components", &encode_components_of, py::arg("fine"), py::arg("coarse"), py::arg("tables"),
               py::arg("table_indices"), py::arg("low_bits"), py::arg("num_refined"), py::arg("tokens_per_stream"),
               py::arg("num_threads"));
    module.def("decode_components", &decode_components_of, py::arg("payload").noconvert(), py::arg("index"),
               py::arg("components").noconvert(), py::arg("tables"), py::arg("table_indices"), py::arg("low_bits"),
               py::arg("num_refined"), py::arg("tokens_per_stream"), py::arg("num_threads"));
    module.def("crc32c", [](const py::buffer& buffer) {
        const py::buffer_info info = buffer.request();
        if (info.ndim != 1 || info.strides[0] != info.itemsize) throw py::value_error("contiguous bytes are expected");
        return checksum(static_cast<const uint8_t*>(info.ptr), static_cast<size_t>(info.size * info.itemsize));
    });
}

}  // namespace cachegen
