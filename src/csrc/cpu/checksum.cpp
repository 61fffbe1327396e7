#include "cpu/checksum.h"

#include "cpu/cpu_kernels.h"
#include "crc32c.h"

#if CACHEGEN_X86
#include <nmmintrin.h>
#endif

#include <array>
#include <cstring>

namespace cachegen {

#if CACHEGEN_X86
namespace {

// The instruction takes three cycles, but a processor starts one per cycle: three runs of this many bytes go at once.
constexpr size_t kRunBytes = 1024;
// Runs in step are more than a processor fetches ahead by itself: memory is asked for this many runs ahead.
constexpr size_t kFetchedRuns = 6;

// What a remainder becomes when kRunBytes zero bytes follow, for each byte of it.
using ShiftTable = std::array<std::array<uint32_t, 256>, 4>;

ShiftTable make_shift_table() {
    ShiftTable table;
    std::array<uint32_t, 32> shifted_bits;
    for (int bit = 0; bit < 32; ++bit) {
        uint32_t remainder = 1u << bit;
        for (size_t i = 0; i < kRunBytes; ++i)
            remainder = (remainder >> 8) ^ crc32c_detail::kTables[0][remainder & 255];
        shifted_bits[bit] = remainder;
    }
    for (int byte = 0; byte < 4; ++byte)
        for (uint32_t value = 0; value < 256; ++value) {
            uint32_t remainder = 0;
            for (int bit = 0; bit < 8; ++bit)
                if (value >> bit & 1) remainder ^= shifted_bits[8 * byte + bit];
            table[byte][value] = remainder;
        }
    return table;
}

uint32_t shift_run(const ShiftTable& table, uint32_t remainder) {
    return table[0][remainder & 255] ^ table[1][(remainder >> 8) & 255] ^ table[2][(remainder >> 16) & 255] ^
           table[3][remainder >> 24];
}

inline uint64_t load_u64(const uint8_t* bytes) {
    uint64_t value;
    std::memcpy(&value, bytes, 8);
    return value;
}

__attribute__((target("sse4.2"))) uint32_t checksum_sse42(const uint8_t* bytes, size_t size, uint32_t before) {
    static const ShiftTable table = make_shift_table();
    uint64_t crc = ~before;
    for (; size >= 3 * kRunBytes; bytes += 3 * kRunBytes, size -= 3 * kRunBytes) {
        uint64_t second = 0, third = 0;
        for (size_t i = 0; i < kRunBytes; i += 8) {
            if (i % 64 == 0)
                for (size_t run = 0; run < 3; ++run) __builtin_prefetch(bytes + i + (run + kFetchedRuns) * kRunBytes);
            crc = _mm_crc32_u64(crc, load_u64(bytes + i));
            second = _mm_crc32_u64(second, load_u64(bytes + kRunBytes + i));
            third = _mm_crc32_u64(third, load_u64(bytes + 2 * kRunBytes + i));
        }
        crc = shift_run(table, static_cast<uint32_t>(crc)) ^ static_cast<uint32_t>(second);
        crc = shift_run(table, static_cast<uint32_t>(crc)) ^ static_cast<uint32_t>(third);
    }
    for (; size >= 8; bytes += 8, size -= 8) crc = _mm_crc32_u64(crc, load_u64(bytes));
    for (; size > 0; ++bytes, --size) crc = _mm_crc32_u8(static_cast<uint32_t>(crc), *bytes);
    return ~static_cast<uint32_t>(crc);
}

}  // namespace
#endif

uint32_t checksum(const uint8_t* bytes, size_t size, uint32_t before) {
#if CACHEGEN_X86
    static const bool has_instruction = __builtin_cpu_supports("sse4.2");
    if (has_instruction) return checksum_sse42(bytes, size, before);
#endif
    return crc32c(bytes, size, before);
}

}  // namespace cachegen
