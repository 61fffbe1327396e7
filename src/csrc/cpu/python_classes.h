// The classes of cachegen._native, TableSet and Plane, and the arguments that functions of the module share.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "arithmetic_coder.h"
#include "cpu/cpu_kernels.h"
#include "cpu/planes.h"
#include "cpu/python_interface.h"
#include "cpu/table_set.h"

namespace cachegen {

using python::Arguments;
using python::Array;
using python::NewArray;
using python::Reference;
using python::UnlockedInterpreter;
using python::ValueError;

// What the module defines, as long as it lives; there is one interpreter.
inline PyTypeObject* table_set_type = nullptr;
inline PyTypeObject* plane_type = nullptr;
inline PyObject* cpu_path_type = nullptr;

// --- classes: what holds a native value ------------------------------------------------------------------------------

// An object of `table_set_type`.
struct TableSetObject {
    PyObject_HEAD TableSet* tables;
};

// An object of `plane_type`; it keeps its tables.
struct PlaneObject {
    PyObject_HEAD Plane* plane;
    PyObject* tables;
};

inline void free_object(PyObject* self) {
    PyTypeObject* const type = Py_TYPE(self);
    const auto free = reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free));
    free(self);
    Py_DECREF(reinterpret_cast<PyObject*>(type));
}

inline Reference allocate_object(PyTypeObject* type) {
    return Reference(reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0));
}

inline Reference wrap(TableSet&& tables) {
    Reference object = allocate_object(table_set_type);
    reinterpret_cast<TableSetObject*>(object.get())->tables = new TableSet(std::move(tables));
    return object;
}

inline const TableSet& to_tables(PyObject* object) {
    if (PyObject_TypeCheck(object, table_set_type)) return *reinterpret_cast<TableSetObject*>(object)->tables;
    PyErr_SetString(PyExc_TypeError, "`tables` must be a TableSet");
    throw python::Error{};
}

inline const TableSet* to_optional_tables(PyObject* object) { return object == Py_None ? nullptr : &to_tables(object); }

// The planes of a list. They are copied; the tuple keeps what they point to.
inline std::vector<Plane> to_planes(const Reference& tuple) {
    std::vector<Plane> planes(PyTuple_Size(tuple.get()));
    for (size_t i = 0; i < planes.size(); ++i) {
        PyObject* const item = PyTuple_GetItem(tuple.get(), static_cast<Py_ssize_t>(i));
        if (!PyObject_TypeCheck(item, plane_type)) {
            PyErr_SetString(PyExc_TypeError, "`planes` must be a sequence of Plane");
            throw python::Error{};
        }
        planes[i] = *reinterpret_cast<PlaneObject*>(item)->plane;
    }
    return planes;
}

inline const CpuKernels& to_path(PyObject* object) {
    if (PyObject_IsInstance(object, cpu_path_type) != 1) {
        if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_TypeError, "`path` must be a CpuPath");
        throw python::Error{};
    }
    const Reference value(PyObject_GetAttrString(object, "value"));
    return *cpu_paths()[python::to_int64(value.get())];
}

inline const CpuKernels& to_kernels(PyObject* object) {
    const CpuKernels& kernels = to_path(object);
    if (!kernels.is_supported()) throw ValueError("this processor does not support the path");
    return kernels;
}

// --- TableSet --------------------------------------------------------------------------------------------------------

inline Reference from_frequencies(const Arguments& arguments) {
    static const char* const kNames[] = {"frequencies", nullptr};
    PyObject* object;
    arguments.read("O:from_frequencies", kNames, &object);
    const Array<uint16_t> frequencies(object, "frequencies");
    if (frequencies.num_dimensions() != 2 || frequencies.shape(1) != kTableSize)
        throw ValueError("frequencies must be [num_tables, 32]");
    return wrap(TableSet::from_frequencies(frequencies.data(), frequencies.shape(0)));
}

inline Reference parse_tables(const Arguments& arguments) {
    static const char* const kNames[] = {"bytes",          "plane_bytes", "plane_channels",
                                         "alphabet_sizes", "num_threads", nullptr};
    PyObject *object, *sizes, *channels, *alphabets;
    int num_threads;
    arguments.read("OOOOi:parse", kNames, &object, &sizes, &channels, &alphabets, &num_threads);
    const Array<uint8_t> bytes(object, "bytes");
    const std::vector<int64_t> plane_bytes = python::to_integers(sizes), plane_channels = python::to_integers(channels),
                               alphabet_sizes = python::to_integers(alphabets);
    const auto parse = [&] {
        const UnlockedInterpreter unlocked;
        return TableSet::parse(bytes.data(), bytes.size(), plane_bytes, plane_channels, alphabet_sizes, num_threads);
    };
    return wrap(parse());
}

inline PyObject* num_tables_of(PyObject* self, void*) {
    return PyLong_FromLongLong(reinterpret_cast<TableSetObject*>(self)->tables->num_tables());
}

inline PyObject* frequencies_of(PyObject* self, PyObject*) {
    return python::call_guarded([&] {
        const TableSet& tables = *reinterpret_cast<TableSetObject*>(self)->tables;
        const NewArray<uint16_t> result({tables.num_tables(), kTableSize});
        for (int64_t index = 0; index < tables.num_tables(); ++index)
            std::memcpy(result.data() + index * kTableSize, tables.data()[index].frequency,
                        sizeof tables.data()[index].frequency);
        return Reference::borrow(result.get());
    });
}

inline void free_table_set(PyObject* self) {
    delete reinterpret_cast<TableSetObject*>(self)->tables;
    free_object(self);
}

// A TableSet is made by its static methods only.
inline PyObject* refuse_new(PyTypeObject*, PyObject*, PyObject*) {
    PyErr_SetString(PyExc_TypeError, "a TableSet is made by from_frequencies or parse");
    return nullptr;
}

inline PyTypeObject* make_table_set_type() {
    static PyMethodDef methods[] = {python::describe_function<from_frequencies>("from_frequencies", METH_STATIC),
                                    python::describe_function<parse_tables>("parse", METH_STATIC),
                                    {"frequencies", frequencies_of, METH_NOARGS, nullptr},
                                    {nullptr, nullptr, 0, nullptr}};
    static PyGetSetDef properties[] = {{"num_tables", num_tables_of, nullptr, nullptr, nullptr},
                                       {nullptr, nullptr, nullptr, nullptr, nullptr}};
    static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(refuse_new)},
                                  {Py_tp_dealloc, reinterpret_cast<void*>(free_table_set)},
                                  {Py_tp_methods, methods},
                                  {Py_tp_getset, properties},
                                  {0, nullptr}};
    static PyType_Spec spec = {"cachegen._native.TableSet", sizeof(TableSetObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return reinterpret_cast<PyTypeObject*>(Reference(PyType_FromSpec(&spec)).release());
}

// --- Plane -----------------------------------------------------------------------------------------------------------

// Point a plane at its tables; null tables mean coder `packed`.
inline void set_tables(Plane& plane, const TableSet* tables, int64_t first_table, int64_t num_tables) {
    if (tables == nullptr) return;
    if (first_table < 0 || num_tables < plane.num_channels() || first_table > tables->num_tables() ||
        num_tables > tables->num_tables() - first_table)
        throw ValueError("the plane's tables lie outside the table set");
    plane.coding.tables = tables->data() + first_table;
    plane.coding.table_traits = tables->traits() + first_table;
    plane.coding.num_tables = num_tables;
}

// Make coder `ac` of `rans`, or refuse.
inline void set_arithmetic(PlaneCoding& coding, bool is_arithmetic, int64_t num_tokens) {
    if (is_arithmetic && (coding.tables == nullptr || num_tokens > kMaxCodeTokens))
        throw ValueError("coder ac takes tables and at most 16384 tokens");
    coding.is_arithmetic = is_arithmetic;
}

inline uint8_t* to_address(PyObject* number) {
    void* const address = PyLong_AsVoidPtr(number);
    if (address == nullptr && PyErr_Occurred() != nullptr) throw python::Error{};
    return static_cast<uint8_t*>(address);
}

inline PyObject* new_plane(PyTypeObject* type, PyObject* positional, PyObject* keywords) {
    static const char* const kNames[] = {
        "values",   "token_stride",      "head_stride", "num_heads",   "head_dim",   "scales",        "num_bins",
        "low_bits", "tokens_per_stream", "tables",      "first_table", "num_tables", "is_arithmetic", nullptr};
    return python::call_guarded([&] {
        if (PyTuple_Size(positional) != 0) {
            PyErr_SetString(PyExc_TypeError, "a Plane takes keyword arguments only");
            throw python::Error{};
        }
        PyObject *values, *scales, *tables;
        long long token_stride, head_stride, num_heads, head_dim, tokens_per_stream, first_table, num_tables;
        int num_bins, low_bits, is_arithmetic = 0;
        Arguments{positional, keywords}.read("OLLLLOiiLOLL|p:Plane", kNames, &values, &token_stride, &head_stride,
                                             &num_heads, &head_dim, &scales, &num_bins, &low_bits, &tokens_per_stream,
                                             &tables, &first_table, &num_tables, &is_arithmetic);
        Plane plane;
        plane.values = to_address(values);
        plane.token_stride = token_stride;
        plane.head_stride = head_stride;
        plane.num_heads = num_heads;
        plane.head_dim = head_dim;
        plane.scales = to_address(scales);
        plane.num_bins = num_bins;
        plane.tokens_per_stream = tokens_per_stream;
        plane.coding.low_bits = low_bits;
        set_tables(plane, to_optional_tables(tables), first_table, num_tables);
        set_arithmetic(plane.coding, is_arithmetic != 0, tokens_per_stream);
        Reference object = allocate_object(type);
        auto* const made = reinterpret_cast<PlaneObject*>(object.get());
        made->plane = new Plane(plane);
        made->tables = Py_NewRef(tables);
        return object;
    });
}

inline void free_plane(PyObject* self) {
    delete reinterpret_cast<PlaneObject*>(self)->plane;
    Py_XDECREF(reinterpret_cast<PlaneObject*>(self)->tables);
    free_object(self);
}

inline PyTypeObject* make_plane_type() {
    static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(new_plane)},
                                  {Py_tp_dealloc, reinterpret_cast<void*>(free_plane)},
                                  {0, nullptr}};
    static PyType_Spec spec = {"cachegen._native.Plane", sizeof(PlaneObject), 0, Py_TPFLAGS_DEFAULT, slots};
    return reinterpret_cast<PyTypeObject*>(Reference(PyType_FromSpec(&spec)).release());
}

}  // namespace cachegen
