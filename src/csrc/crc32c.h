// CRC-32C (Castagnoli), the checksum of iSCSI and of our files: polynomial 0x1EDC6F41, reflected, inverted at both
// ends; the check value of "123456789" is 0xE3069283. Source: RFC 3720, appendix B.4.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cachegen {

namespace crc32c_detail {

// table[k][byte]: the remainder of `byte` followed by k zero bytes, so that eight bytes fold at once.
constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
    std::array<std::array<uint32_t, 256>, 8> tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t remainder = byte;
        for (int bit = 0; bit < 8; ++bit) remainder = (remainder >> 1) ^ (remainder & 1 ? 0x82F63B78u : 0u);
        tables[0][byte] = remainder;
    }
    for (size_t k = 1; k < 8; ++k)
        for (size_t byte = 0; byte < 256; ++byte)
            tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 255];
    return tables;
}

inline constexpr auto kTables = make_tables();

}  // namespace crc32c_detail

// `before`: the checksum of the bytes before these, where they go on.
inline uint32_t crc32c(const uint8_t* bytes, size_t size, uint32_t before = 0) {
    const auto& tables = crc32c_detail::kTables;
    uint32_t crc = ~before;
    for (; size >= 8; bytes += 8, size -= 8) {
        // Assembled byte by byte: the same on every byte order, one load on little-endian machines.
        const uint32_t low = crc ^ (static_cast<uint32_t>(bytes[0]) | static_cast<uint32_t>(bytes[1]) << 8 |
                                    static_cast<uint32_t>(bytes[2]) << 16 | static_cast<uint32_t>(bytes[3]) << 24);
        crc = tables[7][low & 255] ^ tables[6][(low >> 8) & 255] ^ tables[5][(low >> 16) & 255] ^ tables[4][low >> 24] ^
              tables[3][bytes[4]] ^ tables[2][bytes[5]] ^ tables[1][bytes[6]] ^ tables[0][bytes[7]];
    }
    for (; size > 0; ++bytes, --size) crc = (crc >> 8) ^ tables[0][(crc ^ *bytes) & 255];
    return ~crc;
}

}  // namespace cachegen
