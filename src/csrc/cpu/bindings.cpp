// The CPU kernels as the Python module cachegen._native.
//
// No torch here: tensors arrive as addresses, strides and sizes, and cachegen/coder/cpu.py makes every check. The
// interpreter is unlocked while the kernels run.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/chunk_kernels.h"
#include "cpu/cpu_kernels.h"
#include "cpu/lossless.h"
#include "cpu/planes.h"
#include "cpu/python_classes.h"
#include "cpu/python_components.h"
#include "cpu/python_interface.h"
#include "cpu/python_lossless.h"
#include "cpu/python_transform.h"
#include "cpu/table_set.h"

namespace cachegen {
namespace {

uint32_t to_word_count(long long num_words) {
    if (num_words < 0 || num_words > int64_t{UINT32_MAX}) throw ValueError("num_words is out of range");
    return static_cast<uint32_t>(num_words);
}

// --- planes of a chunk -----------------------------------------------------------------------------------------------

// Where the streams of an index [num_streams][3] begin in a payload, at multiples of 16 bytes, and where the last ends.
std::vector<int64_t> offsets_of(const Array<uint32_t>& index, int64_t num_streams, const Array<uint8_t>& payload) {
    if (index.num_dimensions() != 2 || index.shape(0) != num_streams || index.shape(1) != 3)
        throw ValueError("the index must have one row of three per stream");
    std::vector<int64_t> offsets(num_streams + 1, 0);
    for (int64_t i = 0; i < num_streams; ++i)
        offsets[i + 1] = offsets[i] + round_up(int64_t{index.at(i, 0)}, kStreamAlignment);
    if (offsets.back() != payload.size()) throw ValueError("the payload is not as long as its streams");
    return offsets;
}

Reference failure_tuple(const Failure& failure) {
    return Reference(Py_BuildValue("(Li)", static_cast<long long>(failure.index), static_cast<int>(failure.status)));
}

// Compact tables of planes from symbol counts uint32 [sum of channels, 32]: a bytes object per plane.
Reference pack_tables(const Arguments& arguments) {
    static const char* const kNames[] = {"counts", "plane_channels", "num_threads", nullptr};
    PyObject *object, *channels;
    int num_threads;
    arguments.read("OOi:pack_tables", kNames, &object, &channels, &num_threads);
    const Array<uint32_t> counts(object, "counts");
    if (counts.num_dimensions() != 2 || counts.shape(1) != kTableSize)
        throw ValueError("counts must be [num_tables, 32]");
    const std::vector<int64_t> plane_channels = python::to_integers(channels);
    int64_t num_rows = 0;
    for (const int64_t num_channels : plane_channels) {
        if (num_channels < 0 || num_channels > counts.shape(0) - num_rows) num_rows = counts.shape(0) + 1;
        if (num_rows > counts.shape(0)) break;
        num_rows += num_channels;
    }
    if (num_rows != counts.shape(0)) throw ValueError("one row of counts per channel is expected");
    std::vector<std::vector<uint8_t>> packed;
    int64_t bad_plane;
    {
        const UnlockedInterpreter unlocked;
        bad_plane = pack_plane_tables(counts.data(), plane_channels, num_threads, packed);
    }
    if (bad_plane >= 0)
        throw ValueError("a channel of plane " + std::to_string(bad_plane) + " has no symbols, or too many");
    Reference result(PyList_New(static_cast<Py_ssize_t>(packed.size())));
    for (size_t i = 0; i < packed.size(); ++i)
        PyList_SetItem(result.get(), static_cast<Py_ssize_t>(i), python::to_bytes(packed[i]).release());
    return result;
}

// Fill the planes' scales and count symbols. Returns (counts uint32 [sum of channels, 32], plane, token), the last two
// naming the first token that is not finite, or -1.
Reference measure(const Arguments& arguments) {
    static const char* const kNames[] = {"planes", "dtype", "num_tokens", "num_threads", "path", nullptr};
    PyObject *plane_list, *path_object;
    int dtype, num_threads;
    long long num_tokens;
    arguments.read("OiLiO:measure", kNames, &plane_list, &dtype, &num_tokens, &num_threads, &path_object);
    const CpuKernels& kernels = to_kernels(path_object);
    const Reference tuple = python::to_tuple(plane_list);
    const std::vector<Plane> planes = to_planes(tuple);
    int64_t num_channels = 0;
    for (const Plane& plane : planes) num_channels += plane.num_channels();
    const NewArray<uint32_t> counts({num_channels, kTableSize});
    std::vector<int64_t> bad_tokens(planes.size(), -1);
    {
        const UnlockedInterpreter unlocked;
        std::memset(counts.data(), 0, sizeof(uint32_t) * num_channels * kTableSize);
        measure_chunk(planes, static_cast<Dtype>(dtype), num_tokens, num_threads, kernels, counts.data(), bad_tokens);
    }
    long long bad_plane = -1;
    for (size_t i = 0; i < planes.size() && bad_plane < 0; ++i)
        if (bad_tokens[i] >= 0) bad_plane = static_cast<long long>(i);
    return Reference(Py_BuildValue("(OLL)", counts.get(), bad_plane,
                                   static_cast<long long>(bad_plane < 0 ? -1 : bad_tokens[bad_plane])));
}

// Join the streams and free them: (payload uint8, index uint32 [num_streams, 3] of bytes, words and CRC-32C, failed
// stream, status).
Reference encoded_tuple(EncodedStreams& encoded, int num_threads) {
    const auto num_streams = static_cast<int64_t>(encoded.streams.size());
    const NewArray<uint32_t> index({num_streams, 3});
    std::vector<int64_t> offsets(num_streams + 1, 0);
    Failure failure;
    for (int64_t i = 0; i < num_streams; ++i) {
        const EncodedStream& stream = encoded.streams[i];
        index.data()[3 * i] = static_cast<uint32_t>(stream.num_bytes);
        index.data()[3 * i + 1] = stream.num_words;
        index.data()[3 * i + 2] = encoded.checksums[i];
        offsets[i + 1] = offsets[i] + stream.padded_bytes();
        if (failure.index < 0 && stream.status != Status::kOk) failure = {i, stream.status};
    }
    const NewArray<uint8_t> payload({offsets.back()});
    {
        const UnlockedInterpreter unlocked;
        join_streams(encoded, offsets, num_threads, payload.data());
    }
    return Reference(Py_BuildValue("(OOLi)", payload.get(), index.get(), static_cast<long long>(failure.index),
                                   static_cast<int>(failure.status)));
}

// Quantize and encode all planes; see encoded_tuple.
Reference encode(const Arguments& arguments) {
    static const char* const kNames[] = {"planes", "dtype", "num_tokens", "num_threads", "path", nullptr};
    PyObject *plane_list, *path_object;
    int dtype, num_threads;
    long long num_tokens;
    arguments.read("OiLiO:encode", kNames, &plane_list, &dtype, &num_tokens, &num_threads, &path_object);
    const CpuKernels& kernels = to_kernels(path_object);
    const Reference tuple = python::to_tuple(plane_list);
    const std::vector<Plane> planes = to_planes(tuple);
    const std::vector<StreamRef> streams = list_streams(planes, num_tokens);
    EncodedStreams encoded;
    {
        const UnlockedInterpreter unlocked;
        encoded = encode_chunk(planes, static_cast<Dtype>(dtype), streams, num_threads, kernels);
    }
    return encoded_tuple(encoded, num_threads);
}

// Decode all planes from a payload, which must hold the streams of `index` at multiples of 16 bytes.
// Returns (failed stream, status).
Reference decode(const Arguments& arguments) {
    static const char* const kNames[] = {"planes", "dtype",       "num_tokens", "payload",
                                         "index",  "num_threads", "path",       nullptr};
    PyObject *plane_list, *payload_object, *index_object, *path_object;
    int dtype, num_threads;
    long long num_tokens;
    arguments.read("OiLOOiO:decode", kNames, &plane_list, &dtype, &num_tokens, &payload_object, &index_object,
                   &num_threads, &path_object);
    const CpuKernels& kernels = to_kernels(path_object);
    const Reference tuple = python::to_tuple(plane_list);
    const std::vector<Plane> planes = to_planes(tuple);
    const Array<uint8_t> payload(payload_object, "payload");
    const Array<uint32_t> index(index_object, "index");
    std::vector<StreamRef> streams = list_streams(planes, num_tokens);
    const std::vector<int64_t> offsets = offsets_of(index, static_cast<int64_t>(streams.size()), payload);
    for (size_t i = 0; i < streams.size(); ++i) {
        streams[i].offset = offsets[i];
        streams[i].num_bytes = index.at(static_cast<int64_t>(i), 0);
        streams[i].num_words = index.at(static_cast<int64_t>(i), 1);
    }
    Failure failure;
    {
        const UnlockedInterpreter unlocked;
        failure = decode_chunk(planes, static_cast<Dtype>(dtype), streams, num_tokens, payload.data(), payload.size(),
                               num_threads, kernels);
    }
    return failure_tuple(failure);
}

// The checksums of the streams of a payload: uint32 [num_streams].
Reference checksum_streams(const Arguments& arguments) {
    static const char* const kNames[] = {"payload", "index", "num_threads", nullptr};
    PyObject *payload_object, *index_object;
    int num_threads;
    arguments.read("OOi:checksum_streams", kNames, &payload_object, &index_object, &num_threads);
    const Array<uint8_t> payload(payload_object, "payload");
    const Array<uint32_t> index(index_object, "index");
    const int64_t num_streams = index.num_dimensions() == 2 ? index.shape(0) : 0;
    const std::vector<int64_t> offsets = offsets_of(index, num_streams, payload);
    const NewArray<uint32_t> checksums({num_streams});
    {
        const UnlockedInterpreter unlocked;
        checksum_parts(payload.data(), offsets, num_threads, checksums.data());
    }
    return Reference::borrow(checksums.get());
}

// The checksums of planes' values in blocks of tokens: uint32 [num_planes, num_blocks]. Planes are tuples of address,
// token stride, head stride, number of heads and bytes of a head, strides in bytes.
Reference checksum_tokens_of(const Arguments& arguments) {
    static const char* const kNames[] = {"planes", "num_tokens", "tokens_per_block", "num_threads", nullptr};
    PyObject* plane_list;
    long long num_tokens, tokens_per_block;
    int num_threads;
    arguments.read("OLLi:checksum_tokens", kNames, &plane_list, &num_tokens, &tokens_per_block, &num_threads);
    if (num_tokens < 0 || tokens_per_block < 1) throw ValueError("the numbers of tokens are out of range");
    const Reference tuple = python::to_tuple(plane_list);
    std::vector<TokenBytes> planes;
    for (Py_ssize_t i = 0; i < PyTuple_Size(tuple.get()); ++i) {
        const std::vector<int64_t> plane = python::to_integers(PyTuple_GetItem(tuple.get(), i));
        if (plane.size() != 5) throw ValueError("a plane is five numbers");
        planes.push_back({reinterpret_cast<const uint8_t*>(plane[0]), plane[1], plane[2], plane[3], plane[4]});
    }
    const NewArray<uint32_t> checksums(
        {static_cast<int64_t>(planes.size()), count_blocks(num_tokens, tokens_per_block)});
    {
        const UnlockedInterpreter unlocked;
        checksum_tokens(planes, num_tokens, tokens_per_block, num_threads, checksums.data());
    }
    return Reference::borrow(checksums.get());
}

// The CRC-32C of contiguous bytes.
PyObject* crc32c_of(PyObject*, PyObject* object) {
    return python::call_guarded([&] {
        Py_buffer view;
        if (PyObject_GetBuffer(object, &view, PyBUF_STRIDES) != 0) throw python::Error{};
        const bool is_contiguous = view.ndim == 1 && view.strides[0] == view.itemsize;
        const uint32_t found = is_contiguous ? checksum(static_cast<const uint8_t*>(view.buf), view.len) : 0;
        PyBuffer_Release(&view);
        if (!is_contiguous) throw ValueError("contiguous bytes are expected");
        return Reference(PyLong_FromUnsignedLong(found));
    });
}

// --- one stream ------------------------------------------------------------------------------------------------------

// Where each channel's table is, uint16 [num_channels], or None.
class TableIndices {
  public:
    explicit TableIndices(PyObject* object) {
        if (object != Py_None) array_.emplace(object, "table_indices");
    }
    // The array must outlive the coding.
    PlaneCoding make_coding(const TableSet* tables, int low_bits, const StreamShape& shape, bool is_arithmetic) const {
        if (low_bits < 0 || low_bits > kMaxLowBits) throw ValueError("low_bits is out of range");
        PlaneCoding coding;
        coding.low_bits = low_bits;
        if (tables != nullptr) {
            coding.tables = tables->data();
            coding.num_tables = tables->num_tables();
        }
        if (array_.has_value()) {
            if (array_->size() != shape.num_channels) throw ValueError("one table index per channel is expected");
            for (int64_t channel = 0; channel < shape.num_channels; ++channel)
                if (array_->data()[channel] >= coding.num_tables) throw ValueError("a table index is out of range");
            coding.table_indices = array_->data();
        } else if (tables != nullptr && coding.num_tables < shape.num_channels) {
            throw ValueError("one table per channel is expected");
        }
        set_arithmetic(coding, is_arithmetic, shape.num_tokens);
        return coding;
    }

  private:
    std::optional<Array<uint16_t>> array_;
};

// Encode one stream of symbols uint16 [num_channels, num_tokens]; see coder/cpu.py. Returns (bytes, words, status).
Reference encode_symbols(const Arguments& arguments) {
    static const char* const kNames[] = {"symbols", "tables", "low_bits", "table_indices", "is_arithmetic", nullptr};
    PyObject *symbols_object, *tables, *indices = Py_None;
    int low_bits, is_arithmetic = 0;
    arguments.read("OOi|Op:encode_symbols", kNames, &symbols_object, &tables, &low_bits, &indices, &is_arithmetic);
    const Array<uint16_t> symbols(symbols_object, "symbols");
    if (symbols.num_dimensions() != 2) throw ValueError("symbols must be [num_channels, num_tokens]");
    const StreamShape shape{symbols.shape(1), symbols.shape(0)};
    const TableIndices table_indices(indices);
    const PlaneCoding coding =
        table_indices.make_coding(to_optional_tables(tables), low_bits, shape, is_arithmetic != 0);
    std::vector<uint8_t> output;
    uint32_t num_words = 0;
    const Status status = encode_symbol_stream(symbols.data(), shape, coding, output, &num_words);
    const Reference bytes = python::to_bytes(output);
    return Reference(Py_BuildValue("(OIi)", bytes.get(), num_words, static_cast<int>(status)));
}

// The inverse of encode_symbols. Returns (symbols uint16 [num_channels, num_tokens], status).
Reference decode_symbols(const Arguments& arguments) {
    static const char* const kNames[] = {"bytes",    "num_words",     "num_tokens",    "num_channels", "tables",
                                         "low_bits", "table_indices", "is_arithmetic", nullptr};
    PyObject *bytes_object, *tables, *indices = Py_None;
    long long num_words, num_tokens, num_channels;
    int low_bits, is_arithmetic = 0;
    arguments.read("OLLLOi|Op:decode_symbols", kNames, &bytes_object, &num_words, &num_tokens, &num_channels, &tables,
                   &low_bits, &indices, &is_arithmetic);
    const Array<uint8_t> bytes(bytes_object, "bytes");
    const StreamShape shape{num_tokens, num_channels};
    const TableIndices table_indices(indices);
    const PlaneCoding coding =
        table_indices.make_coding(to_optional_tables(tables), low_bits, shape, is_arithmetic != 0);
    const NewArray<uint16_t> symbols({num_channels, num_tokens});
    const Status status =
        decode_symbol_stream(bytes.data(), bytes.size(), to_word_count(num_words), shape, coding, symbols.data());
    return Reference(Py_BuildValue("(Oi)", symbols.get(), static_cast<int>(status)));
}

// --- components ------------------------------------------------------------------------------------------------------

// Encode the components of one group of layers at one level: fine int32 [num_tokens, num_components], coarse int32
// [num_tokens, >= num_refined]. See encoded_tuple.
Reference encode_components_of(const Arguments& arguments) {
    static const char* const kNames[] = {
        "fine",        "coarse", "tables", "table_indices", "low_bits", "num_refined", "tokens_per_stream",
        "num_threads", "path",   nullptr};
    PyObject *fine_object, *coarse_object, *tables, *indices_object, *low_bits_object, *path_object;
    long long num_refined, tokens_per_stream;
    int num_threads;
    arguments.read("OOOOOLLiO:encode_components", kNames, &fine_object, &coarse_object, &tables, &indices_object,
                   &low_bits_object, &num_refined, &tokens_per_stream, &num_threads, &path_object);
    const CpuKernels& kernels = to_kernels(path_object);
    const Array<int32_t> fine(fine_object, "fine"), coarse(coarse_object, "coarse");
    const ComponentCodingArrays arrays(to_tables(tables), indices_object, low_bits_object, num_refined,
                                       tokens_per_stream);
    const ComponentCoding& coding = arrays.get();
    if (fine.num_dimensions() != 2 || fine.shape(1) != coding.num_components)
        throw ValueError("fine has another shape");
    if (coarse.num_dimensions() != 2 || coarse.shape(0) != fine.shape(0) || coarse.shape(1) < num_refined)
        throw ValueError("coarse has another shape");
    EncodedStreams encoded;
    {
        const UnlockedInterpreter unlocked;
        encoded = encode_component_streams({fine.data(), fine.shape(0), fine.shape(1)},
                                           {coarse.data(), coarse.shape(0), coarse.shape(1)}, coding, tokens_per_stream,
                                           num_threads, kernels);
    }
    return encoded_tuple(encoded, num_threads);
}

// The inverse: decode groups of components, see ComponentGroupArrays, in place; their first num_refined columns hold
// the level before's. The index has the streams of all groups, group after group. Returns (failed stream, status).
Reference decode_components_of(const Arguments& arguments) {
    static const char* const kNames[] = {"payload", "index", "groups", "tables", "num_threads", "path", nullptr};
    PyObject *payload_object, *index_object, *group_list, *tables, *path_object;
    int num_threads;
    arguments.read("OOOOiO:decode_components", kNames, &payload_object, &index_object, &group_list, &tables,
                   &num_threads, &path_object);
    const CpuKernels& kernels = to_kernels(path_object);
    const Array<uint8_t> payload(payload_object, "payload");
    const Array<uint32_t> index(index_object, "index");
    const ComponentGroupArrays groups(to_tables(tables), group_list);
    const std::vector<int64_t> offsets = offsets_of(index, groups.num_streams(), payload);
    const std::vector<ComponentStreamRef> streams = list_streams(groups.get(), offsets, index.data());
    Failure failure;
    {
        const UnlockedInterpreter unlocked;
        failure = decode_component_streams(streams, payload.data(), payload.size(), num_threads, kernels);
    }
    return failure_tuple(failure);
}

// --- method lossless -------------------------------------------------------------------------------------------------

// Returns the streams as bytes: for each block of tokens one per layer.
Reference lossless_encode(const Arguments& arguments) {
    static const char* const kNames[] = {"values", "first_token", "model", "num_threads", nullptr};
    PyObject *object, *parts;
    long long first_token;
    int num_threads;
    arguments.read("OLOi:lossless_encode", kNames, &object, &first_token, &parts, &num_threads);
    const LosslessModel model(parts);
    const Array<uint16_t> array(object, "values");
    const lossless::Values values = to_values(array, model.get(), first_token);
    std::vector<std::vector<uint8_t>> streams;
    {
        const UnlockedInterpreter unlocked;
        lossless::encode(model.get(), values, num_threads, streams);
    }
    Reference result(PyList_New(static_cast<Py_ssize_t>(streams.size())));
    for (size_t i = 0; i < streams.size(); ++i)
        PyList_SetItem(result.get(), static_cast<Py_ssize_t>(i), python::to_bytes(streams[i]).release());
    return result;
}

// Adds to counts uint32 [num_layers * 2, 64].
Reference lossless_count(const Arguments& arguments) {
    static const char* const kNames[] = {"values", "first_token", "model", "counts", nullptr};
    PyObject *object, *parts, *counts_object;
    long long first_token;
    arguments.read("OLOO:lossless_count", kNames, &object, &first_token, &parts, &counts_object);
    const LosslessModel model(parts);
    const Array<uint16_t> array(object, "values");
    const Array<uint32_t> counts(counts_object, "counts", true);
    const lossless::Values values = to_values(array, model.get(), first_token);
    if (counts.size() != static_cast<int64_t>(model.get().layers.size()) * 2 * lossless::kNumSymbols)
        throw ValueError("counts has another size");
    {
        const UnlockedInterpreter unlocked;
        lossless::count(model.get(), values, counts.mutable_data());
    }
    return Reference::borrow(Py_None);
}

// Fills values from the streams. Returns (stream, status) of the first that is corrupt, or (0, 0).
Reference lossless_decode(const Arguments& arguments) {
    static const char* const kNames[] = {"payload", "index", "values", "first_token", "model", "num_threads", nullptr};
    PyObject *payload_object, *index_object, *object, *parts;
    long long first_token;
    int num_threads;
    arguments.read("OOOLOi:lossless_decode", kNames, &payload_object, &index_object, &object, &first_token, &parts,
                   &num_threads);
    const LosslessModel model(parts);
    const Array<uint8_t> payload(payload_object, "payload");
    const Array<uint32_t> index(index_object, "index");
    const Array<uint16_t> array(object, "values", true);
    lossless::Values values = to_values(array, model.get(), first_token);
    const int64_t num_streams =
        static_cast<int64_t>(model.get().layers.size()) * lossless::num_blocks(values.num_tokens);
    const std::vector<int64_t> offsets = offsets_of(index, num_streams, payload);
    std::vector<std::pair<const uint8_t*, int64_t>> streams;
    for (int64_t i = 0; i < num_streams; ++i) streams.emplace_back(payload.data() + offsets[i], index.at(i, 0));
    lossless::Outcome outcome;
    {
        const UnlockedInterpreter unlocked;
        outcome = lossless::decode(model.get(), streams, num_threads, values);
    }
    return failure_tuple({outcome.stream, outcome.status});
}

// --- the module ------------------------------------------------------------------------------------------------------

struct EnumMember {
    const char* name;
    int value;
};

// Make an enum.Enum and add it to the module.
Reference add_enum(PyObject* module, const char* name, const std::vector<EnumMember>& members) {
    const Reference dict(PyDict_New());
    for (const EnumMember& member : members) {
        const Reference value(PyLong_FromLong(member.value));
        if (PyDict_SetItemString(dict.get(), member.name, value.get()) != 0) throw python::Error{};
    }
    const Reference library(PyImport_ImportModule("enum"));
    const Reference make(PyObject_GetAttrString(library.get(), "Enum"));
    const Reference positional(Py_BuildValue("(sO)", name, dict.get()));
    const Reference keywords(Py_BuildValue("{ss}", "module", "cachegen._native"));
    Reference made(PyObject_Call(make.get(), positional.get(), keywords.get()));
    if (PyModule_AddObjectRef(module, name, made.get()) != 0) throw python::Error{};
    return made;
}

Reference supports_path(const Arguments& arguments) {
    static const char* const kNames[] = {"path", nullptr};
    PyObject* path;
    arguments.read("O:supports", kNames, &path);
    return Reference(PyBool_FromLong(to_path(path).is_supported()));
}

Reference best_path_of(const Arguments& arguments) {
    static const char* const kNames[] = {nullptr};
    arguments.read(":best_path", kNames);
    int best = static_cast<int>(cpu_paths().size()) - 1;
    while (!cpu_paths()[best]->is_supported()) --best;
    return Reference(PyObject_CallFunction(cpu_path_type, "i", best));
}

Reference make_module() {
    static PyMethodDef functions[] = {python::describe_function<supports_path>("supports"),
                                      python::describe_function<best_path_of>("best_path"),
                                      python::describe_function<pack_tables>("pack_tables"),
                                      python::describe_function<measure>("measure"),
                                      python::describe_function<encode>("encode"),
                                      python::describe_function<decode>("decode"),
                                      python::describe_function<checksum_streams>("checksum_streams"),
                                      python::describe_function<checksum_tokens_of>("checksum_tokens"),
                                      python::describe_function<encode_symbols>("encode_symbols"),
                                      python::describe_function<decode_symbols>("decode_symbols"),
                                      python::describe_function<encode_components_of>("encode_components"),
                                      python::describe_function<decode_components_of>("decode_components"),
                                      python::describe_function<analysis_of_processor>("analysis"),
                                      python::describe_function<gather_rows_of>("gather_rows"),
                                      python::describe_function<multiply_bf16_of>("multiply_bf16"),
                                      python::describe_function<measure_errors_of>("measure_errors"),
                                      python::describe_function<pack_synthesis_of>("pack_synthesis"),
                                      python::describe_function<synthesize_planes>("synthesize"),
                                      python::describe_function<measure_synthesis_of>("measure_synthesis"),
                                      python::describe_function<pack_analysis_of>("pack_analysis"),
                                      python::describe_function<gather_bytes_of>("gather_bytes"),
                                      python::describe_function<multiply_bytes_of>("multiply_bytes"),
                                      python::describe_function<lossless_encode>("lossless_encode"),
                                      python::describe_function<lossless_count>("lossless_count"),
                                      python::describe_function<lossless_decode>("lossless_decode"),
                                      {"crc32c", crc32c_of, METH_O, nullptr},
                                      {nullptr, nullptr, 0, nullptr}};
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                     "_native",
                                     "CPU kernels of CacheGen; use them through cachegen.coder.cpu.",
                                     -1,
                                     functions,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     nullptr};
    Reference module(PyModule_Create(&definition));
    add_enum(module.get(), "Status",
             {{"OK", static_cast<int>(Status::kOk)},
              {"TRUNCATED", static_cast<int>(Status::kTruncated)},
              {"CORRUPT", static_cast<int>(Status::kCorrupt)},
              {"NO_FREQUENCY", static_cast<int>(Status::kNoFrequency)},
              {"NOT_FINITE", static_cast<int>(Status::kNotFinite)},
              {"BAD_LOW_BITS", static_cast<int>(Status::kBadLowBits)}});
    std::vector<EnumMember> paths;
    for (const CpuKernels* kernels : cpu_paths()) paths.push_back({kernels->name, static_cast<int>(paths.size())});
    cpu_path_type = add_enum(module.get(), "CpuPath", paths).release();
    table_set_type = make_table_set_type();
    plane_type = make_plane_type();
    if (PyModule_AddObjectRef(module.get(), "TableSet", reinterpret_cast<PyObject*>(table_set_type)) != 0 ||
        PyModule_AddObjectRef(module.get(), "Plane", reinterpret_cast<PyObject*>(plane_type)) != 0)
        throw python::Error{};
    return module;
}

}  // namespace
}  // namespace cachegen

PyMODINIT_FUNC PyInit__native() {
    return cachegen::python::call_guarded([] { return cachegen::make_module(); });
}
