// The functions of cachegen._native for method `transform`: the inverse transform in integers, and the forward one.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/analysis.h"
#include "cpu/byte_analysis.h"
#include "cpu/cpu_kernels.h"
#include "cpu/pack_synthesis.h"
#include "cpu/python_classes.h"
#include "cpu/python_synthesis.h"
#include "cpu/synthesis.h"

namespace cachegen {

// A new array of what a vector holds.
template <class Element>
inline Reference copy_to_array(const std::vector<Element>& content) {
    const NewArray<Element> array({static_cast<int64_t>(content.size())});
    if (!content.empty()) std::memcpy(array.data(), content.data(), sizeof(Element) * content.size());
    return Reference::borrow(array.get());
}

// Round a synthesis matrix int16 [num_components, num_channels], times factors of its rows and of its channels, to
// bytes; see pack_synthesis.h. Returns the matrix as synthesize takes it, and its share of the error.
inline Reference pack_synthesis_of(const Arguments& arguments) {
    static const char* const kNames[] = {"integers", "row_factors", "channel_factors", "powers",
                                         "means",    "variances",   "plane_channels",  "num_dense",
                                         "step",     "max_share",   "num_threads",     nullptr};
    PyObject *integers_object, *of_rows_object, *of_channels_object, *powers_object, *means_object, *variances_object,
        *channels_object;
    long long num_dense;
    double step, max_share;
    int num_threads;
    arguments.read("OOOOOOOLddi:pack_synthesis", kNames, &integers_object, &of_rows_object, &of_channels_object,
                   &powers_object, &means_object, &variances_object, &channels_object, &num_dense, &step, &max_share,
                   &num_threads);
    const Array<int16_t> integers(integers_object, "integers");
    const Array<float> row_factors(of_rows_object, "row_factors"),
        channel_factors(of_channels_object, "channel_factors"), powers(powers_object, "powers"),
        means(means_object, "means"), variances(variances_object, "variances");
    const std::vector<int64_t> plane_channels = python::to_integers(channels_object);
    int64_t num_channels = 0;
    for (const int64_t width : plane_channels) {
        if (width < 1) throw ValueError("a plane has no channels");
        num_channels += width;
    }
    if (integers.num_dimensions() != 2 || integers.shape(1) != num_channels || means.size() != num_channels ||
        variances.size() != num_channels || channel_factors.size() != num_channels ||
        row_factors.size() != integers.shape(0) || powers.size() != integers.shape(0))
        throw ValueError("integers, factors, powers, means or variances have another shape");
    const int64_t num_components = integers.shape(0);
    if (num_dense < 0 || num_dense % kQuad != 0 || num_dense >= num_components + kQuad)
        throw ValueError("num_dense is out of range");
    SynthesisRows rows;
    rows.integers = integers.data();
    rows.row_factors = row_factors.data();
    rows.channel_factors = channel_factors.data();
    rows.powers = powers.data();
    rows.means = means.data();
    rows.variances = variances.data();
    rows.num_channels = num_channels;
    rows.num_components = num_components;
    rows.num_dense = num_dense;
    rows.step = static_cast<float>(step);
    PackedSynthesis packed;
    {
        const UnlockedInterpreter unlocked;
        packed = pack_synthesis(rows, plane_channels, max_share, num_threads);
    }
    // One after the other, so that the larger part of the matrix is there twice for as short as may be.
    const Reference sparse = copy_to_array(packed.sparse);
    packed.sparse = {};
    const Reference dense = copy_to_array(packed.dense);
    return Reference(Py_BuildValue("((LLLOOOOO)d)", static_cast<long long>(num_components), num_dense,
                                   static_cast<long long>(packed.num_fine), dense.get(),
                                   copy_to_array(packed.fine).get(), sparse.get(), copy_to_array(packed.factors).get(),
                                   copy_to_array(packed.means).get(), packed.share));
}

inline Dtype to_half_dtype(int dtype) {
    if (dtype != static_cast<int>(Dtype::kFloat16) && dtype != static_cast<int>(Dtype::kBfloat16))
        throw ValueError("dtype must be of 16 bits");
    return static_cast<Dtype>(dtype);
}

// Write the values that components int32 [num_tokens, >= num_components] stand for to the planes of a group of layers;
// see synthesis.h. Returns uint8 [num_tokens]: 1 for tokens that are beyond it, whose values are of no use.
inline Reference synthesize_planes(const Arguments& arguments) {
    static const char* const kNames[] = {"components", "matrix", "planes", "dtype", "num_threads", "path", nullptr};
    PyObject *components_object, *matrix_object, *plane_list, *path_object;
    int dtype, num_threads;
    arguments.read("OOOiiO:synthesize", kNames, &components_object, &matrix_object, &plane_list, &dtype, &num_threads,
                   &path_object);
    const CpuKernels& kernels = to_kernels(path_object);
    if (kernels.synthesis == nullptr) throw ValueError("the path has no inverse transform in integers");
    const Dtype half = to_half_dtype(dtype);
    const Array<int32_t> components(components_object, "components");
    if (components.num_dimensions() != 2) throw ValueError("components must be [num_tokens, num_components]");
    const int64_t num_tokens = components.shape(0);
    const SynthesisPlaneArrays planes(plane_list, num_tokens);
    const SynthesisMatrixArrays matrix(matrix_object, planes.num_blocks());
    if (components.shape(1) < matrix.get().num_components) throw ValueError("components has another shape");
    const NewArray<uint8_t> misfits({num_tokens});
    {
        const UnlockedInterpreter unlocked;
        synthesize(*kernels.synthesis, matrix.get(), components.data(), components.shape(1), num_tokens, planes.get(),
                   half, num_threads, misfits.data());
    }
    return Reference::borrow(misfits.get());
}

inline int64_t count_channels(const std::vector<SynthesisPlane>& planes) {
    int64_t total = 0;
    for (const SynthesisPlane& plane : planes) total += plane.num_heads * plane.head_dim;
    return total;
}

// Whether this processor has gather_rows and measure_errors, and whether multiply_bf16.
inline Reference analysis_of_processor(const Arguments& arguments) {
    static const char* const kNames[] = {nullptr};
    arguments.read(":analysis", kNames);
    return Reference(
        Py_BuildValue("(OO)", can_gather() ? Py_True : Py_False, can_multiply_bf16() ? Py_True : Py_False));
}

// The values of planes less means float32 [num_channels], as rows; see analysis.h. Returns (rows float32
// [num_tokens, num_channels], or uint16 of bf16 [num_tokens, num_channels rounded up to 2], largest and sums of their
// sizes float32 [num_channels]).
inline Reference gather_rows_of(const Arguments& arguments) {
    static const char* const kNames[] = {"planes", "dtype", "num_tokens", "means", "is_bf16", "num_threads", nullptr};
    PyObject *plane_list, *means_object;
    long long num_tokens;
    int dtype, is_bf16, num_threads;
    arguments.read("OiLOii:gather_rows", kNames, &plane_list, &dtype, &num_tokens, &means_object, &is_bf16,
                   &num_threads);
    if (!can_gather()) throw ValueError("this processor has no gather_rows");
    const SynthesisPlaneArrays planes(plane_list, num_tokens);
    const Array<float> means(means_object, "means");
    const int64_t num_channels = count_channels(planes.get());
    if (means.size() != num_channels) throw ValueError("means has another size");
    ChannelSizes sizes;
    const auto run = [&](void* rows, int64_t stride) {
        const UnlockedInterpreter unlocked;
        gather_rows(planes.get(), to_half_dtype(dtype), num_tokens, means.data(), is_bf16 != 0, rows, stride,
                    num_threads, sizes);
    };
    const int64_t stride = is_bf16 != 0 ? round_up(num_channels, 2) : num_channels;
    Reference rows;
    if (is_bf16 != 0) {
        const NewArray<uint16_t> made({num_tokens, stride});
        run(made.data(), stride);
        rows = Reference::borrow(made.get());
    } else {
        const NewArray<float> made({num_tokens, stride});
        run(made.data(), stride);
        rows = Reference::borrow(made.get());
    }
    return Reference(
        Py_BuildValue("(OOO)", rows.get(), copy_to_array(sizes.largest).get(), copy_to_array(sizes.sums).get()));
}

// Rows uint16 [num_tokens, 2 num_pairs] of bf16 times a matrix uint16 [num_blocks, num_pairs, 64, 2] of bf16, of which
// the first blocks are taken: float32 [num_tokens, 64 blocks].
inline Reference multiply_bf16_of(const Arguments& arguments) {
    static const char* const kNames[] = {"rows", "matrix", "num_blocks", "num_threads", nullptr};
    PyObject *rows_object, *matrix_object;
    long long num_blocks;
    int num_threads;
    arguments.read("OOLi:multiply_bf16", kNames, &rows_object, &matrix_object, &num_blocks, &num_threads);
    if (!can_multiply_bf16()) throw ValueError("this processor has no multiply_bf16");
    const Array<uint16_t> rows(rows_object, "rows"), matrix(matrix_object, "matrix");
    if (rows.num_dimensions() != 2 || matrix.num_dimensions() != 4 || matrix.shape(2) != kAnalysisComponents ||
        matrix.shape(3) != 2 || rows.shape(1) != 2 * matrix.shape(1) || num_blocks < 0 || num_blocks > matrix.shape(0))
        throw ValueError("rows or matrix has another shape");
    const NewArray<float> components({rows.shape(0), num_blocks * kAnalysisComponents});
    {
        const UnlockedInterpreter unlocked;
        multiply_bf16(rows.data(), rows.shape(0), matrix.shape(1), matrix.data(), num_blocks, components.data(),
                      num_threads);
    }
    return Reference::borrow(components.get());
}

// Compare planes with what they decode to, given as uint16 [num_tokens, num_channels] of their dtype. Returns (largest
// errors and sums of errors float32 [num_channels], the least and the greatest decoded value or 0).
inline Reference measure_errors_of(const Arguments& arguments) {
    static const char* const kNames[] = {"planes", "dtype", "decoded", "num_threads", nullptr};
    PyObject *plane_list, *decoded_object;
    int dtype, num_threads;
    arguments.read("OiOi:measure_errors", kNames, &plane_list, &dtype, &decoded_object, &num_threads);
    if (!can_gather()) throw ValueError("this processor has no measure_errors");
    const Array<uint16_t> decoded(decoded_object, "decoded");
    if (decoded.num_dimensions() != 2) throw ValueError("decoded must be [num_tokens, num_channels]");
    const SynthesisPlaneArrays planes(plane_list, decoded.shape(0));
    if (decoded.shape(1) != count_channels(planes.get())) throw ValueError("decoded has another shape");
    ChannelSizes sizes;
    float least, most;
    {
        const UnlockedInterpreter unlocked;
        measure_errors(planes.get(), to_half_dtype(dtype), decoded.shape(0), decoded.data(), num_threads, sizes, &least,
                       &most);
    }
    return Reference(
        Py_BuildValue("(OOff)", copy_to_array(sizes.largest).get(), copy_to_array(sizes.sums).get(), least, most));
}

// Compare planes with what components stand for, which is not kept; arguments as synthesize's. Returns (misfits as
// synthesize does, largest errors and sums of errors float32 [num_channels], the least and the greatest decoded value
// or 0).
inline Reference measure_synthesis_of(const Arguments& arguments) {
    static const char* const kNames[] = {"components", "matrix", "planes", "dtype", "num_threads", "path", nullptr};
    PyObject *components_object, *matrix_object, *plane_list, *path_object;
    int dtype, num_threads;
    arguments.read("OOOiiO:measure_synthesis", kNames, &components_object, &matrix_object, &plane_list, &dtype,
                   &num_threads, &path_object);
    const CpuKernels& kernels = to_kernels(path_object);
    if (kernels.synthesis == nullptr) throw ValueError("the path has no inverse transform in integers");
    const Dtype half = to_half_dtype(dtype);
    const Array<int32_t> components(components_object, "components");
    if (components.num_dimensions() != 2) throw ValueError("components must be [num_tokens, num_components]");
    const int64_t num_tokens = components.shape(0);
    const SynthesisPlaneArrays planes(plane_list, num_tokens);
    const SynthesisMatrixArrays matrix(matrix_object, planes.num_blocks());
    if (components.shape(1) < matrix.get().num_components) throw ValueError("components has another shape");
    const NewArray<uint8_t> misfits({num_tokens});
    ChannelSizes sizes;
    float least, most;
    {
        const UnlockedInterpreter unlocked;
        measure_synthesis(*kernels.synthesis, matrix.get(), components.data(), components.shape(1), num_tokens,
                          planes.get(), half, num_threads, misfits.data(), sizes, &least, &most);
    }
    return Reference(Py_BuildValue("(OOOff)", misfits.get(), copy_to_array(sizes.largest).get(),
                                   copy_to_array(sizes.sums).get(), least, most));
}

// An array int32 of channels that are there once more, whole quads, -1 for none.
inline std::vector<int32_t> to_copies(const Array<int32_t>& array, int64_t num_channels) {
    std::vector<int32_t> copies(array.size());
    if (!copies.empty()) std::memcpy(copies.data(), array.data(), sizeof(int32_t) * copies.size());
    for (const int32_t channel : copies)
        if (channel < -1 || channel >= num_channels) throw ValueError("a copy is of no channel");
    if (copies.size() % kQuad != 0) throw ValueError("copies must be whole quads");
    return copies;
}

inline Reference to_signed_bytes(const std::vector<int8_t>& content) {
    const NewArray<uint8_t> array({static_cast<int64_t>(content.size())});
    if (!content.empty()) std::memcpy(array.data(), content.data(), content.size());
    return Reference::borrow(array.get());
}

// Round an analysis matrix float32 [num_components, num_channels] to bytes, for values in units float32 [num_channels];
// see byte_analysis.h. Returns (entries and low entries int8 as uint8, what a unit of the sums is worth float32
// [num_components], corrections and low corrections int32), each filled up to whole blocks of 64 components.
inline Reference pack_analysis_of(const Arguments& arguments) {
    static const char* const kNames[] = {"analysis", "units", "copies", "num_fine", "num_threads", nullptr};
    PyObject *analysis_object, *units_object, *copies_object;
    long long num_fine;
    int num_threads;
    arguments.read("OOOLi:pack_analysis", kNames, &analysis_object, &units_object, &copies_object, &num_fine,
                   &num_threads);
    const Array<float> analysis(analysis_object, "analysis"), units(units_object, "units");
    const Array<int32_t> copied(copies_object, "copies");
    if (analysis.num_dimensions() != 2 || units.size() != analysis.shape(1))
        throw ValueError("analysis or units has another shape");
    const int64_t num_channels = analysis.shape(1), num_components = analysis.shape(0);
    if (2 * num_channels + copied.size() > kMaxByteChannels) throw ValueError("analysis has too many channels");
    if (num_fine < 0 || num_fine % kAnalysisComponents != 0 || num_fine >= num_components + kAnalysisComponents)
        throw ValueError("num_fine is out of range");
    const std::vector<int32_t> copies = to_copies(copied, num_channels);
    PackedAnalysis packed;
    {
        const UnlockedInterpreter unlocked;
        packed =
            pack_analysis(analysis.data(), num_channels, num_components, units.data(), copies, num_fine, num_threads);
    }
    return Reference(Py_BuildValue("(OOOOO)", to_signed_bytes(packed.entries).get(),
                                   to_signed_bytes(packed.low_entries).get(), copy_to_array(packed.units).get(),
                                   copy_to_array(packed.corrections).get(),
                                   copy_to_array(packed.low_corrections).get()));
}

// The values of planes less means, over units whose inverses are given, both float32 [num_channels], as bytes; see
// byte_analysis.h. Returns (rows uint8 [num_tokens, width], excess int32 [any, 3]: token, place and units, largest and
// sums of the differences' sizes float32 [num_channels]).
inline Reference gather_bytes_of(const Arguments& arguments) {
    static const char* const kNames[] = {"planes", "dtype",   "num_tokens",  "means", "inverses",
                                         "copies", "has_low", "num_threads", "path",  nullptr};
    PyObject *plane_list, *means_object, *inverses_object, *copies_object, *path_object;
    long long num_tokens;
    int dtype, has_low, num_threads;
    arguments.read("OiLOOOiiO:gather_bytes", kNames, &plane_list, &dtype, &num_tokens, &means_object, &inverses_object,
                   &copies_object, &has_low, &num_threads, &path_object);
    const CpuKernels& kernels = to_kernels(path_object);
    if (kernels.byte_analysis == nullptr) throw ValueError("the path has no forward transform in bytes");
    const Dtype half = to_half_dtype(dtype);
    const SynthesisPlaneArrays planes(plane_list, num_tokens);
    const Array<float> means(means_object, "means"), inverses(inverses_object, "inverses");
    const Array<int32_t> copied(copies_object, "copies");
    const int64_t num_channels = count_channels(planes.get());
    if (means.size() != num_channels || inverses.size() != num_channels || num_tokens > INT32_MAX)
        throw ValueError("means or inverses has another size");
    const std::vector<int32_t> copies = to_copies(copied, num_channels);
    const int64_t filled = round_up(num_channels, kQuad);
    const int64_t stride = filled + static_cast<int64_t>(copies.size()) + (has_low != 0 ? filled : 0);
    const NewArray<uint8_t> rows({num_tokens, stride});
    ChannelSizes sizes;
    std::vector<Excess> excess;
    {
        const UnlockedInterpreter unlocked;
        gather_bytes(*kernels.byte_analysis, planes.get(), half, num_tokens, means.data(), inverses.data(), copies,
                     has_low != 0, rows.data(), stride, num_threads, sizes, excess);
    }
    static_assert(sizeof(Excess) == 3 * sizeof(int32_t), "an excess is a row of an array");
    const NewArray<int32_t> left({static_cast<int64_t>(excess.size()), 3});
    if (!excess.empty()) std::memcpy(left.data(), excess.data(), excess.size() * sizeof(Excess));
    return Reference(Py_BuildValue("(OOOO)", rows.get(), left.get(), copy_to_array(sizes.largest).get(),
                                   copy_to_array(sizes.sums).get()));
}

// Rows and excess, as gather_bytes returns them, times a matrix of num_channels: a tuple as pack_analysis returns it,
// with scales float32 in place of what a unit is worth; components int32 of levels [(ratio, components [num_tokens,
// num_components])], which are filled in. Returns uint8 [num_tokens]: 1 for tokens that are beyond it, whose components
// are of no use.
inline Reference multiply_bytes_of(const Arguments& arguments) {
    static const char* const kNames[] = {"rows",   "excess",      "matrix", "num_channels", "max_square",
                                         "levels", "num_threads", "path",   nullptr};
    PyObject *rows_object, *excess_object, *matrix_object, *level_list, *path_object;
    long long num_channels, max_square;
    int num_threads;
    arguments.read("OOOLLOiO:multiply_bytes", kNames, &rows_object, &excess_object, &matrix_object, &num_channels,
                   &max_square, &level_list, &num_threads, &path_object);
    const CpuKernels& kernels = to_kernels(path_object);
    if (kernels.byte_analysis == nullptr) throw ValueError("the path has no forward transform in bytes");
    const Reference parts = python::to_tuple(matrix_object);
    if (PyTuple_Size(parts.get()) != 5) throw ValueError("a matrix is a tuple of five");
    const auto part = [&](Py_ssize_t index) { return PyTuple_GetItem(parts.get(), index); };
    const Array<uint8_t> rows(rows_object, "rows"), entries(part(0), "entries"), low_entries(part(1), "low entries");
    const Array<float> scales(part(2), "scales");
    const Array<int32_t> left(excess_object, "excess"), corrections(part(3), "corrections"),
        low_corrections(part(4), "low corrections");
    if (rows.num_dimensions() != 2 || rows.shape(1) % kQuad != 0 || left.num_dimensions() != 2 || left.shape(1) != 3)
        throw ValueError("rows or excess has another shape");
    ByteAnalysisMatrix matrix;
    matrix.num_channels = num_channels;
    matrix.num_fine = low_corrections.size();
    matrix.num_low_quads = matrix.num_fine == 0 ? 0 : rows.shape(1) / kQuad;
    const int64_t num_low_bytes = matrix.num_fine == 0 ? 0 : round_up(num_channels, kQuad);
    matrix.num_quads = (rows.shape(1) - num_low_bytes) / kQuad;
    matrix.num_blocks = scales.size() / kAnalysisComponents;
    matrix.entries = reinterpret_cast<const int8_t*>(entries.data());
    matrix.low_entries = reinterpret_cast<const int8_t*>(low_entries.data());
    matrix.scales = scales.data();
    matrix.corrections = corrections.data();
    matrix.low_corrections = low_corrections.data();
    const int64_t num_entries = matrix.num_blocks * kAnalysisComponents;
    if (num_channels < 1 || rows.shape(1) < num_low_bytes + num_channels || rows.shape(1) > kMaxByteChannels ||
        scales.size() != num_entries || corrections.size() != num_entries || matrix.num_fine > num_entries ||
        matrix.num_fine % kAnalysisComponents != 0 || entries.size() != num_entries * kQuad * matrix.num_quads ||
        low_entries.size() != matrix.num_fine * rows.shape(1))
        throw ValueError("a part of the matrix has another size");
    std::vector<Excess> excess(left.shape(0));
    if (!excess.empty()) std::memcpy(excess.data(), left.data(), excess.size() * sizeof(Excess));
    for (const Excess& one : excess)
        if (one.token < 0 || one.token >= rows.shape(0) || one.channel < 0 || one.channel >= kQuad * matrix.num_quads)
            throw ValueError("an excess is of no token or channel");
    const Reference items = python::to_tuple(level_list);
    std::vector<LevelComponents> levels;
    std::vector<std::unique_ptr<Array<int32_t>>> kept;
    for (Py_ssize_t i = 0; i < PyTuple_Size(items.get()); ++i) {
        PyObject* const item = PyTuple_GetItem(items.get(), i);
        if (!PyTuple_Check(item) || PyTuple_Size(item) != 2) throw ValueError("a level is a tuple of two");
        const double ratio = PyFloat_AsDouble(PyTuple_GetItem(item, 0));
        if (ratio == -1.0 && PyErr_Occurred() != nullptr) throw python::Error{};
        kept.push_back(std::make_unique<Array<int32_t>>(PyTuple_GetItem(item, 1), "components", true));
        const Array<int32_t>& components = *kept.back();
        if (components.num_dimensions() != 2 || components.shape(0) != rows.shape(0) ||
            components.shape(1) > num_entries || (i > 0 && components.shape(1) < levels.back().num_components))
            throw ValueError("a level's components have another shape");
        levels.push_back({static_cast<float>(ratio), components.shape(1), components.mutable_data()});
    }
    const NewArray<uint8_t> misfits({rows.shape(0)});
    {
        const UnlockedInterpreter unlocked;
        multiply_bytes(*kernels.byte_analysis, rows.data(), rows.shape(0), excess, matrix, max_square, levels,
                       num_threads, misfits.data());
    }
    return Reference::borrow(misfits.get());
}

}  // namespace cachegen
