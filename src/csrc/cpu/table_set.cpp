#include "cpu/table_set.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"
#include "frequency_tables.h"

namespace cachegen {

TableSet TableSet::from_frequencies(const uint16_t* frequencies, int64_t num_tables) {
    TableSet set(num_tables);
    for (int64_t index = 0; index < num_tables; ++index, frequencies += kTableSize) {
        uint32_t start = 0;
        for (int symbol = 0; symbol < kTableSize; ++symbol) {
            set.tables_[index].start[symbol] = static_cast<uint16_t>(start);
            set.tables_[index].frequency[symbol] = frequencies[symbol];
            start += frequencies[symbol];
        }
        if (start != kFrequencyTotal) throw std::invalid_argument("the frequencies of a table must sum to 4096");
        set.traits_[index] = traits_of(set.tables_[index]);
    }
    return set;
}

TableSet TableSet::parse(const uint8_t* bytes, int64_t num_bytes, const std::vector<int64_t>& plane_bytes,
                         const std::vector<int64_t>& plane_channels, const std::vector<int64_t>& alphabet_sizes,
                         int num_threads) {
    const size_t num_planes = plane_bytes.size();
    if (plane_channels.size() != num_planes || alphabet_sizes.size() != num_planes)
        throw std::invalid_argument("one size, channel count and alphabet per plane are expected");
    std::vector<int64_t> offsets(num_planes + 1, 0), first_tables(num_planes + 1, 0);
    for (size_t plane = 0; plane < num_planes; ++plane) {
        // Before memory is reserved for the tables, and before sums: a corrupt header may claim anything.
        if (plane_bytes[plane] > num_bytes - offsets[plane]) break;
        if (plane_bytes[plane] < 0 || plane_channels[plane] < 0 ||
            plane_channels[plane] > 8 * plane_bytes[plane] / kMinTableBits)
            throw std::invalid_argument("plane " + std::to_string(plane));
        offsets[plane + 1] = offsets[plane] + plane_bytes[plane];
        first_tables[plane + 1] = first_tables[plane] + plane_channels[plane];
    }
    if (offsets[num_planes] != num_bytes) throw std::invalid_argument("the tables' sizes do not add up");
    TableSet set(first_tables[num_planes]);
    std::vector<char> good(num_planes, 0);
    parallel_for(static_cast<int64_t>(num_planes), num_threads, [&](int64_t plane) {
        good[plane] = read_tables(bytes + offsets[plane], plane_bytes[plane], plane_channels[plane],
                                  static_cast<int>(alphabet_sizes[plane]), &set.tables_[first_tables[plane]]);
        for (int64_t index = first_tables[plane]; index < first_tables[plane + 1]; ++index)
            set.traits_[index] = traits_of(set.tables_[index]);
    });
    for (size_t plane = 0; plane < num_planes; ++plane)
        if (!good[plane]) throw std::invalid_argument("plane " + std::to_string(plane));
    return set;
}

int64_t pack_plane_tables(const uint32_t* counts, const std::vector<int64_t>& plane_channels, int num_threads,
                          std::vector<std::vector<uint8_t>>& packed) {
    const size_t num_planes = plane_channels.size();
    std::vector<int64_t> first_rows(num_planes + 1, 0);
    for (size_t i = 0; i < num_planes; ++i) first_rows[i + 1] = first_rows[i] + plane_channels[i];
    packed.assign(num_planes, {});
    std::vector<char> good(num_planes, 0);
    parallel_for(static_cast<int64_t>(num_planes), num_threads, [&](int64_t i) {
        good[i] = write_tables(counts + first_rows[i] * kTableSize, plane_channels[i], &packed[i]);
    });
    const auto bad = std::find(good.begin(), good.end(), 0);
    return bad == good.end() ? -1 : bad - good.begin();
}

}  // namespace cachegen
