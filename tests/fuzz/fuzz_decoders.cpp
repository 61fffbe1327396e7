// Any bytes as a stream of any coder: decoding stays within its memory, and what it accepts encodes and decodes again.
//
// Three quarters of the inputs get lengths that add up, so that most runs reach the symbols.

#include <cstring>

#include "cpu/arithmetic_portable.h"
#include "cpu/planes.h"
#include "fuzz_input.h"

namespace cachegen {
namespace {

// The number of words that makes the stream's parts add up, or 0.
uint32_t plausible_num_words(const FuzzCoding& fuzz, const std::vector<uint8_t>& stream) {
    const int64_t num_bytes = static_cast<int64_t>(stream.size());
    if (fuzz.kind == FuzzCoding::kPacked || fuzz.kind == FuzzCoding::kArithmetic) return 0;
    LowBits low_bits;
    if (low_bits.build(fuzz.shape, fuzz.coding) != Status::kOk) return 0;
    const int64_t words = num_bytes - lay_out(fuzz.shape, fuzz.coding, low_bits).words;
    return words > 0 ? static_cast<uint32_t>(words / 2) : 0;
}

// Give the last code of an `ac` stream the length that is left over.
void fix_lengths(const FuzzCoding& fuzz, std::vector<uint8_t>& stream) {
    const int64_t num_low_bits = fuzz.shape.num_tokens * fuzz.shape.num_channels * fuzz.coding.low_bits;
    const int64_t lengths_at = round_up((num_low_bits + 7) / 8, 4);
    int64_t rest =
        static_cast<int64_t>(stream.size()) - lengths_at - round_up(kCodeLengthBytes * fuzz.shape.num_channels, 4);
    if (rest < 0) return;
    // Short streams have bytes for short codes only: bring each length below what is left.
    for (int64_t channel = 0; channel < fuzz.shape.num_channels; ++channel) {
        uint8_t* length = &stream[lengths_at + kCodeLengthBytes * channel];
        const bool is_last = channel + 1 == fuzz.shape.num_channels;
        const int64_t num_bytes = is_last ? std::min<int64_t>(rest, 0xFFFF) : std::min<int64_t>(rest, length[0] % 16);
        store_u16(length, static_cast<uint32_t>(num_bytes));
        rest -= num_bytes;
    }
}

void check_decoded(const FuzzCoding& fuzz, const std::vector<uint16_t>& symbols, const std::vector<uint8_t>& stream) {
    StreamWorkspace workspace;
    std::vector<uint8_t> again;
    uint32_t num_words = 0;
    const int64_t stride = fuzz.shape.num_rows() * kNumLanes;
    const PlaneCoding& coding = fuzz.coding;
    const auto encode = coding.is_arithmetic ? encode_arithmetic_stream : encode_stream;
    FUZZ_CHECK(encode(symbols.data(), stride, fuzz.shape, coding, workspace, again, &num_words) == Status::kOk);
    if (fuzz.kind == FuzzCoding::kArithmetic) {
        // The codes are the only ones of these symbols. Filling bits before them are free.
        const int64_t num_codes = fuzz.shape.num_channels * kCodeLengthBytes;
        const int64_t num_low_bits = fuzz.shape.num_tokens * fuzz.shape.num_channels * fuzz.coding.low_bits;
        const int64_t lengths_at = round_up((num_low_bits + 7) / 8, 4), codes_at = lengths_at + round_up(num_codes, 4);
        FUZZ_CHECK(again.size() == stream.size());
        FUZZ_CHECK(std::memcmp(&again[lengths_at], &stream[lengths_at], num_codes) == 0);
        FUZZ_CHECK(std::equal(again.begin() + codes_at, again.end(), stream.begin() + codes_at));
    }
}

void run(FuzzInput input) {
    const FuzzCoding fuzz(input);
    const uint32_t how = input.byte();
    std::vector<uint8_t> stream = input.rest();
    uint32_t num_words = how;
    if (how % 4 != 0) {
        if (fuzz.kind == FuzzCoding::kArithmetic) fix_lengths(fuzz, stream);
        num_words = plausible_num_words(fuzz, stream);
    }
    stream.shrink_to_fit();

    // As symbols.
    const int64_t stride = fuzz.shape.num_rows() * kNumLanes;
    std::vector<uint16_t> symbols(fuzz.shape.num_channels * stride, 0);
    const auto keep = [&](int64_t first, int64_t count, const uint16_t* tile, int64_t tile_stride) {
        for (int64_t channel = 0; channel < count; ++channel)
            std::memcpy(&symbols[(first + channel) * stride], tile + channel * tile_stride, 2 * fuzz.shape.num_tokens);
    };
    StreamWorkspace workspace;
    const int64_t num_bytes = static_cast<int64_t>(stream.size());
    const Status status =
        fuzz.coding.is_arithmetic
            ? decode_arithmetic_stream(stream.data(), num_bytes, num_words, fuzz.shape, fuzz.coding, workspace, keep)
            : decode_stream(stream.data(), num_bytes, num_words, fuzz.shape, fuzz.coding, workspace, keep);
    if (status == Status::kOk) check_decoded(fuzz, symbols, stream);

    // As values: the same status, and every symbol has its level. Making the levels takes longer than all the rest.
    if (how >= 32) return;
    std::vector<uint16_t> values(fuzz.shape.num_tokens * fuzz.shape.num_channels),
        scales(fuzz.shape.num_tokens, 0x3C00);
    Plane plane;
    plane.values = reinterpret_cast<uint8_t*>(values.data());
    plane.token_stride = fuzz.shape.num_channels;
    plane.head_stride = plane.head_dim = fuzz.shape.num_channels;
    plane.num_heads = 1;
    plane.scales = reinterpret_cast<uint8_t*>(scales.data());
    plane.num_bins = 256;
    plane.coding = fuzz.coding;
    StreamRef ref;
    ref.shape = fuzz.shape;
    ref.num_bytes = static_cast<uint32_t>(num_bytes);
    ref.num_words = num_words;
    FUZZ_CHECK(decode_plane_stream(plane, Dtype::kFloat16, ref, stream.data(), workspace) == status);
}

}  // namespace
}  // namespace cachegen

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    cachegen::run(cachegen::FuzzInput(data, size));
    return 0;
}
