// How components are coded, as Python gives it, checked before the coder relies on it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/components.h"
#include "cpu/decode_components.h"
#include "cpu/python_interface.h"
#include "cpu/table_set.h"

namespace cachegen {

// The coding of components: table indices uint16 and low bits uint8, one per component. Keeps the arrays, which the
// coding points into.
class ComponentCodingArrays {
  public:
    ComponentCodingArrays(const TableSet& tables, PyObject* table_indices, PyObject* low_bits, int64_t num_refined,
                          int64_t tokens_per_stream)
        : table_indices_(table_indices, "table_indices"), low_bits_(low_bits, "low_bits") {
        coding_.tables = tables.data();
        coding_.num_tables = tables.num_tables();
        coding_.table_indices = table_indices_.data();
        coding_.low_bits = low_bits_.data();
        coding_.num_components = table_indices_.size();
        coding_.num_refined = num_refined;
        if (low_bits_.size() != coding_.num_components)
            throw python::ValueError("one number of low bits per component");
        if (num_refined < 0 || num_refined > coding_.num_components)
            throw python::ValueError("num_refined is out of range");
        if (tokens_per_stream < 1 || tokens_per_stream % kNumLanes != 0 ||
            tokens_per_stream > int64_t{UINT32_MAX} / std::max<int64_t>(coding_.num_components, 1))
            throw python::ValueError("tokens_per_stream is out of range");
        for (int64_t c = 0; c < coding_.num_components; ++c) {
            if (coding_.table_indices[c] >= coding_.num_tables)
                throw python::ValueError("a table index is out of range");
            if (coding_.low_bits[c] > (c < num_refined ? 0 : kMaxLowBits))
                throw python::ValueError("low_bits out of range");
        }
    }

    const ComponentCoding& get() const { return coding_; }

  private:
    const python::Array<uint16_t> table_indices_;
    const python::Array<uint8_t> low_bits_;
    ComponentCoding coding_;
};

// Groups of components to be decoded: a sequence of tuples (components int32 [num_tokens, >= num_components], table
// indices, low bits, num_refined, tokens_per_stream). Keeps the arrays.
class ComponentGroupArrays {
  public:
    ComponentGroupArrays(const TableSet& tables, PyObject* sequence) : tuple_(python::to_tuple(sequence)) {
        for (Py_ssize_t i = 0; i < PyTuple_Size(tuple_.get()); ++i) add(tables, PyTuple_GetItem(tuple_.get(), i));
    }

    const std::vector<ComponentGroup>& get() const { return groups_; }
    int64_t num_streams() const {
        int64_t total = 0;
        for (const ComponentGroup& group : groups_) total += group.num_streams();
        return total;
    }

  private:
    void add(const TableSet& tables, PyObject* group) {
        if (!PyTuple_Check(group) || PyTuple_Size(group) != 5) throw python::ValueError("a group is a tuple of five");
        const auto part = [&](Py_ssize_t index) { return PyTuple_GetItem(group, index); };
        components_.push_back(std::make_unique<python::Array<int32_t>>(part(0), "components", true));
        const int64_t tokens_per_stream = python::to_int64(part(4));
        codings_.push_back(std::make_unique<ComponentCodingArrays>(tables, part(1), part(2), python::to_int64(part(3)),
                                                                   tokens_per_stream));
        const python::Array<int32_t>& components = *components_.back();
        const ComponentCoding& coding = codings_.back()->get();
        if (components.num_dimensions() != 2 || components.shape(1) < coding.num_components)
            throw python::ValueError("components has another shape");
        groups_.push_back(
            {{components.mutable_data(), components.shape(0), components.shape(1)}, coding, tokens_per_stream});
    }

    const python::Reference tuple_;
    std::vector<std::unique_ptr<python::Array<int32_t>>> components_;
    std::vector<std::unique_ptr<ComponentCodingArrays>> codings_;
    std::vector<ComponentGroup> groups_;
};

}  // namespace cachegen
