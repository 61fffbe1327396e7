// The CUDA kernels as the Python module torchac_cuda.
//
// No torch here, and no CUDA header: tensors arrive as addresses and sizes, the stream as a number, and
// cachegen/coder/cuda.py makes every check. Nothing waits for the GPU. The runtime is linked statically, so that the
// module imports, and says what is missing, on a machine without a driver.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cuda/launch.h"

namespace py = pybind11;

namespace cachegen {
namespace cuda {
namespace {

template <class Value>
Value* at(uintptr_t address) {
    return reinterpret_cast<Value*>(address);
}

Launch make_launch(int device, uintptr_t stream, int dtype, uintptr_t planes, int64_t num_planes, int num_tokens,
                   int max_streams, uintptr_t tables) {
    return {device,     at<void>(stream), dtype,       at<const PlaneRecord>(planes),
            num_planes, num_tokens,       max_streams, at<const uint32_t>(tables)};
}

void raise_problem(const char* problem) {
    if (problem != nullptr) throw std::runtime_error(problem);
}

void find_scales(const Launch& launch, uintptr_t bad_tokens) {
    raise_problem(launch_find_scales(launch, at<uint32_t>(bad_tokens)));
}

void count_symbols(const Launch& launch, int64_t max_channels, uintptr_t counts) {
    raise_problem(launch_count_symbols(launch, max_channels, at<uint32_t>(counts)));
}

void encode(const Launch& launch, uintptr_t slots, uintptr_t streams, uintptr_t statuses) {
    raise_problem(launch_encode(launch, at<uint8_t>(slots), at<StreamRecord>(streams), at<int32_t>(statuses)));
}

void compact(const Launch& launch, uintptr_t slots, uintptr_t streams, uintptr_t payload, int64_t payload_bytes) {
    raise_problem(launch_compact(launch, at<const uint8_t>(slots), at<const StreamRecord>(streams),
                                 at<uint8_t>(payload), payload_bytes));
}

void decode(const Launch& launch, uintptr_t payload, int64_t payload_bytes, uintptr_t streams, uintptr_t statuses) {
    raise_problem(launch_decode(launch, at<const uint8_t>(payload), payload_bytes, at<const StreamRecord>(streams),
                                at<int32_t>(statuses)));
}

void encode_codes(const Launch& launch, uintptr_t slots, uintptr_t streams, uintptr_t statuses) {
    raise_problem(launch_encode_codes(launch, at<uint8_t>(slots), at<StreamRecord>(streams), at<int32_t>(statuses)));
}

void compact_codes(const Launch& launch, uintptr_t slots, uintptr_t streams, uintptr_t payload, int64_t payload_bytes) {
    raise_problem(launch_compact_codes(launch, at<const uint8_t>(slots), at<const StreamRecord>(streams),
                                       at<uint8_t>(payload), payload_bytes));
}

void decode_codes(const Launch& launch, uintptr_t payload, int64_t payload_bytes, uintptr_t streams,
                  uintptr_t statuses) {
    raise_problem(launch_decode_codes(launch, at<const uint8_t>(payload), payload_bytes,
                                      at<const StreamRecord>(streams), at<int32_t>(statuses)));
}

ComponentLaunch make_component_launch(int device, uintptr_t stream, uintptr_t groups, int64_t num_groups,
                                      int num_tokens, int max_streams, uintptr_t components, uintptr_t tables,
                                      int num_tables) {
    return {device,     at<void>(stream), at<const GroupRecord>(groups),         num_groups,
            num_tokens, max_streams,      at<const ComponentRecord>(components), at<const uint32_t>(tables),
            num_tables};
}

void encode_components(const ComponentLaunch& launch, uintptr_t slots, uintptr_t streams, uintptr_t statuses) {
    raise_problem(
        launch_encode_components(launch, at<uint8_t>(slots), at<StreamRecord>(streams), at<int32_t>(statuses)));
}

void compact_components(const ComponentLaunch& launch, uintptr_t slots, uintptr_t streams, uintptr_t payload,
                        int64_t payload_bytes) {
    raise_problem(launch_compact_components(launch, at<const uint8_t>(slots), at<const StreamRecord>(streams),
                                            at<uint8_t>(payload), payload_bytes));
}

void decode_components(const ComponentLaunch& launch, uintptr_t payload, int64_t payload_bytes, uintptr_t streams,
                       uintptr_t statuses) {
    raise_problem(launch_decode_components(launch, at<const uint8_t>(payload), payload_bytes,
                                           at<const StreamRecord>(streams), at<int32_t>(statuses)));
}

void split_digits(int device, uintptr_t stream, uintptr_t components, int64_t group_stride, int64_t token_stride,
                  int num_groups, int num_tokens, int num_components, int num_large, uintptr_t digits,
                  uintptr_t beyond) {
    raise_problem(launch_split_digits({device, at<void>(stream), at<const int32_t>(components), group_stride,
                                       token_stride, num_groups, num_tokens, num_components, num_large,
                                       at<uint16_t>(digits), at<uint32_t>(beyond)}));
}

PlaneKind make_kind(int num_heads, int head_dim, int offset, int num_pairs, bool is_interleaved, float scaling,
                    uintptr_t cosines, uintptr_t sines) {
    return {num_heads,
            head_dim,
            offset,
            num_pairs,
            is_interleaved,
            scaling,
            at<const float>(cosines),
            at<const float>(sines)};
}

// planes: PlacedPlanes, field by field.
void place_vectors(int device, uintptr_t stream, int dtype, uintptr_t product, uintptr_t means, float step,
                   int num_layers, int num_tokens, const PlaneKind& keys, const PlaneKind& values,
                   const std::vector<int64_t>& planes) {
    std::vector<PlacedPlane> placed(planes.size() / kPlacedFields);
    for (size_t i = 0; i < placed.size(); ++i)
        placed[i] = {planes[kPlacedFields * i], planes[kPlacedFields * i + 1], planes[kPlacedFields * i + 2]};
    const PlaceLaunch launch{
        device,     at<void>(stream), dtype,         at<const float>(product), at<const float>(means), step,
        num_layers, num_tokens,       {keys, values}};
    raise_problem(launch_place_vectors(launch, placed.data(), static_cast<int64_t>(placed.size())));
}

}  // namespace

PYBIND11_MODULE(torchac_cuda, module) {
    module.doc() = "CUDA kernels of CacheGen; use them through cachegen.coder.cuda.";
    module.attr("PLANE_FIELDS") = kPlaneFields;
    module.attr("STREAM_FIELDS") = kStreamFields;
    module.attr("MAX_COMPONENT_TABLES") = kMaxComponentTables;

    py::class_<Launch>(module, "Launch", py::module_local())
        .def(py::init(&make_launch), py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("dtype"),
             py::arg("planes"), py::arg("num_planes"), py::arg("num_tokens"), py::arg("max_streams"),
             py::arg("tables"));
    module.def("find_problem", [](int device) {
        const char* problem = find_problem(device);
        return problem == nullptr ? py::object(py::none()) : py::object(py::str(problem));
    });
    module.def("slot_bytes", [](int64_t num_tokens, int64_t num_channels, int64_t low_bits, bool has_tables) {
        return slot_bytes({num_tokens, num_channels}, low_bits, has_tables);
    });
    module.def("find_scales", &find_scales, py::arg("launch"), py::arg("bad_tokens"));
    module.def("count_symbols", &count_symbols, py::arg("launch"), py::arg("max_channels"), py::arg("counts"));
    module.def("encode", &encode, py::arg("launch"), py::arg("slots"), py::arg("streams"), py::arg("statuses"));
    module.def("compact", &compact, py::arg("launch"), py::arg("slots"), py::arg("streams"), py::arg("payload"),
               py::arg("payload_bytes"));
    module.def("decode", &decode, py::arg("launch"), py::arg("payload"), py::arg("payload_bytes"), py::arg("streams"),
               py::arg("statuses"));
    module.def("code_slot_bytes", [](int64_t num_tokens, int64_t num_channels, int64_t low_bits) {
        return code_slot_bytes({num_tokens, num_channels}, low_bits);
    });
    module.def("encode_codes", &encode_codes, py::arg("launch"), py::arg("slots"), py::arg("streams"),
               py::arg("statuses"));
    module.def("compact_codes", &compact_codes, py::arg("launch"), py::arg("slots"), py::arg("streams"),
               py::arg("payload"), py::arg("payload_bytes"));
    module.def("decode_codes", &decode_codes, py::arg("launch"), py::arg("payload"), py::arg("payload_bytes"),
               py::arg("streams"), py::arg("statuses"));

    py::class_<ComponentLaunch>(module, "ComponentLaunch", py::module_local())
        .def(py::init(&make_component_launch), py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("groups"),
             py::arg("num_groups"), py::arg("num_tokens"), py::arg("max_streams"), py::arg("components"),
             py::arg("tables"), py::arg("num_tables"));
    module.def("component_slot_bytes", [](int64_t num_tokens, int64_t num_components, int64_t low_bits_of_token) {
        return component_slot_bytes({num_tokens, num_components}, low_bits_of_token);
    });
    module.def("encode_components", &encode_components, py::arg("launch"), py::arg("slots"), py::arg("streams"),
               py::arg("statuses"));
    module.def("compact_components", &compact_components, py::arg("launch"), py::arg("slots"), py::arg("streams"),
               py::arg("payload"), py::arg("payload_bytes"));
    module.def("decode_components", &decode_components, py::arg("launch"), py::arg("payload"), py::arg("payload_bytes"),
               py::arg("streams"), py::arg("statuses"));

    module.def("split_digits", &split_digits, py::kw_only(), py::arg("device"), py::arg("stream"),
               py::arg("components"), py::arg("group_stride"), py::arg("token_stride"), py::arg("num_groups"),
               py::arg("num_tokens"), py::arg("num_components"), py::arg("num_large"), py::arg("digits"),
               py::arg("beyond"));
    py::class_<PlaneKind>(module, "PlaneKind", py::module_local())
        .def(py::init(&make_kind), py::kw_only(), py::arg("num_heads"), py::arg("head_dim"), py::arg("offset"),
             py::arg("num_pairs"), py::arg("is_interleaved"), py::arg("scaling"), py::arg("cosines"), py::arg("sines"));
    module.def("place_vectors", &place_vectors, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("dtype"),
               py::arg("product"), py::arg("means"), py::arg("step"), py::arg("num_layers"), py::arg("num_tokens"),
               py::arg("keys"), py::arg("values"), py::arg("planes"));
}

}  // namespace cuda
}  // namespace cachegen
