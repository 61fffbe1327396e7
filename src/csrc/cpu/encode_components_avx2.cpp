// Encoding components with AVX2: the same tiles as encode_components_avx512.cpp.

#include "cpu/cpu_kernels.h"

#if CACHEGEN_X86

#include "cpu/avx2.h"
#include "cpu/component_source.h"
#include "cpu/rans_encode_avx2.h"

namespace cachegen::avx2 {
namespace {

class ComponentEncoder : public SourceTiles {
  public:
    using SourceTiles::SourceTiles;

    CACHEGEN_AVX2 void start() {
        for (__m256i& states : states_) states = _mm256_set1_epi32(kStateLow);
        seen_ = _mm256_setzero_si256();
    }

    // Encode a tile's components.
    CACHEGEN_AVX2 void encode(int64_t first_component) {
        const TileSymbols tile(coding_, source_.ranges, first_component);
        for (int first = 0; first < tile.count; first += 8)
            for (int64_t row = 0; row < num_rows_; ++row) find_symbols(tile, first, first_component, row);
        for (int i = tile.count - 1; i >= 0; --i) {
            const int64_t component = first_component + i;
            if (coding_.low_bits[component] > 0) split_low_bits(component, i);
            encode_component(component, i);
        }
    }

    CACHEGEN_AVX2 void finish(EncodedStream* encoded) const {
        encoded->status = is_codable_ && !has_absent(seen_) ? Status::kOk : Status::kNoFrequency;
        if (encoded->status != Status::kOk) return;
        uint32_t states[kNumLanes];
        store_states(states_, states);
        join(states, encoded);
    }

  private:
    // In the blocks, tokens stand in the order 0-7, 16-23, 8-15 and 24-31.

    // The first `count` doublewords all ones.
    CACHEGEN_AVX2_INLINE static __m256i first_of_eight(int count) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }

    // A token's symbols of eight components of the tile from `first` on, and its escapes.
    CACHEGEN_AVX2_INLINE __m256i symbols_of(const TileSymbols& tile, int first, int64_t first_component,
                                            int64_t token) {
        const auto load = [first](const int32_t* numbers) { return reinterpret_cast<const __m256i*>(numbers + first); };
        const __m256i present = first_of_eight(tile.count - first);
        const int32_t* fine = source_.fine + token * source_.fine_stride + first_component + first;
        const __m256i values = tile.count - first >= 8 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(fine))
                                                       : _mm256_maskload_epi32(fine, present);
        prefetch_before(fine);
        __m256i coded = _mm256_max_epi32(_mm256_min_epi32(values, _mm256_load_si256(load(tile.highest))),
                                         _mm256_load_si256(load(tile.lowest)));
        const __m256i refined = first_of_eight(tile.num_refined - first);
        const __m256i is_kept = _mm256_or_si256(_mm256_cmpeq_epi32(coded, values), refined);
        const int escaped = ~_mm256_movemask_ps(_mm256_castsi256_ps(is_kept)) & 255;
        if (escaped != 0) add_escapes(escaped, fine, token, first_component + first);
        if (tile.num_refined > first) {
            const int32_t* coarse_row = source_.coarse + token * source_.coarse_stride + first_component + first;
            const __m256i coarse = _mm256_maskload_epi32(coarse_row, refined);
            prefetch_before(coarse_row);
            const __m256i thrice = _mm256_add_epi32(_mm256_slli_epi32(coarse, 1), coarse);
            const __m256i sign = _mm256_srai_epi32(coarse, 31);
            const __m256i third = _mm256_sub_epi32(_mm256_xor_si256(_mm256_sub_epi32(values, thrice), sign), sign);
            coded = _mm256_blendv_epi8(coded, third, refined);
            const __m256i one = _mm256_set1_epi32(1), limit = _mm256_set1_epi32(kMaxCoarse);
            const __m256i is_wrong = _mm256_or_si256(is_beyond(third, one), is_beyond(coarse, limit));
            is_codable_ &= _mm256_testz_si256(is_wrong, refined) != 0;
        }
        return _mm256_add_epi32(coded, _mm256_load_si256(load(tile.zero)));
    }

    // The next tile's: the one before.
    CACHEGEN_AVX2_INLINE static void prefetch_before(const int32_t* components) {
        _mm_prefetch(reinterpret_cast<const char*>(components - kTileComponents), _MM_HINT_T0);
    }

    // Which numbers have a magnitude above a limit.
    CACHEGEN_AVX2_INLINE static __m256i is_beyond(__m256i numbers, __m256i limit) {
        return _mm256_or_si256(_mm256_cmpgt_epi32(numbers, limit),
                               _mm256_cmpgt_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), limit), numbers));
    }

    // Write a row's symbols of eight components into its block.
    __attribute__((noinline)) CACHEGEN_AVX2 void find_symbols(const TileSymbols& tile, int first,
                                                              int64_t first_component, int64_t row) {
        const int live = source_.shape.live_lanes(row);
        for (int half = 0; half < 2; ++half) {
            // Eight components of the tokens j and 16 + j, or 8 + j and 24 + j, in 128-bit lanes.
            __m256i words[8];
            for (int j = 0; j < 8; ++j) {
                const int token = 8 * half + j;
                __m256i symbols[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
                for (int i = 0; i < 2; ++i)
                    if (token + 16 * i < live)
                        symbols[i] = symbols_of(tile, first, first_component, row * kNumLanes + token + 16 * i);
                words[j] = _mm256_permute4x64_epi64(_mm256_packs_epi32(symbols[0], symbols[1]), 0xD8);
            }
            transpose_8x8_words(words);
            for (int i = 0; i < 8; ++i)
                _mm256_store_si256(reinterpret_cast<__m256i*>(block(row) + 64 * (first + i) + 32 * half), words[i]);
        }
    }

    // Store a component's raw bits as bit planes, and leave the high parts.
    __attribute__((noinline)) CACHEGEN_AVX2 void split_low_bits(int64_t component, int in_tile) {
        const int low_bits = coding_.low_bits[component];
        for (int64_t row = 0; row < num_rows_; ++row) {
            const int live = source_.shape.live_lanes(row);
            int64_t position = source_.low_bits_layout->position(row, component, live);
            auto* const words = reinterpret_cast<__m256i*>(block(row) + 64 * in_tile);
            const __m256i symbols[2] = {_mm256_load_si256(words), _mm256_load_si256(words + 1)};
            for (int bit = 0; bit < low_bits; ++bit, position += live) {
                const __m128i shift = _mm_cvtsi32_si128(15 - bit);
                const __m256i bytes =
                    _mm256_packs_epi16(_mm256_sll_epi16(symbols[0], shift), _mm256_sll_epi16(symbols[1], shift));
                const auto plane = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
                store_plane(position, live, plane);
            }
            for (int i = 0; i < 2; ++i)
                _mm256_store_si256(words + i, _mm256_srl_epi16(symbols[i], _mm_cvtsi32_si128(low_bits)));
        }
    }

    __attribute__((noinline)) CACHEGEN_AVX2 void encode_component(int64_t component, int in_tile) {
        const FrequencyTable* source = &coding_.tables[coding_.table_indices[component]];
        if (source != table_of_) make_table(*source, &table_);
        table_of_ = source;
        // Local copies, so that the states stay in registers.
        __m256i states[4], seen = seen_;
        for (int i = 0; i < 4; ++i) states[i] = states_[i];
        uint16_t* word = word_;
        int64_t row = num_rows_ - 1;
        if (source_.shape.live_lanes(row) < kNumLanes) {
            encode_row<true>(in_tile, row, states, seen, word);
            --row;
        }
        for (; row >= 0; --row) encode_row<false>(in_tile, row, states, seen, word);
        for (int i = 0; i < 4; ++i) states_[i] = states[i];
        seen_ = seen;
        word_ = word;
    }

    template <bool kIsTail>
    CACHEGEN_AVX2_INLINE void encode_row(int in_tile, int64_t row, __m256i states[4], __m256i& seen, uint16_t*& word) {
        const auto* words = reinterpret_cast<const __m256i*>(block(row) + 64 * in_tile);
        const __m256i symbols = _mm256_packus_epi16(_mm256_load_si256(words), _mm256_load_si256(words + 1));
        encode_symbols<kIsTail>(symbols, table_, kIsTail ? source_.shape.live_lanes(row) : kNumLanes, states, seen,
                                word);
    }

    const FrequencyTable* table_of_ = nullptr;  // what table_ was made of
    EncodeTable table_;
    __m256i states_[4];
    __m256i seen_;  // the or of all frequencies
};

}  // namespace

void encode_components(const ComponentSource& source, Scratch& scratch, EscapeKeys& escapes, EncodedStream* encoded) {
    encode_by_tiles<ComponentEncoder>(source, scratch, escapes, encoded);
}

}  // namespace cachegen::avx2

#endif  // CACHEGEN_X86
