// The model of method `lossless` as Python gives it, checked before the coder relies on it.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

#include "cpu/lossless.h"
#include "cpu/python_interface.h"

namespace cachegen {

using python::Array;
using python::ValueError;

// What cachegen/methods/lossless/model.py gives: a tuple of arrays and whether values are float16. Checks all of it,
// and keeps the arrays, which the model points into.
class LosslessModel {
  public:
    explicit LosslessModel(PyObject* parts)
        : channels_(part(parts, 0), "channels"),
          layers_(part(parts, 1), "layers"),
          weights_(part(parts, 2), "weights"),
          frequencies_(part(parts, 3), "frequencies"),
          turns_(part(parts, 4), "turns"),
          pairs_(part(parts, 5), "pairs") {
        if (channels_.num_dimensions() != 2 || channels_.shape(1) != 6 || layers_.num_dimensions() != 2 ||
            layers_.shape(1) != 4 || frequencies_.size() != layers_.shape(0) * 2 * lossless::kNumSymbols ||
            turns_.num_dimensions() != 2 || turns_.shape(1) != 2 || pairs_.num_dimensions() != 2 ||
            pairs_.shape(0) != channels_.shape(0) || pairs_.shape(1) != 2)
            throw ValueError("an array of the model has another shape");
        model_.is_float16 = PyObject_IsTrue(part(parts, 6)) == 1;
        for (int64_t i = 0; i < turns_.shape(0); ++i)
            model_.turns.push_back(uint64_t{turns_.at(i, 1)} << 32 | turns_.at(i, 0));
        for (int64_t i = 0; i < channels_.shape(0); ++i) add_channel(i);
        int64_t first = 0, used = 0;
        for (int64_t i = 0; i < layers_.shape(0); ++i) add_layer(i, first, used);
        if (first != channels_.shape(0) || used != weights_.size())
            throw ValueError("the layers have other channels or weights than there are");
    }

    const lossless::Model& get() const { return model_; }

  private:
    static PyObject* part(PyObject* parts, Py_ssize_t index) {
        if (!PyTuple_Check(parts) || PyTuple_Size(parts) != 7) throw ValueError("a model is a tuple of seven");
        return PyTuple_GetItem(parts, index);
    }

    void add_channel(int64_t i) {
        const lossless::Channel channel = {channels_.at(i, 0), channels_.at(i, 1), channels_.at(i, 2),
                                           channels_.at(i, 3), channels_.at(i, 4), channels_.at(i, 5),
                                           pairs_.at(i, 0),    pairs_.at(i, 1)};
        if (std::abs(int64_t{channel.mean}) > int64_t{1} << 30 || channel.shift < 0 || channel.shift > 62 ||
            std::abs(channel.exponent) > 100 || channel.history_shift < 0 || channel.history_shift > 40 ||
            channel.step < 1 || channel.step > lossless::kMaxStep)
            throw ValueError("channel " + std::to_string(i) + " has a parameter out of range");
        model_.channels.push_back(channel);
    }

    void add_layer(int64_t i, int64_t& first, int64_t& used) {
        const int64_t key_channels = layers_.at(i, 0), value_channels = layers_.at(i, 1);
        const int64_t before = layers_.at(i, 2);
        const std::string name = "layer " + std::to_string(i);
        if (key_channels < 1 || value_channels < 1 || key_channels + value_channels > channels_.shape(0) - first)
            throw ValueError(name + " has other channels than the model");
        const int64_t num_channels = key_channels + value_channels;
        const bool has_weights = layers_.at(i, 3) != 0;
        if (before < 0 || before > first || (has_weights && before + num_channels > lossless::kMaxContext))
            throw ValueError(name + " has a context out of range");
        const int64_t num_weights = has_weights ? num_channels * (before + num_channels) : 0;
        if (num_weights > weights_.size() - used) throw ValueError(name + " has too few weights");
        const uint16_t* frequencies = frequencies_.data() + i * 2 * lossless::kNumSymbols;
        for (int kind = 0; kind < 2; ++kind) {
            uint32_t total = 0;
            for (int symbol = 0; symbol < lossless::kNumSymbols; ++symbol) {
                const uint32_t frequency = frequencies[kind * lossless::kNumSymbols + symbol];
                if (frequency == 0) throw ValueError(name + " has a symbol without frequency");
                total += frequency;
            }
            if (total != kFrequencyTotal) throw ValueError(name + " has frequencies of another sum");
        }
        check_pairs(name, first, key_channels);
        check_pairs(name, first + key_channels, value_channels);
        const auto* weights = reinterpret_cast<const int8_t*>(weights_.data()) + used;
        model_.layers.push_back(
            {first, num_channels, first - before, has_weights ? weights : nullptr, key_channels, frequencies});
        first += num_channels;
        used += num_weights;
    }

    // Every first channel of a pair has a second one in its plane, which no other has, and a turn.
    void check_pairs(const std::string& name, int64_t begin, int64_t count) const {
        std::vector<bool> is_second(count, false);
        for (int64_t i = 0; i < count; ++i) {
            const lossless::Channel& channel = model_.channels[begin + i];
            if (channel.distance <= 0) continue;
            if (channel.distance >= count - i || channel.turn < 0 ||
                channel.turn >= static_cast<int64_t>(model_.turns.size()) ||
                model_.channels[begin + i + channel.distance].distance >= 0 || is_second[i + channel.distance])
                throw ValueError(name + " has a pair of other channels");
            is_second[i + channel.distance] = true;
        }
        for (int64_t i = 0; i < count; ++i)
            if ((model_.channels[begin + i].distance < 0) != is_second[i]) throw ValueError(name + " has half a pair");
    }

    Array<int32_t> channels_, layers_;
    Array<uint8_t> weights_;
    Array<uint16_t> frequencies_;
    Array<uint32_t> turns_;
    Array<int32_t> pairs_;
    lossless::Model model_;
};

lossless::Values to_values(const Array<uint16_t>& array, const lossless::Model& model, long long first_token) {
    const auto num_channels = static_cast<int64_t>(model.channels.size());
    if (array.num_dimensions() != 2 || array.shape(1) != num_channels || array.shape(0) < 1)
        throw ValueError("values must be [num_tokens, " + std::to_string(num_channels) + "]");
    return {array.mutable_data(), array.shape(0), num_channels, first_token};
}

}  // namespace cachegen
