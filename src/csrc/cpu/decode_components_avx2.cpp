// Decoding components with AVX2: the same tiles as decode_components_avx512.cpp.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx2.h"
#include "cpu/component_batch.h"
#include "cpu/component_tiles.h"
#include "cpu/rans_decode_avx2.h"
#include "cpu/rans_portable.h"

namespace cachegen::avx2 {
namespace {

class ComponentDecoder : public ComponentTiles {
  public:
    using ComponentTiles::ComponentTiles;

    CACHEGEN_AVX2 void load() {
        for (int s = 0; s < batch_.num_streams; ++s)
            states_[s] = load_states(batch_.streams[s].states, batch_.shape.num_lanes());
    }

    // Decode a tile's components of all streams that have them.
    CACHEGEN_AVX2 void decode(int64_t first_component) {
        words_.begin_tile();
        int num_active = batch_.num_streams;
        for (int i = 0; i < kTileComponents; ++i) {
            const int64_t component = first_component + i;
            num_active = count_active(num_active, component);
            if (num_active == 0) break;
            decode_component(num_active, component, i);
            for (int s = 0; s < num_active; ++s)
                if (batch_.streams[s].coding->low_bits[component] > 0) append_low_bits(s, component, i);
        }
        for (int s = 0; s < batch_.num_streams; ++s)
            if (first_component < batch_.streams[s].num_components()) write_tile(s, first_component);
    }

    CACHEGEN_AVX2 Status status(int s) const { return words_.status(s, are_at_start(states_[s])); }

  private:
    // In the blocks, tokens stand in the order 0-7, 16-23, 8-15 and 24-31.

    // Decode one component of the first streams, in the way that its largest table needs.
    CACHEGEN_AVX2 void decode_component(int num_streams, int64_t component, int in_tile) {
        const SpreadTable* spread[kMaxBatch];
        const SplitTable* split[kMaxBatch];
        int num_symbols = 2;
        bool has_single = false;
        for (int s = 0; s < num_streams; ++s) {
            const NarrowTable* table = &batch_.tables[batch_.streams[s].coding->table_indices[component]];
            if (table != table_of_[s]) spread_table(table->table, &tables_[s]);
            table_of_[s] = table;
            spread[s] = &tables_[s];
            split[s] = &tables_[s].split;
            num_symbols = std::max(num_symbols, table->num_symbols);
            has_single |= table->num_symbols == 1;
        }
        const int64_t full_rows = has_single ? 0 : batch_.shape.num_tokens / kNumLanes;
        if (num_symbols <= 3)
            decode_full_rows<3>(num_streams, spread, in_tile, full_rows);
        else if (num_symbols <= 5)
            decode_full_rows<5>(num_streams, spread, in_tile, full_rows);
        else if (num_symbols <= 9)
            decode_full_rows<9>(num_streams, spread, in_tile, full_rows);
        else
            for (int64_t row = 0; row < full_rows; ++row) {
                int s = 0;
                for (; s + 2 <= num_streams; s += 2)
                    decode_row<2, false>(TreeSearch<2>{split + s}, s, in_tile, row, ~0u);
                if (s < num_streams) decode_row<1, false>(TreeSearch<1>{split + s}, s, in_tile, row, ~0u);
            }
        for (int64_t row = full_rows; row < num_rows_; ++row)
            for (int s = 0; s < num_streams; ++s)
                decode_row<1, true>(TreeSearch<1>{split + s}, s, in_tile, row,
                                    _bzhi_u32(~0u, batch_.shape.live_lanes(row)));
    }

    // Where all tables have at most kSymbols symbols.
    template <int kSymbols>
    __attribute__((noinline)) CACHEGEN_AVX2 void decode_full_rows(int num_streams, const SpreadTable* const* tables,
                                                                  int in_tile, int64_t full_rows) {
        for (int64_t row = 0; row < full_rows; ++row) {
            int s = 0;
            for (; s + 2 <= num_streams; s += 2)
                decode_row<2, false>(LinearSearch<2, kSymbols - 1>{tables + s}, s, in_tile, row, ~0u);
            if (s < num_streams) decode_row<1, false>(LinearSearch<1, kSymbols - 1>{tables + s}, s, in_tile, row, ~0u);
        }
    }

    // One row of kStreams streams from `first` on.
    template <int kStreams, bool kIsGeneral, class Search>
    CACHEGEN_AVX2_INLINE void decode_row(const Search& search, int first, int in_tile, int64_t row, uint32_t live) {
        __m256i symbols[kStreams];
        decode_rows<kIsGeneral, kStreams>(search, live, states_ + first, words_.next + first, symbols);
        for (int s = 0; s < kStreams; ++s) {
            auto* out = reinterpret_cast<__m256i*>(block(row, first + s) + 64 * in_tile);
            _mm256_store_si256(out, _mm256_unpacklo_epi8(symbols[s], _mm256_setzero_si256()));
            _mm256_store_si256(out + 1, _mm256_unpackhi_epi8(symbols[s], _mm256_setzero_si256()));
        }
    }

    // Append the raw bits of a component.
    __attribute__((noinline)) CACHEGEN_AVX2 void append_low_bits(int s, int64_t component, int in_tile) const {
        const ComponentStream& stream = batch_.streams[s];
        const int low_bits = stream.coding->low_bits[component];
        for (int64_t row = 0; row < num_rows_; ++row) {
            const int live = batch_.shape.live_lanes(row);
            const int64_t position = stream.low_bits_layout->position(row, component, live);
            auto* const out = reinterpret_cast<__m256i*>(block(row, s) + 64 * in_tile);
            __m256i symbols[2] = {_mm256_load_si256(out), _mm256_load_si256(out + 1)};
            for (int bit = low_bits - 1; bit >= 0; --bit) {
                uint32_t plane;
                if (live == kNumLanes)
                    std::memcpy(&plane, stream.low_bits + position / 8 + 4 * bit, 4);
                else
                    plane = read_bits(stream.low_bits, position + bit * live, live);
                const __m256i bytes = bytes_of_bits(plane);
                const __m256i words[2] = {_mm256_unpacklo_epi8(bytes, bytes), _mm256_unpackhi_epi8(bytes, bytes)};
                for (int i = 0; i < 2; ++i)
                    symbols[i] = _mm256_sub_epi16(_mm256_add_epi16(symbols[i], symbols[i]), words[i]);
            }
            for (int i = 0; i < 2; ++i) _mm256_store_si256(out + i, symbols[i]);
        }
    }

    // From symbols to components, token after token.
    __attribute__((noinline)) CACHEGEN_AVX2 void write_tile(int s, int64_t first_component) const {
        const ComponentStream& stream = batch_.streams[s];
        const ComponentCoding& coding = *stream.coding;
        for (int half = 0; half < kTileComponents; half += 8) {
            const int64_t first = first_component + half;
            const int count = static_cast<int>(std::min<int64_t>(8, coding.num_components - first));
            if (count <= 0) return;
            int32_t biases[8] = {};
            for (int i = 0; i < count; ++i)
                biases[i] = bias_of(coding, batch_.tables[coding.table_indices[first + i]], first + i);
            const Eight eight{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(biases)), first_of_eight(count),
                              first_of_eight(coding.num_refined - first), count == 8, coding.num_refined > first};
            int32_t* out = stream.components + first;
            for (int64_t row = 0; row < num_rows_; ++row, out += kNumLanes * stream.stride)
                write_block(block(row, s) + 64 * half, eight, batch_.shape.live_lanes(row), out, stream.stride);
        }
    }

    // How eight components are written.
    struct Eight {
        __m256i bias, present, refined;
        bool is_whole, has_refined;
    };

    // The first `count` doublewords all ones.
    CACHEGEN_AVX2_INLINE static __m256i first_of_eight(int64_t count) {
        const int limit = static_cast<int>(std::clamp<int64_t>(count, 0, 8));
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(limit), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }

    CACHEGEN_AVX2_INLINE static void write_block(const uint8_t* symbols, const Eight& eight, int live, int32_t* out,
                                                 int64_t stride) {
        for (int half = 0; half < 2; ++half) {
            // Eight components of the tokens j and 16 + j, or 8 + j and 24 + j, in 128-bit lanes.
            __m256i words[8];
            for (int i = 0; i < 8; ++i)
                words[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(symbols + 64 * i + 32 * half));
            transpose_8x8_words(words);
            for (int j = 0; j < 8; ++j) {
                write_token(_mm256_castsi256_si128(words[j]), eight, 8 * half + j, live, out, stride);
                write_token(_mm256_extracti128_si256(words[j], 1), eight, 16 + 8 * half + j, live, out, stride);
            }
        }
    }

    CACHEGEN_AVX2_INLINE static void write_token(__m128i words, const Eight& eight, int token, int live, int32_t* out,
                                                 int64_t stride) {
        if (token >= live) return;
        out += token * stride;
        // The next tile's, as many as eight more.
        _mm_prefetch(reinterpret_cast<const char*>(out + 2 * kTileComponents - 1), _MM_HINT_T0);
        __m256i components = _mm256_sub_epi32(_mm256_cvtepi16_epi32(words), eight.bias);
        if (eight.has_refined) {
            const __m256i coarse = _mm256_maskload_epi32(out, _mm256_and_si256(eight.present, eight.refined));
            const __m256i sign = _mm256_srai_epi32(coarse, 31);
            components = _mm256_sub_epi32(_mm256_xor_si256(components, sign), sign);
            const __m256i thrice = _mm256_add_epi32(_mm256_slli_epi32(coarse, 1), coarse);
            components = _mm256_add_epi32(components, thrice);
        }
        if (eight.is_whole)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), components);
        else
            _mm256_maskstore_epi32(out, eight.present, components);
    }

    States states_[kMaxBatch];
    const NarrowTable* table_of_[kMaxBatch] = {};  // what tables_ were made of
    SpreadTable tables_[kMaxBatch];
};

}  // namespace

void decode_components(const ComponentBatch& batch, Scratch& scratch, Status* statuses) {
    decode_by_tiles<ComponentDecoder>(batch, scratch, statuses);
}

}  // namespace cachegen::avx2

#endif  // CACHEGEN_X86
