// The tiles that the vector decoders of components share: 16 components of all tokens of a batch's streams.

#pragma once

#include <cstdint>

#include "cpu/component_batch.h"
#include "cpu/stream_batch.h"
#include "cpu/stream_words.h"

namespace cachegen {

class ComponentTiles {
  public:
    // `memory` holds num_bytes().
    ComponentTiles(const ComponentBatch& batch, uint8_t* memory)
        : batch_(batch), num_rows_(batch.shape.num_rows()), tile_(memory), words_(batch, memory + tile_bytes(batch)) {}

    static size_t num_bytes(const ComponentBatch& batch) {
        return tile_bytes(batch) + StreamWords::num_copied_bytes(batch);
    }

  protected:
    // 64 bytes longer than a block, or blocks would share cache sets.
    static constexpr int64_t kBlockStride = 64 * kTileComponents + 64;

    // A row's symbols of a stream's tile: per component 32 words, one per token, in the order of the path's lanes.
    uint8_t* block(int64_t row, int s) const { return tile_ + (s * num_rows_ + row) * kBlockStride; }

    // How many of the first `num_active` streams have a component.
    int count_active(int num_active, int64_t component) const {
        while (num_active > 0 && component >= batch_.streams[num_active - 1].num_components()) --num_active;
        return num_active;
    }

    const ComponentBatch& batch_;
    const int64_t num_rows_;
    uint8_t* const tile_;
    StreamWords words_;

  private:
    static int64_t tile_bytes(const ComponentBatch& batch) {
        return batch.shape.num_rows() * batch.num_streams * kBlockStride;
    }
};

// What CpuKernels::decode_components does, by a path's decoder of tiles.
template <class Decoder>
void decode_by_tiles(const ComponentBatch& batch, Scratch& scratch, Status* statuses) {
    Decoder decoder(batch, scratch.reserve(Decoder::num_bytes(batch)));
    decoder.load();
    for (int64_t first = 0; first < batch.shape.num_channels; first += kTileComponents) decoder.decode(first);
    for (int s = 0; s < batch.num_streams; ++s) statuses[s] = decoder.status(s);
}

}  // namespace cachegen
