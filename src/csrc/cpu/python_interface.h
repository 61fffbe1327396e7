// What the bindings need of Python's C interface: objects that are released, errors as exceptions, NumPy arrays.
//
// By hand, because a library of templates for it takes longer to compile than all kernels together. Of Python only what
// its limited interface has, so that one build serves every Python from 3.11 on; of NumPy only the buffer protocol.

#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cachegen::python {

// Thrown where Python's error is set already.
struct Error {};

// A bad argument: becomes Python's ValueError.
using ValueError = std::invalid_argument;

// A reference that is held; null only where default-constructed or moved from.
class Reference {
  public:
    Reference() = default;
    // Take over a new reference; null means that a call failed.
    explicit Reference(PyObject* object) : object_(object) {
        if (object == nullptr) throw Error{};
    }
    static Reference borrow(PyObject* object) { return Reference(Py_NewRef(object)); }
    Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Reference& operator=(Reference&& other) noexcept {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Reference() { Py_XDECREF(object_); }

    PyObject* get() const { return object_; }
    PyObject* release() { return std::exchange(object_, nullptr); }

  private:
    PyObject* object_ = nullptr;
};

// Lets other Python threads run as long as it lives.
class UnlockedInterpreter {
  public:
    UnlockedInterpreter() : state_(PyEval_SaveThread()) {}
    ~UnlockedInterpreter() { PyEval_RestoreThread(state_); }
    UnlockedInterpreter(const UnlockedInterpreter&) = delete;

  private:
    PyThreadState* state_;
};

// Run work(), which returns a Reference, and turn what it throws into a Python error.
template <class Work>
PyObject* call_guarded(Work&& work) noexcept {
    try {
        return work().release();
    } catch (const Error&) {
    } catch (const ValueError& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// What a function was called with.
struct Arguments {
    PyObject* positional;
    PyObject* keywords;

    // Read them as PyArg_ParseTupleAndKeywords does; `names` ends with a null.
    template <class... Targets>
    void read(const char* format, const char* const* names, Targets*... targets) const {
        if (!PyArg_ParseTupleAndKeywords(positional, keywords, format, const_cast<char**>(names), targets...))
            throw Error{};
    }
};

// A function of the module, or a static method of a class of it.
template <Reference (*kFunction)(const Arguments&)>
PyMethodDef describe_function(const char* name, int flags = 0) {
    PyObject* (*const call)(PyObject*, PyObject*, PyObject*) = [](PyObject*, PyObject* positional, PyObject* keywords) {
        return call_guarded([&] { return kFunction(Arguments{positional, keywords}); });
    };
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
            METH_VARARGS | METH_KEYWORDS | flags, nullptr};
}

inline int64_t to_int64(PyObject* number) {
    const long long value = PyLong_AsLongLong(number);
    if (value == -1 && PyErr_Occurred() != nullptr) throw Error{};
    return value;
}

// Any sequence as a tuple, which keeps the items.
inline Reference to_tuple(PyObject* sequence) { return Reference(PySequence_Tuple(sequence)); }

inline std::vector<int64_t> to_integers(PyObject* sequence) {
    const Reference items = to_tuple(sequence);
    std::vector<int64_t> integers(PyTuple_Size(items.get()));
    for (size_t i = 0; i < integers.size(); ++i)
        integers[i] = to_int64(PyTuple_GetItem(items.get(), static_cast<Py_ssize_t>(i)));
    return integers;
}

inline Reference to_bytes(const std::vector<uint8_t>& content) {
    return Reference(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(content.data()),
                                               static_cast<Py_ssize_t>(content.size())));
}

// NumPy's name of an element's type, and the format characters that mean it.
template <class Element>
struct ElementType;
template <>
struct ElementType<uint8_t> {
    static constexpr const char *kName = "uint8", *kFormats = "B";
};
template <>
struct ElementType<uint16_t> {
    static constexpr const char *kName = "uint16", *kFormats = "H";
};
template <>
struct ElementType<uint32_t> {
    static constexpr const char *kName = "uint32", *kFormats = "IL";
};
template <>
struct ElementType<int16_t> {
    static constexpr const char *kName = "int16", *kFormats = "h";
};
template <>
struct ElementType<int32_t> {
    static constexpr const char *kName = "int32", *kFormats = "il";
};

template <>
struct ElementType<float> {
    static constexpr const char *kName = "float32", *kFormats = "f";
};

// The memory of an object with Python's buffer protocol, C-contiguous, as long as it lives. Does not move.
class Buffer {
  public:
    // Raises what the protocol raises, or TypeError where the elements are not `type_name`. An empty `formats` takes
    // any elements.
    Buffer(PyObject* object, const char* name, const char* type_name, const std::string& formats, size_t element_bytes,
           bool is_writable) {
        const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (is_writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object, &view_, flags) != 0) throw Error{};
        const std::string format = view_.format == nullptr ? "B" : view_.format;
        if (formats.empty() || (static_cast<size_t>(view_.itemsize) == element_bytes && format.size() == 1 &&
                                formats.find(format) != std::string::npos))
            return;
        PyErr_Format(PyExc_TypeError, "`%s` must be a C-contiguous array of %s, got elements of format '%s'", name,
                     type_name, format.c_str());
        PyBuffer_Release(&view_);
        throw Error{};
    }
    ~Buffer() { PyBuffer_Release(&view_); }
    Buffer(const Buffer&) = delete;

    int num_dimensions() const { return view_.ndim; }
    int64_t shape(int axis) const { return view_.shape[axis]; }
    int64_t num_bytes() const { return view_.len; }
    void* memory() const { return view_.buf; }

  private:
    Py_buffer view_;
};

// A NumPy array, or what else has a buffer of such elements.
template <class Element>
class Array : public Buffer {
  public:
    // `name` is the argument's, for errors.
    Array(PyObject* object, const char* name, bool is_writable = false)
        : Buffer(object, name, ElementType<Element>::kName, ElementType<Element>::kFormats, sizeof(Element),
                 is_writable) {}

    int64_t size() const { return num_bytes() / static_cast<int64_t>(sizeof(Element)); }
    const Element* data() const { return static_cast<const Element*>(memory()); }
    Element* mutable_data() const { return static_cast<Element*>(memory()); }
    const Element& at(int64_t row, int64_t column) const { return data()[row * shape(1) + column]; }
};

// A new NumPy array, to be filled. It begins with a cache line: vectors that cross lines take twice as long to load.
template <class Element>
class NewArray {
  public:
    explicit NewArray(std::initializer_list<int64_t> shape)
        : array_(make_array(shape)), content_(array_.get(), "", true) {}

    Element* data() const { return content_.mutable_data(); }
    // The object; its memory stays where it is.
    PyObject* get() const { return array_.get(); }

  private:
    static constexpr int64_t kLineBytes = 64;

    static Reference make_array(std::initializer_list<int64_t> shape) {
        const Reference sizes(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
        Py_ssize_t axis = 0;
        int64_t num_bytes = sizeof(Element);
        for (const int64_t size : shape) {
            num_bytes *= size;
            PyTuple_SetItem(sizes.get(), axis++, Reference(PyLong_FromLongLong(size)).release());
        }
        const Reference numpy(PyImport_ImportModule("numpy"));
        const Reference room(
            PyObject_CallMethod(numpy.get(), "empty", "Ls", static_cast<long long>(num_bytes + kLineBytes), "uint8"));
        const auto address = reinterpret_cast<uintptr_t>(Array<uint8_t>(room.get(), "").data());
        const auto begin = static_cast<long long>((kLineBytes - address % kLineBytes) % kLineBytes);
        const Reference first(PyLong_FromLongLong(begin)), end(PyLong_FromLongLong(begin + num_bytes));
        const Reference lines(PySlice_New(first.get(), end.get(), nullptr));
        const Reference bytes(PyObject_GetItem(room.get(), lines.get()));
        const Reference elements(PyObject_CallMethod(bytes.get(), "view", "s", ElementType<Element>::kName));
        return Reference(PyObject_CallMethod(elements.get(), "reshape", "O", sizes.get()));
    }

    Reference array_;
    Array<Element> content_;
};

}  // namespace cachegen::python
