// Any symbols with any tables and coder: what encodes decodes to the same symbols.

#include <cstring>

#include "fuzz_input.h"

namespace cachegen {
namespace {

void run(FuzzInput input) {
    const FuzzCoding fuzz(input);
    const StreamShape& shape = fuzz.shape;

    // A byte chooses among the symbols of the channel's table; with all bits set, it may have no frequency.
    const int64_t stride = shape.num_rows() * kNumLanes;
    std::vector<uint16_t> symbols(shape.num_channels * stride, 0);
    bool has_frequencies = true;
    for (int64_t channel = 0; channel < shape.num_channels; ++channel) {
        for (int64_t token = 0; token < shape.num_tokens; ++token) {
            const uint32_t byte = input.byte();
            const int low_bits = fuzz.coding.low_bits;
            uint32_t high = 0;
            if (fuzz.coding.tables != nullptr) {
                const FrequencyTable& table = fuzz.tables[channel];
                high = byte % kTableSize;
                if (byte != 0xFF)
                    while (table.frequency[high] == 0) high = (high + 1) % kTableSize;
                has_frequencies &= table.frequency[high] != 0;
            }
            symbols[channel * stride + token] =
                static_cast<uint16_t>(high << low_bits | (byte & ((1 << low_bits) - 1)));
        }
    }

    StreamWorkspace workspace;
    std::vector<uint8_t> stream;
    uint32_t num_words = 0;
    const auto encode = fuzz.coding.is_arithmetic ? encode_arithmetic_stream : encode_stream;
    const Status status = encode(symbols.data(), stride, shape, fuzz.coding, workspace, stream, &num_words);
    FUZZ_CHECK(status == (has_frequencies ? Status::kOk : Status::kNoFrequency));
    if (status != Status::kOk) return;
    stream.shrink_to_fit();
    const auto compare = [&](int64_t first, int64_t count, const uint16_t* tile, int64_t tile_stride) {
        for (int64_t channel = 0; channel < count; ++channel)
            FUZZ_CHECK(std::memcmp(&symbols[(first + channel) * stride], tile + channel * tile_stride,
                                   2 * shape.num_tokens) == 0);
    };
    const int64_t num_bytes = static_cast<int64_t>(stream.size());
    FUZZ_CHECK((fuzz.coding.is_arithmetic ? decode_arithmetic_stream(stream.data(), num_bytes, num_words, shape,
                                                                     fuzz.coding, workspace, compare)
                                          : decode_stream(stream.data(), num_bytes, num_words, shape, fuzz.coding,
                                                          workspace, compare)) == Status::kOk);
}

}  // namespace
}  // namespace cachegen

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    cachegen::run(cachegen::FuzzInput(data, size));
    return 0;
}
