// Encoding components with AVX-512: symbols and escapes, transposition, low bits and rANS, tile by tile and backwards.
//
// A tile is 16 components of all tokens of a stream; each component is read once.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include "cpu/avx512.h"
#include "cpu/component_source.h"
#include "cpu/rans_encode_avx512.h"

namespace cachegen::avx512 {
namespace {

class ComponentEncoder : public SourceTiles {
  public:
    using SourceTiles::SourceTiles;

    CACHEGEN_AVX512 void start() {
        first_ = second_ = _mm512_set1_epi32(kStateLow);
        seen_ = _mm512_setzero_si512();
    }

    // Encode a tile's components.
    CACHEGEN_AVX512 void encode(int64_t first_component) {
        const TileSymbols tile(coding_, source_.ranges, first_component);
        for (int64_t row = 0; row < num_rows_; ++row) find_symbols(tile, first_component, row);
        for (int i = tile.count - 1; i >= 0; --i) {
            const int64_t component = first_component + i;
            if (coding_.low_bits[component] > 0) split_low_bits(component, i);
            encode_component(component, i);
        }
    }

    CACHEGEN_AVX512 void finish(EncodedStream* encoded) const {
        encoded->status = is_codable_ && !has_absent(seen_) ? Status::kOk : Status::kNoFrequency;
        if (encoded->status != Status::kOk) return;
        uint32_t states[kNumLanes];
        store_states(first_, second_, states);
        join(states, encoded);
    }

  private:
    // A token's symbols of the tile, and its escapes.
    CACHEGEN_AVX512_INLINE __m256i symbols_of(const TileSymbols& tile, int64_t first_component, int64_t token) {
        const auto present = static_cast<__mmask16>(first_lanes(tile.count));
        const auto refined = static_cast<__mmask16>(first_lanes(tile.num_refined));
        const __m512i zero = _mm512_load_si512(tile.zero);
        const int32_t* const fine = source_.fine + token * source_.fine_stride + first_component;
        const __m512i values = _mm512_maskz_loadu_epi32(present, fine);
        prefetch_before(fine);
        __m512i coded =
            _mm512_max_epi32(_mm512_min_epi32(values, _mm512_load_si512(tile.highest)), _mm512_load_si512(tile.lowest));
        const auto anew = static_cast<__mmask16>(present & ~refined);
        const __mmask16 escaped = _mm512_mask_cmpneq_epi32_mask(anew, coded, values);
        if (escaped != 0) add_escapes(escaped, fine, token, first_component);
        if (refined != 0) {
            const int32_t* const coarse_row = source_.coarse + token * source_.coarse_stride + first_component;
            const __m512i coarse = _mm512_maskz_loadu_epi32(refined, coarse_row);
            prefetch_before(coarse_row);
            const __m512i thrice = _mm512_add_epi32(_mm512_slli_epi32(coarse, 1), coarse);
            __m512i third = _mm512_sub_epi32(values, thrice);
            third = _mm512_mask_sub_epi32(third, _mm512_movepi32_mask(coarse), _mm512_setzero_si512(), third);
            coded = _mm512_mask_mov_epi32(coded, refined, third);
            const __m512i one = _mm512_set1_epi32(1), limit = _mm512_set1_epi32(kMaxCoarse);
            is_codable_ &=
                _mm512_mask_cmpgt_epu32_mask(refined, _mm512_add_epi32(third, one), _mm512_add_epi32(one, one)) == 0 &&
                _mm512_mask_cmpgt_epu32_mask(refined, _mm512_add_epi32(coarse, limit),
                                             _mm512_add_epi32(limit, limit)) == 0;
        }
        return _mm512_cvtepi32_epi16(_mm512_add_epi32(coded, zero));
    }

    // The next tile's: the one before.
    CACHEGEN_AVX512_INLINE static void prefetch_before(const int32_t* components) {
        _mm_prefetch(reinterpret_cast<const char*>(components - kTileComponents), _MM_HINT_T0);
    }

    // Write a row's symbols of the tile into its block.
    CACHEGEN_AVX512_APART void find_symbols(const TileSymbols& tile, int64_t first_component, int64_t row) {
        const int live = source_.shape.live_lanes(row);
        // Components 0 to 7, and 8 to 15, of the tokens j, 8 + j, 16 + j and 24 + j, in 128-bit lanes.
        __m512i first[8], second[8];
        const __m512i lower = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
        const __m512i upper = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            __m512i pairs[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const int token = 16 * i + j;
                __m256i symbols[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
                if (token < live) symbols[0] = symbols_of(tile, first_component, row * kNumLanes + token);
                if (token + 8 < live) symbols[1] = symbols_of(tile, first_component, row * kNumLanes + token + 8);
                pairs[i] = _mm512_inserti64x4(_mm512_castsi256_si512(symbols[0]), symbols[1], 1);
            }
            first[j] = _mm512_permutex2var_epi64(pairs[0], lower, pairs[1]);
            second[j] = _mm512_permutex2var_epi64(pairs[0], upper, pairs[1]);
        }
        transpose_8x8_words(first);
        transpose_8x8_words(second);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            _mm512_store_si512(block(row) + 64 * i, first[i]);
            _mm512_store_si512(block(row) + 64 * (8 + i), second[i]);
        }
    }

    // Store a component's raw bits as bit planes, and leave the high parts.
    CACHEGEN_AVX512_APART void split_low_bits(int64_t component, int in_tile) {
        const int low_bits = coding_.low_bits[component];
        for (int64_t row = 0; row < num_rows_; ++row) {
            const int live = source_.shape.live_lanes(row);
            int64_t position = source_.low_bits_layout->position(row, component, live);
            uint8_t* const words = block(row) + 64 * in_tile;
            const __m512i symbols = _mm512_load_si512(words);
            for (int bit = 0; bit < low_bits; ++bit, position += live) {
                const uint32_t plane =
                    _mm512_test_epi16_mask(symbols, _mm512_set1_epi16(static_cast<int16_t>(1 << bit)));
                store_plane(position, live, plane);
            }
            _mm512_store_si512(words, _mm512_srl_epi16(symbols, _mm_cvtsi32_si128(low_bits)));
        }
    }

    CACHEGEN_AVX512_APART void encode_component(int64_t component, int in_tile) {
        const FrequencyTable* source = &coding_.tables[coding_.table_indices[component]];
        if (source != table_of_) make_table(*source, &table_);
        table_of_ = source;
        // Local copies, so that the states stay in registers.
        __m512i first = first_, second = second_, seen = seen_;
        uint16_t* word = word_;
        int64_t row = num_rows_ - 1;
        if (source_.shape.live_lanes(row) < kNumLanes) {
            encode_row<true>(in_tile, row, first, second, seen, word);
            --row;
        }
        for (; row >= 0; --row) encode_row<false>(in_tile, row, first, second, seen, word);
        first_ = first;
        second_ = second;
        seen_ = seen;
        word_ = word;
    }

    template <bool kIsTail>
    CACHEGEN_AVX512_INLINE void encode_row(int in_tile, int64_t row, __m512i& first, __m512i& second, __m512i& seen,
                                           uint16_t*& word) {
        const auto* symbols = reinterpret_cast<const __m256i*>(block(row) + 64 * in_tile);
        encode_symbols<kIsTail>(
            _mm512_cvtepu16_epi32(_mm256_load_si256(symbols)), _mm512_cvtepu16_epi32(_mm256_load_si256(symbols + 1)),
            table_, first_lanes(kIsTail ? source_.shape.live_lanes(row) : kNumLanes), first, second, seen, word);
    }

    const FrequencyTable* table_of_ = nullptr;  // what table_ was made of
    EncodeTable table_;
    __m512i first_, second_;  // states of lanes 0 to 15 and 16 to 31
    __m512i seen_;            // the or of all table entries
};

}  // namespace

void encode_components(const ComponentSource& source, Scratch& scratch, EscapeKeys& escapes, EncodedStream* encoded) {
    encode_by_tiles<ComponentEncoder>(source, scratch, escapes, encoded);
}

}  // namespace cachegen::avx512

#endif  // CACHEGEN_X86
