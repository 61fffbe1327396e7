// Any values and any damage: the paths of this processor encode to the same bytes, and decode to the same end.
//
// Planes of one shape, so that the vector kernels batch their streams. What an input has left after the shape is
// values, then damage to the payload: a position and a byte each time.

#include <cstring>

#include "cpu/decode_planes.h"
#include "cpu/encode_planes.h"
#include "fuzz_input.h"
#include "fuzz_kernels.h"

namespace cachegen {
namespace {

struct Document {
    std::vector<std::vector<uint8_t>> values, scales;
    std::vector<FrequencyTable> tables;
    std::vector<uint8_t> traits;
    std::vector<Plane> planes;
    int64_t num_tokens;
    int64_t num_values;  // of a plane, with padding between tokens

    Document(FuzzInput& input, size_t value_bytes) {
        // Mostly small ones, which are fast; some with several rows, tiles and batches.
        const int64_t num_planes = small_or_large(input.byte(), 4, 10);
        const int64_t num_heads = 1 + input.byte() % 3, head_dim = small_or_large(input.byte(), 12, 48);
        num_tokens = small_or_large(input.byte(), 40, 100);
        const int num_bins = 4 + 2 * static_cast<int>(input.byte() % 127);
        const uint32_t options = input.byte();
        const bool is_packed = options % 8 == 0;
        int low_bits = 0;
        while ((num_bins - 2) >> low_bits >= (is_packed ? 1 : kTableSize)) ++low_bits;
        const int64_t num_channels = num_heads * head_dim;
        const int64_t padding = options >> 3 & 3;
        num_values = num_tokens * (num_channels + padding);
        if (!is_packed) make_tables(input, num_planes * num_channels);
        values.assign(num_planes, std::vector<uint8_t>(num_values * value_bytes));
        scales.assign(num_planes, std::vector<uint8_t>(num_tokens * value_bytes));
        for (int64_t i = 0; i < num_planes; ++i) {
            Plane plane;
            plane.values = values[i].data();
            plane.token_stride = num_channels + padding;
            plane.head_stride = head_dim;
            plane.num_heads = num_heads;
            plane.head_dim = head_dim;
            plane.scales = scales[i].data();
            plane.num_bins = num_bins;
            plane.tokens_per_stream = 32 * (1 + (options >> 5));
            plane.coding.low_bits = low_bits;
            if (!is_packed) {
                plane.coding.tables = &tables[i * num_channels];
                plane.coding.table_traits = &traits[i * num_channels];
                plane.coding.num_tables = num_channels;
            }
            planes.push_back(plane);
        }
    }

    Document(const Document&) = delete;

  private:
    static int64_t small_or_large(uint32_t byte, uint32_t small, uint32_t large) {
        return 1 + byte % (byte < 224 ? small : large);
    }

    // Every symbol has a frequency, mostly: a table without one ends the run at encoding, on all paths.
    void make_tables(FuzzInput& input, int64_t num_tables) {
        uint32_t seed = input.byte();
        const uint32_t kind = input.byte();
        tables.resize(num_tables);
        traits.resize(num_tables);
        for (int64_t i = 0; i < num_tables; ++i) {
            uint32_t weights[kTableSize];
            const auto next = [&seed] { return (seed = seed * 1664525u + 1013904223u) >> 16; };
            for (uint32_t& weight : weights) weight = kind % 16 == 1 ? next() % 2 : 1 + ((next() & 4095) >> kind % 12);
            weights[next() % kTableSize] += 1 + (kind % 5 == 0 ? 1 << 20 : 0);
            if (kind % 16 == 2) std::fill(weights, weights + kTableSize, 0), weights[next() % kTableSize] = 1;
            normalize(weights, &tables[i]);
            traits[i] = traits_of(tables[i]);
        }
    }
};

// Fill in the scales: the paths find the same ones, and the same counts. Returns whether all values are finite.
template <class Dtype>
bool measure(Document& document) {
    bool is_finite = true;
    for (size_t i = 0; i < document.planes.size(); ++i) {
        const Plane& plane = document.planes[i];
        std::vector<uint32_t> expected(plane.num_channels() * kTableSize);
        const auto measure_portably = cpu_paths().front()->measure_plane;
        const int64_t bad_token = measure_portably(plane, Dtype::kDtype, document.num_tokens, expected.data());
        const std::vector<uint8_t> scales = document.scales[i];
        is_finite &= bad_token < 0;
        for (const CpuKernels* path : supported_paths()) {
            std::vector<uint32_t> counts(expected.size());
            FUZZ_CHECK(path->measure_plane(plane, Dtype::kDtype, document.num_tokens, counts.data()) == bad_token);
            if (bad_token < 0) FUZZ_CHECK(counts == expected && document.scales[i] == scales);
        }
    }
    return is_finite;
}

template <class Dtype>
void check_decoding(Document& document, std::vector<StreamRef>& streams, const std::vector<uint8_t>& payload) {
    std::vector<Status> expected_statuses;
    std::vector<std::vector<uint8_t>> expected;
    for (const CpuKernels* path : supported_paths()) {
        for (auto& values : document.values) std::fill(values.begin(), values.end(), uint8_t{0});
        std::vector<Status> statuses(streams.size(), Status::kOk);
        decode_planes(document.planes, streams, Dtype::kDtype, document.num_tokens, payload.data(),
                      static_cast<int64_t>(payload.size()), *path, 1, statuses);
        bool all_ok = true;
        for (Status status : statuses) all_ok &= status == Status::kOk;
        if (path == cpu_paths().front()) {
            expected_statuses = statuses;
            expected = document.values;
        }
        FUZZ_CHECK(statuses == expected_statuses);
        FUZZ_CHECK(!all_ok || document.values == expected);
    }
}

template <class Dtype>
void run(FuzzInput input) {
    constexpr size_t kValueBytes = sizeof(typename Dtype::Storage);
    Document document(input, kValueBytes);
    // A run of the input's bytes is the values, over and over.
    const uint32_t num_bytes = input.byte(), num_damages = input.byte() % 4;
    std::vector<uint8_t> pattern(1 + num_bytes);
    for (uint8_t& byte : pattern) byte = static_cast<uint8_t>(input.byte());
    size_t at = 0;
    for (auto& values : document.values)
        for (uint8_t& byte : values) byte = pattern[at++ % pattern.size()];
    if (!measure<Dtype>(document)) return;

    std::vector<StreamRef> streams = list_streams(document.planes, document.num_tokens);
    std::vector<uint8_t> payload;
    for (const CpuKernels* path : supported_paths()) {
        EncodedStreams encoded = encode_planes(document.planes, streams, Dtype::kDtype, *path, 1);
        std::vector<uint8_t> bytes;
        bool all_ok = true;
        for (size_t i = 0; i < streams.size(); ++i) {
            const EncodedStream& stream = encoded.streams[i];
            all_ok &= stream.status == Status::kOk;
            if (path == cpu_paths().front()) {
                streams[i].offset = static_cast<int64_t>(bytes.size());
                streams[i].num_bytes = static_cast<uint32_t>(stream.num_bytes);
                streams[i].num_words = stream.num_words;
            }
            FUZZ_CHECK(stream.num_bytes == streams[i].num_bytes && stream.num_words == streams[i].num_words);
            if (stream.bytes) bytes.insert(bytes.end(), stream.bytes.get(), stream.bytes.get() + stream.padded_bytes());
        }
        if (path == cpu_paths().front()) payload = bytes;
        FUZZ_CHECK(bytes == payload);
        if (!all_ok && path == supported_paths().back()) return;
    }
    payload.shrink_to_fit();
    check_decoding<Dtype>(document, streams, payload);
    for (uint32_t i = 0; i < num_damages && !payload.empty(); ++i) {
        const uint32_t position = input.byte() | input.byte() << 8;
        payload[position % payload.size()] ^= static_cast<uint8_t>(1 + input.byte() % 255);
    }
    if (num_damages > 0) check_decoding<Dtype>(document, streams, payload);
}

}  // namespace
}  // namespace cachegen

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    cachegen::FuzzInput input(data, size);
    const uint32_t dtype = input.byte() % 3;
    if (dtype == 0)
        cachegen::run<cachegen::Float16>(input);
    else if (dtype == 1)
        cachegen::run<cachegen::Bfloat16>(input);
    else
        cachegen::run<cachegen::Float32>(input);
    return 0;
}
