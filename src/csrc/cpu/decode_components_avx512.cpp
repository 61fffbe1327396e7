// Decoding components with AVX-512: rANS of several streams in flight, low bits, transposition, tile by tile.
//
// A tile is 16 components of all tokens of the batch's streams. First the symbols are decoded component by component,
// in the order of the bitstream; then blocks of 16 components by 32 tokens are transposed and written as token rows.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include <algorithm>
#include <cstring>

#include "cpu/avx512.h"
#include "cpu/component_batch.h"
#include "cpu/component_tiles.h"
#include "cpu/rans_decode_avx512.h"

namespace cachegen::avx512 {
namespace {

class ComponentDecoder : public ComponentTiles {
  public:
    using ComponentTiles::ComponentTiles;

    CACHEGEN_AVX512 void load() {
        for (int s = 0; s < batch_.num_streams; ++s)
            load_states(batch_.streams[s].states, batch_.shape.num_lanes(), &low_[s], &high_[s]);
    }

    // Decode a tile's components of all streams that have them.
    CACHEGEN_AVX512 void decode(int64_t first_component) {
        words_.begin_tile();
        int num_active = batch_.num_streams;
        for (int i = 0; i < kTileComponents; ++i) {
            const int64_t component = first_component + i;
            num_active = count_active(num_active, component);
            for (int s = 0; s < num_active;) {
                const int rest = num_active - s;
                if (rest >= 4)
                    decode_component<4>(s, component, i);
                else if (rest >= 2)
                    decode_component<2>(s, component, i);
                else
                    decode_component<1>(s, component, i);
                s += rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
            }
            for (int s = 0; s < num_active; ++s)
                if (batch_.streams[s].coding->low_bits[component] > 0) append_low_bits(s, component, i);
        }
        for (int s = 0; s < batch_.num_streams; ++s)
            if (first_component < batch_.streams[s].num_components()) write_tile(s, first_component);
    }

    CACHEGEN_AVX512 Status status(int s) const { return words_.status(s, are_at_start(low_[s], high_[s])); }

  private:
    // Decode one component of kCount streams from `first` on, in the way that its largest table needs.
    template <int kCount>
    CACHEGEN_AVX512_APART void decode_component(int first, int64_t component, int in_tile) {
        const FrequencyTable* tables[kCount];
        int num_symbols = 1;
        bool has_single = false;
        for (int s = 0; s < kCount; ++s) {
            const NarrowTable& table = batch_.tables[batch_.streams[first + s].coding->table_indices[component]];
            tables[s] = &table.table;
            num_symbols = std::max(num_symbols, table.num_symbols);
            has_single |= table.num_symbols == 1;
        }
        const int64_t full_rows = has_single ? 0 : batch_.shape.num_tokens / kNumLanes;
        if (full_rows == 0)
            ;
        else if (num_symbols <= 3)
            decode_span<kCount, false>(LinearSearch<kCount, 2>(tables), tables, first, in_tile, 0, full_rows);
        else if (num_symbols <= 5)
            decode_span<kCount, false>(LinearSearch<kCount, 4>(tables), tables, first, in_tile, 0, full_rows);
        else if (num_symbols <= 8)
            decode_span<kCount, false>(BinarySearch<kCount, 8>{tables}, tables, first, in_tile, 0, full_rows);
        else if (num_symbols <= 16)
            decode_span<kCount, false>(BinarySearch<kCount, 16>{tables}, tables, first, in_tile, 0, full_rows);
        else
            decode_span<kCount, false>(BinarySearch<kCount, 32>{tables}, tables, first, in_tile, 0, full_rows);
        if (full_rows < num_rows_)
            decode_span<kCount, true>(BinarySearch<kCount, 32>{tables}, tables, first, in_tile, full_rows, num_rows_);
    }

    // Decode some rows of it.
    template <int kCount, bool kIsGeneral, class Search>
    CACHEGEN_AVX512_INLINE void decode_span(const Search& search, const FrequencyTable* const tables[kCount], int first,
                                            int in_tile, int64_t first_row, int64_t last_row) {
        // Local copies, so that the states stay in registers.
        __m512i low[kCount], high[kCount], symbols[kCount];
        const uint8_t* word[kCount];
#pragma GCC unroll 4
        for (int s = 0; s < kCount; ++s) {
            low[s] = low_[first + s];
            high[s] = high_[first + s];
            word[s] = words_.next[first + s];
        }
        uint8_t* out = block(first_row, first) + 64 * in_tile;
        for (int64_t row = first_row; row < last_row; ++row, out += kBlockStride) {
            const __mmask32 live = first_lanes(kIsGeneral ? batch_.shape.live_lanes(row) : kNumLanes);
            decode_rows<kCount, kIsGeneral>(search, tables, live, low, high, word, symbols);
#pragma GCC unroll 4
            for (int s = 0; s < kCount; ++s) _mm512_store_si512(out + s * num_rows_ * kBlockStride, symbols[s]);
        }
#pragma GCC unroll 4
        for (int s = 0; s < kCount; ++s) {
            low_[first + s] = low[s];
            high_[first + s] = high[s];
            words_.next[first + s] = word[s];
        }
    }

    // Append the raw bits of a component.
    CACHEGEN_AVX512_APART void append_low_bits(int s, int64_t component, int in_tile) const {
        const ComponentStream& stream = batch_.streams[s];
        const int low_bits = stream.coding->low_bits[component];
        for (int64_t row = 0; row < num_rows_; ++row) {
            const int live = batch_.shape.live_lanes(row);
            const int64_t position = stream.low_bits_layout->position(row, component, live);
            auto* const symbols = block(row, s) + 64 * in_tile;
            const __m512i high = _mm512_load_si512(symbols);
            _mm512_store_si512(symbols, live == kNumLanes
                                            ? append_full_low_bits(high, stream.low_bits + position / 8, low_bits)
                                            : append_tail_low_bits(high, stream.low_bits, position, low_bits, live));
        }
    }

    // From symbols to components, token after token.
    CACHEGEN_AVX512_APART void write_tile(int s, int64_t first_component) const {
        const ComponentStream& stream = batch_.streams[s];
        const ComponentCoding& coding = *stream.coding;
        const int count = static_cast<int>(std::min<int64_t>(kTileComponents, coding.num_components - first_component));
        alignas(32) int16_t biases[kTileComponents] = {};
        for (int i = 0; i < count; ++i) {
            const int64_t component = first_component + i;
            biases[i] =
                static_cast<int16_t>(bias_of(coding, batch_.tables[coding.table_indices[component]], component));
        }
        const __m512i bias = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(biases)));
        const auto present = static_cast<__mmask16>(first_lanes(count));
        const auto refined = static_cast<__mmask16>(first_lanes(coding.num_refined - first_component) & present);
        int32_t* out = stream.components + first_component;
        for (int64_t row = 0; row < num_rows_; ++row, out += kNumLanes * stream.stride)
            write_block(block(row, s), bias, present, refined, batch_.shape.live_lanes(row), out, stream.stride);
    }

    CACHEGEN_AVX512_INLINE static void write_block(const uint8_t* symbols, __m512i bias, __mmask16 present,
                                                   __mmask16 refined, int live, int32_t* out, int64_t stride) {
        // Eight components of the tokens j, 8 + j, 16 + j and 24 + j, in 128-bit lanes.
        __m512i first[8], second[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) first[i] = _mm512_load_si512(symbols + 64 * i);
        transpose_8x8_words(first);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) second[i] = _mm512_load_si512(symbols + 64 * (8 + i));
        transpose_8x8_words(second);
        const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const __m512i lower_tokens = _mm512_sub_epi16(_mm512_permutex2var_epi64(first[j], lower, second[j]), bias);
            const __m512i upper_tokens = _mm512_sub_epi16(_mm512_permutex2var_epi64(first[j], upper, second[j]), bias);
            write_token(_mm512_castsi512_si256(lower_tokens), present, refined, j, live, out, stride);
            write_token(_mm512_extracti64x4_epi64(lower_tokens, 1), present, refined, 8 + j, live, out, stride);
            write_token(_mm512_castsi512_si256(upper_tokens), present, refined, 16 + j, live, out, stride);
            write_token(_mm512_extracti64x4_epi64(upper_tokens, 1), present, refined, 24 + j, live, out, stride);
        }
    }

    CACHEGEN_AVX512_INLINE static void write_token(__m256i words, __mmask16 present, __mmask16 refined, int token,
                                                   int live, int32_t* out, int64_t stride) {
        if (token >= live) return;
        out += token * stride;
        __m512i components = _mm512_cvtepi16_epi32(words);
        if (refined != 0) {
            const __m512i coarse = _mm512_maskz_loadu_epi32(refined, out);
            const __mmask16 is_negative = _mm512_movepi32_mask(coarse);
            components = _mm512_mask_sub_epi32(components, is_negative, _mm512_setzero_si512(), components);
            const __m512i thrice = _mm512_add_epi32(_mm512_slli_epi32(coarse, 1), coarse);
            components = _mm512_add_epi32(components, thrice);
        }
        _mm512_mask_storeu_epi32(out, present, components);
        // The next tile's.
        _mm_prefetch(reinterpret_cast<const char*>(out + 2 * kTileComponents - 1), _MM_HINT_T0);
    }

    __m512i low_[kMaxBatch];
    __m512i high_[kMaxBatch];
};

}  // namespace

void decode_components(const ComponentBatch& batch, Scratch& scratch, Status* statuses) {
    decode_by_tiles<ComponentDecoder>(batch, scratch, statuses);
}

}  // namespace cachegen::avx512

#endif  // CACHEGEN_X86
