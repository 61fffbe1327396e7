// Any bytes as the compact tables of a plane: reading stays within them, and what it accepts are tables.

#include "fuzz_input.h"

namespace cachegen {
namespace {

void run(FuzzInput input) {
    const int64_t num_tables = 1 + input.byte() % 40;
    const int alphabet_size = 1 + static_cast<int>(input.byte() % kTableSize);
    const std::vector<uint8_t> bytes = input.rest();
    std::vector<FrequencyTable> tables(num_tables);
    if (!read_tables(bytes.data(), static_cast<int64_t>(bytes.size()), num_tables, alphabet_size, tables.data()))
        return;
    for (const FrequencyTable& table : tables) {
        uint32_t start = 0;
        for (int symbol = 0; symbol < kTableSize; ++symbol) {
            FUZZ_CHECK(table.start[symbol] == start);
            FUZZ_CHECK(symbol < alphabet_size || table.frequency[symbol] == 0);
            start += table.frequency[symbol];
        }
        FUZZ_CHECK(start == kFrequencyTotal);
    }
}

}  // namespace
}  // namespace cachegen

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    cachegen::run(cachegen::FuzzInput(data, size));
    return 0;
}
