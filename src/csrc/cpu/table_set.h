// The frequency tables of a document's planes, kept in native memory, and their compact form.

#pragma once

#include <cstdint>
#include <vector>

#include "rans.h"

namespace cachegen {

class TableSet {
  public:
    // frequencies: [num_tables][32]. Throws where a row does not sum to 4096.
    static TableSet from_frequencies(const uint16_t* frequencies, int64_t num_tables);

    // Parse the compact form: plane after plane, plane_bytes[i] bytes for plane_channels[i] tables of alphabet_sizes[i]
    // symbols. Throws with the plane's index.
    static TableSet parse(const uint8_t* bytes, int64_t num_bytes, const std::vector<int64_t>& plane_bytes,
                          const std::vector<int64_t>& plane_channels, const std::vector<int64_t>& alphabet_sizes,
                          int num_threads);

    int64_t num_tables() const { return static_cast<int64_t>(tables_.size()); }
    const FrequencyTable* data() const { return tables_.data(); }
    const uint8_t* traits() const { return traits_.data(); }

  private:
    explicit TableSet(int64_t num_tables) : tables_(num_tables), traits_(num_tables) {}
    std::vector<FrequencyTable> tables_;
    std::vector<uint8_t> traits_;  // of each table, see TableTraits
};

// Make the compact tables of planes from symbol counts [sum of channels][32]. Returns the first plane with a channel
// that has no symbols, or too many, or -1.
int64_t pack_plane_tables(const uint32_t* counts, const std::vector<int64_t>& plane_channels, int num_threads,
                          std::vector<std::vector<uint8_t>>& packed);

}  // namespace cachegen
