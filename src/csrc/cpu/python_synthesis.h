// The inverse transform's arguments, as Python gives them, checked before the kernels rely on them.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/python_interface.h"
#include "cpu/synthesis.h"

namespace cachegen {

// The planes of a group of layers: a sequence of tuples (address, token stride, head stride, number of heads, head dim,
// cosines, sines, offset, whether pairs are interleaved); cosines and sines are float32 [num_tokens, number of pairs].
// Keeps the arrays.
class SynthesisPlaneArrays {
  public:
    SynthesisPlaneArrays(PyObject* sequence, int64_t num_tokens) : tuple_(python::to_tuple(sequence)) {
        for (Py_ssize_t i = 0; i < PyTuple_Size(tuple_.get()); ++i) add(PyTuple_GetItem(tuple_.get(), i), num_tokens);
    }

    const std::vector<SynthesisPlane>& get() const { return planes_; }
    int64_t num_blocks() const {
        int64_t total = 0;
        for (const SynthesisPlane& plane : planes_) total += plane.num_blocks();
        return total;
    }

  private:
    void add(PyObject* object, int64_t num_tokens) {
        if (!PyTuple_Check(object) || PyTuple_Size(object) != 9) throw python::ValueError("a plane is a tuple of nine");
        const auto number = [&](Py_ssize_t index) { return python::to_int64(PyTuple_GetItem(object, index)); };
        const auto array = [&](Py_ssize_t index) -> const python::Array<float>& {
            angles_.push_back(std::make_unique<python::Array<float>>(PyTuple_GetItem(object, index),
                                                                     index == 5 ? "cosines" : "sines"));
            return *angles_.back();
        };
        const python::Array<float>&cosines = array(5), &sines = array(6);
        SynthesisPlane plane;
        plane.values = reinterpret_cast<uint16_t*>(number(0));
        plane.token_stride = number(1);
        plane.head_stride = number(2);
        plane.num_heads = number(3);
        plane.head_dim = number(4);
        plane.cosines = cosines.data();
        plane.sines = sines.data();
        plane.offset = number(7);
        plane.is_interleaved = number(8) != 0;
        if (plane.num_heads < 1 || plane.head_dim < 1) throw python::ValueError("a plane has no channels");
        if (cosines.num_dimensions() != 2 || cosines.shape(0) != num_tokens || sines.num_dimensions() != 2 ||
            sines.shape(0) != num_tokens || sines.shape(1) != cosines.shape(1))
            throw python::ValueError("cosines and sines must be [num_tokens, number of pairs]");
        plane.num_pairs = cosines.shape(1);
        if (plane.offset < 0 || plane.offset + 2 * plane.num_pairs > plane.head_dim)
            throw python::ValueError("a head has fewer dims than its pairs");
        planes_.push_back(plane);
    }

    const python::Reference tuple_;
    std::vector<std::unique_ptr<python::Array<float>>> angles_;
    std::vector<SynthesisPlane> planes_;
};

// A matrix: a tuple (number of components, of dense ones, of fine ones, dense, fine and sparse rows uint8, factors and
// means float32); see SynthesisMatrix. Keeps the arrays.
class SynthesisMatrixArrays {
  public:
    SynthesisMatrixArrays(PyObject* object, int64_t num_blocks)
        : tuple_(python::to_tuple(object)),
          dense_(part(3), "dense"),
          fine_(part(4), "fine"),
          sparse_(part(5), "sparse"),
          factors_(part(6), "factors"),
          means_(part(7), "means") {
        matrix_.num_components = python::to_int64(part(0));
        matrix_.num_dense = python::to_int64(part(1));
        matrix_.num_fine = python::to_int64(part(2));
        if (matrix_.num_components < 0 || matrix_.num_dense < 0 || matrix_.num_fine < 0 ||
            matrix_.num_dense % kQuad != 0 || matrix_.num_fine % kQuad != 0 || matrix_.num_fine > matrix_.num_dense ||
            matrix_.num_dense >= matrix_.num_components + kQuad)
            throw python::ValueError("numbers of components are out of range");
        const int64_t num_channels = num_blocks * kBlockChannels;
        if (dense_.size() != num_channels * matrix_.num_dense || fine_.size() != num_channels * matrix_.num_fine ||
            sparse_.size() != num_channels * matrix_.num_sections() * kSectionRows || factors_.size() != num_channels ||
            means_.size() != num_channels)
            throw python::ValueError("a part of the matrix has another size");
        matrix_.dense = dense_.data();
        matrix_.fine = fine_.data();
        matrix_.sparse = sparse_.data();
        matrix_.factors = factors_.data();
        matrix_.means = means_.data();
    }

    const SynthesisMatrix& get() const { return matrix_; }

  private:
    PyObject* part(Py_ssize_t index) const {
        if (PyTuple_Size(tuple_.get()) != 8) throw python::ValueError("a matrix is a tuple of eight");
        return PyTuple_GetItem(tuple_.get(), index);
    }

    const python::Reference tuple_;
    const python::Array<uint8_t> dense_, fine_, sparse_;
    const python::Array<float> factors_, means_;
    SynthesisMatrix matrix_;
};

}  // namespace cachegen
