// A stream of components that is to be encoded, and what the vector encoders share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "component_streams.h"
#include "cpu/component_batch.h"
#include "cpu/components.h"
#include "cpu/rans_portable.h"
#include "cpu/stream_batch.h"

namespace cachegen {

struct ComponentSource {
    const int32_t* fine = nullptr;  // [num_tokens][fine_stride], of the stream's first token
    int64_t fine_stride = 0;
    const int32_t* coarse = nullptr;  // [num_tokens][coarse_stride], the level before's
    int64_t coarse_stride = 0;
    StreamShape shape{};
    const ComponentCoding* coding = nullptr;
    const LowBits* low_bits_layout = nullptr;
    const SymbolRange* ranges = nullptr;  // of the coding's tables
};

// From components to symbols, for a tile's components: those coded anew are limited to what has symbols.
struct TileSymbols {
    alignas(64) int32_t zero[kTileComponents] = {};  // the symbol of component 0; of a refinement's middle third
    alignas(64) int32_t lowest[kTileComponents] = {};
    alignas(64) int32_t highest[kTileComponents] = {};
    int count = 0;        // components that there are
    int num_refined = 0;  // the first of them are refined

    TileSymbols(const ComponentCoding& coding, const SymbolRange* ranges, int64_t first)
        : count(static_cast<int>(std::min<int64_t>(kTileComponents, coding.num_components - first))),
          num_refined(static_cast<int>(std::clamp<int64_t>(coding.num_refined - first, 0, count))) {
        for (int i = 0; i < count; ++i) {
            if (i < num_refined) {
                zero[i] = 1;
                continue;
            }
            const int low_bits = coding.low_bits[first + i];
            const SymbolRange& range = ranges[coding.table_indices[first + i]];
            zero[i] = zero_component_symbol(low_bits);
            lowest[i] = (range.first << low_bits) - zero[i];
            highest[i] = ((range.last + 1) << low_bits) - 1 - zero[i];
        }
    }
};

// Escapes in any order, as keys that order like their places.
class EscapeKeys {
  public:
    void clear() { keys_.clear(); }
    void add(int64_t place, int32_t component) {
        keys_.push_back(static_cast<uint64_t>(place) << 32 | static_cast<uint32_t>(component));
    }
    int64_t num_bytes() const { return kEscapeBytes * static_cast<int64_t>(keys_.size()); }
    void write(uint8_t* bytes) {
        std::sort(keys_.begin(), keys_.end());
        for (const uint64_t key : keys_) {
            store_u32(bytes, static_cast<uint32_t>(key >> 32));
            store_u32(bytes + 4, static_cast<uint32_t>(key));
            bytes += kEscapeBytes;
        }
    }

  private:
    std::vector<uint64_t> keys_;
};

// The tiles that the vector encoders share: 16 components of all tokens of a stream, and what becomes of them.
class SourceTiles {
  public:
    SourceTiles(const ComponentSource& source, Scratch& scratch, EscapeKeys& escapes)
        : source_(source), coding_(*source.coding), num_rows_(source.shape.num_rows()), escapes_(escapes) {
        const int64_t tile_bytes = num_rows_ * kBlockStride;
        // With 8 bytes more: tail rows are written by bits.
        const int64_t low_bytes = round_up(source.low_bits_layout->total() / 8 + 16, 64);
        // A symbol gives up at most one word, and a store may begin 16 bytes before the words.
        const int64_t words_bytes = round_up(2 * source.shape.num_tokens * source.shape.num_channels + 16, 64);
        tile_ = scratch.reserve(tile_bytes + low_bytes + words_bytes);
        low_bits_ = tile_ + tile_bytes;
        std::memset(low_bits_, 0, low_bytes);
        word_ = words_end_ = reinterpret_cast<uint16_t*>(low_bits_ + low_bytes + words_bytes);
        escapes.clear();
    }

  protected:
    // A row's symbols of the tile: per component 32 words, one per token, in the order of the path's lanes.
    uint8_t* block(int64_t row) const { return tile_ + row * kBlockStride; }

    // Components of a token, from `first` on, are escapes: those of a mask.
    __attribute__((noinline)) void add_escapes(uint32_t mask, const int32_t* components, int64_t token, int64_t first) {
        for (; mask != 0; mask &= mask - 1) {
            const int i = __builtin_ctz(mask);
            is_codable_ &= components[i] >= -kMaxComponent && components[i] <= kMaxComponent;
            escapes_.add(token * source_.shape.num_channels + first + i, components[i]);
        }
    }

    // One bit of the symbols of a row and component.
    void store_plane(int64_t position, int live, uint32_t plane) {
        if (live == kNumLanes)
            std::memcpy(low_bits_ + position / 8, &plane, 4);
        else
            write_bits(low_bits_, position, live, plane & ((1u << live) - 1));
    }

    // Put the stream together, where all was found to be codable.
    void join(const uint32_t states[kNumLanes], EncodedStream* encoded) const {
        escapes_.write(encoded->join(states, source_.shape.num_lanes(), low_bits_, source_.low_bits_layout->total(),
                                     word_, words_end_, escapes_.num_bytes()));
    }

    const ComponentSource& source_;
    const ComponentCoding& coding_;
    const int64_t num_rows_;
    uint16_t* word_;  // the words that there are begin here
    bool is_codable_ = true;

  private:
    static constexpr int64_t kBlockStride = 64 * kTileComponents + 64;  // blocks would share cache sets otherwise

    EscapeKeys& escapes_;
    uint8_t* tile_;
    uint8_t* low_bits_;
    uint16_t* words_end_;
};

// What CpuKernels::encode_components does, by a path's encoder of tiles.
template <class Encoder>
void encode_by_tiles(const ComponentSource& source, Scratch& scratch, EscapeKeys& escapes, EncodedStream* encoded) {
    Encoder encoder(source, scratch, escapes);
    encoder.start();
    const int64_t num_tiles = (source.shape.num_channels + kTileComponents - 1) / kTileComponents;
    for (int64_t tile = num_tiles - 1; tile >= 0; --tile) encoder.encode(tile * kTileComponents);
    encoder.finish(encoded);
}

}  // namespace cachegen
