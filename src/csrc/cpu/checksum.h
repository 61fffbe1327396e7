// CRC-32C with the processor's own instruction where there is one.

#pragma once

#include <cstddef>
#include <cstdint>

namespace cachegen {

// The same as crc32c() of crc32c.h.
uint32_t checksum(const uint8_t* bytes, size_t size, uint32_t before = 0);

}  // namespace cachegen
