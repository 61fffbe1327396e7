// Any bytes as a stream of components, and any components: on all paths of this processor decoding stays within its
// memory whatever the bytes and comes to the same end, and what encodes, or was accepted, decodes to the same components
// again.
//
// Half of the inputs are components, whose stream is then damaged; the rest of the others is the stream itself, mostly
// with a number of words and escapes that make its length add up, so that most runs reach the symbols.

#include <algorithm>

#include "cpu/components.h"
#include "cpu/decode_components.h"
#include "cpu/encode_components.h"
#include "fuzz_input.h"
#include "fuzz_kernels.h"

namespace cachegen {
namespace {

constexpr int32_t kUntouched = 0x5A5A5A5A;  // in the columns that are not the stream's

// The coding of a stream of components, drawn from an input. It owns what it points to.
struct FuzzComponents {
    int64_t num_tokens, stride, coarse_stride, num_copies;
    std::vector<FrequencyTable> tables;
    std::vector<uint16_t> table_indices;
    std::vector<uint8_t> low_bits;
    std::vector<int32_t> coarse;  // [num_tokens][coarse_stride]
    ComponentCoding coding;

    explicit FuzzComponents(FuzzInput& input) {
        // Mostly small ones, which are fast; some with several rows and tiles.
        num_tokens = small_or_large(input.byte(), 40, 100);
        coding.num_components = small_or_large(input.byte(), 6, 70);
        stride = coding.num_components + input.byte() % 3;
        coding.num_refined = input.byte() % (coding.num_components + 1);
        coarse_stride = coding.num_refined + input.byte() % 2;
        num_copies = 1 + input.byte() % 5;
        make_tables(input.byte());
        for (int64_t c = 0; c < coding.num_components; ++c) {
            const uint32_t byte = input.byte();
            const bool is_refined = c < coding.num_refined;
            table_indices.push_back(static_cast<uint16_t>(is_refined ? byte % 2 : 2 + byte % (tables.size() - 2)));
            low_bits.push_back(static_cast<uint8_t>(is_refined ? 0 : (byte >> 4) % (kMaxLowBits + 1)));
        }
        coding.tables = tables.data();
        coding.num_tables = static_cast<int64_t>(tables.size());
        coding.table_indices = table_indices.data();
        coding.low_bits = low_bits.data();
        coarse.resize(num_tokens * coarse_stride);
        const uint32_t spread = input.byte();
        for (int32_t& value : coarse) value = component_of(input, spread);
    }

    FuzzComponents(const FuzzComponents&) = delete;

    // From byte-sized to more than any level has: 2^24, and three times as much at each of three levels above.
    static int32_t component_of(FuzzInput& input, uint32_t spread) {
        const int32_t byte = static_cast<int32_t>(input.byte()) - 128;
        return spread % 8 == 0 ? byte * 3600000 : spread % 8 < 4 ? byte : byte / 16;
    }

    // The components before decoding: the level before's, and what nobody may touch.
    std::vector<int32_t> start() const {
        std::vector<int32_t> components(num_tokens * stride, kUntouched);
        for (int64_t token = 0; token < num_tokens; ++token)
            for (int64_t c = 0; c < coding.num_refined; ++c)
                components[token * stride + c] = coarse[token * coarse_stride + c];
        return components;
    }

    int64_t tokens_per_stream() const { return round_up(num_tokens, kNumLanes); }

    // All paths encode to the same bytes.
    Status encode(const std::vector<int32_t>& fine, std::vector<uint8_t>& stream, uint32_t* num_words) const {
        StreamWorkspace workspace;
        const Status status = encode_components(fine.data(), stride, coarse.data(), coarse_stride, num_tokens, coding,
                                                workspace, stream, num_words);
        stream.shrink_to_fit();
        for (const CpuKernels* path : supported_paths()) {
            const EncodedStreams encoded =
                encode_components({fine.data(), num_tokens, stride}, {coarse.data(), num_tokens, coarse_stride}, coding,
                                  tokens_per_stream(), *path, 1);
            const EncodedStream& found = encoded.streams[0];
            FUZZ_CHECK(found.status == status);
            if (status != Status::kOk) continue;
            FUZZ_CHECK(found.num_words == *num_words && found.num_bytes == static_cast<int64_t>(stream.size()));
            FUZZ_CHECK(std::equal(stream.begin(), stream.end(), found.bytes.get()));
        }
        return status;
    }

    // All paths decode to the same end, and so do several of the stream in step.
    Status decode(const std::vector<uint8_t>& stream, uint32_t num_words, std::vector<int32_t>& components) const {
        Status status = Status::kOk;
        for (const CpuKernels* path : supported_paths()) {
            std::vector<std::vector<int32_t>> copies(num_copies, start());
            std::vector<ComponentGroup> groups;
            std::vector<uint32_t> index;
            for (std::vector<int32_t>& copy : copies) {
                copy.shrink_to_fit();
                groups.push_back({{copy.data(), num_tokens, stride}, coding, tokens_per_stream()});
                index.insert(index.end(), {static_cast<uint32_t>(stream.size()), num_words, 0});
            }
            const std::vector<ComponentStreamRef> streams =
                list_streams(groups, std::vector<int64_t>(num_copies, 0), index.data());
            std::vector<Status> statuses(num_copies, Status::kOk);
            decode_components(streams, stream.data(), static_cast<int64_t>(stream.size()), *path, 1, statuses);
            if (path == cpu_paths().front()) {
                status = statuses[0];
                components = copies[0];
            }
            for (int64_t i = 0; i < num_copies; ++i) {
                FUZZ_CHECK(statuses[i] == status && (status != Status::kOk || copies[i] == components));
                for (int64_t token = 0; token < num_tokens; ++token)
                    for (int64_t c = coding.num_components; c < stride; ++c)
                        FUZZ_CHECK(copies[i][token * stride + c] == kUntouched);
            }
        }
        return status;
    }

    // What encodes decodes to the same.
    void check_round_trip(const std::vector<int32_t>& fine, std::vector<uint8_t>& stream, uint32_t* num_words) const {
        FUZZ_CHECK(encode(fine, stream, num_words) == Status::kOk);
        std::vector<int32_t> again;
        FUZZ_CHECK(decode(stream, *num_words, again) == Status::kOk && again == fine);
    }

  private:
    static int64_t small_or_large(uint32_t byte, uint32_t small, uint32_t large) {
        return 1 + byte % (byte < 240 ? small : large);
    }

    // Two tables for refining, of three symbols; six others, without a gap between their first and last symbol.
    void make_tables(uint32_t seed) {
        const auto next = [&seed] { return (seed = seed * 1664525u + 1013904223u) >> 16; };
        tables.resize(8);
        for (size_t i = 0; i < tables.size(); ++i) {
            uint32_t weights[kTableSize] = {};
            const bool is_refinement = i < 2;
            const uint32_t first = is_refinement ? 0 : next() % kTableSize;
            const uint32_t count = is_refinement ? kLevelRatio : 1 + next() % (kTableSize - first);
            const uint32_t steepness = next() % 12;
            for (uint32_t symbol = first; symbol < first + count; ++symbol)
                weights[symbol] = 1 + ((next() & 4095) >> steepness);
            normalize(weights, &tables[i]);
        }
    }
};

// Shorten a stream, and choose its number of words, so that its parts add up; its escapes may be made valid, too.
uint32_t make_plausible(const FuzzComponents& fuzz, uint32_t how, std::vector<uint8_t>& stream) {
    const StreamShape shape{fuzz.num_tokens, fuzz.coding.num_components};
    LowBits low_bits;
    FUZZ_CHECK(low_bits.build(shape, fuzz.coding.plane_coding()) == Status::kOk);
    const int64_t words_at = lay_out(shape, fuzz.coding.plane_coding(), low_bits).words;
    const int64_t num_escapes = how / 4 % 4;
    const int64_t room = static_cast<int64_t>(stream.size()) - words_at - kEscapeBytes * num_escapes - 3;
    if (room < 0) return how;
    const int64_t words_end = words_at + 2 * (room / 2);
    stream.resize(bytes_with_escapes(words_end, num_escapes));
    int64_t place = 0;
    for (int64_t i = 0; how % 4 > 1 && i < num_escapes; ++i) {
        uint8_t* const escape = &stream[stream.size() - kEscapeBytes * (num_escapes - i)];
        place += 1 + escape[0] % 8;
        store_u32(escape, static_cast<uint32_t>(place));
        store_u32(escape + 4, static_cast<uint32_t>(static_cast<int32_t>(load_u32(escape + 4)) % (kMaxComponent + 1)));
    }
    return static_cast<uint32_t>(room / 2);
}

void decode_any_bytes(const FuzzComponents& fuzz, FuzzInput& input) {
    const uint32_t how = input.byte();
    std::vector<uint8_t> stream = input.rest();
    const uint32_t num_words = how % 4 == 0 ? how : make_plausible(fuzz, how, stream);
    stream.shrink_to_fit();
    std::vector<int32_t> components;
    if (fuzz.decode(stream, num_words, components) != Status::kOk) return;
    // An escape may stand where a symbol would do, so the bytes may differ; the components may not.
    std::vector<uint8_t> again;
    uint32_t num_words_again = 0;
    fuzz.check_round_trip(components, again, &num_words_again);
}

void encode_and_damage(const FuzzComponents& fuzz, FuzzInput& input) {
    const uint32_t num_damages = input.byte() % 4, spread = input.byte();
    std::vector<int32_t> fine = fuzz.start();
    for (int64_t token = 0; token < fuzz.num_tokens; ++token)
        for (int64_t c = 0; c < fuzz.coding.num_components; ++c) {
            int32_t& value = fine[token * fuzz.stride + c];
            value = c < fuzz.coding.num_refined
                        ? kLevelRatio * value + static_cast<int32_t>(input.byte() % 3) - 1
                        : std::clamp(FuzzComponents::component_of(input, spread), -kMaxComponent, kMaxComponent);
        }
    std::vector<uint8_t> stream;
    uint32_t num_words = 0;
    fuzz.check_round_trip(fine, stream, &num_words);
    if (num_damages == 0) return;
    for (uint32_t i = 0; i < num_damages; ++i) {
        const uint32_t position = input.byte() | input.byte() << 8;
        stream[position % stream.size()] ^= static_cast<uint8_t>(1 + input.byte() % 255);
    }
    std::vector<int32_t> components;
    if (fuzz.decode(stream, num_words, components) == Status::kOk)
        fuzz.check_round_trip(components, stream, &num_words);
}

void run(FuzzInput input) {
    const bool is_stream = input.byte() % 2 == 0;
    const FuzzComponents fuzz(input);
    if (is_stream)
        decode_any_bytes(fuzz, input);
    else
        encode_and_damage(fuzz, input);
}

}  // namespace
}  // namespace cachegen

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    cachegen::run(cachegen::FuzzInput(data, size));
    return 0;
}
