// How images are cut into the patches of winograd.h and put together again, in parallel over tiles. No torch in this file, but
// for its threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.h"
#include "winograd.h"

namespace knife::winograd {
namespace {

constexpr int64_t kGrain = 4;  // tiles that are worth a thread of their own

// Images [N, C, H, W] whose channels lie last, cut into tiles from left to right and down; at the edges they may hang over.
struct Tiles {
  int64_t images, height, width;

  int64_t down() const { return (height + kTile - 1) / kTile; }
  int64_t across() const { return (width + kTile - 1) / kTile; }
  int64_t count() const { return images * down() * across(); }
};

struct Place {
  int64_t image, top, left;  // of a tile's first pixel
};

inline Place place(const Tiles& tiles, int64_t tile) {
  const int64_t row = tile / tiles.across(), column = tile % tiles.across();
  return {row / tiles.down(), row % tiles.down() * kTile, column * kTile};
}

inline const Row& row_at(const float* values) { return *reinterpret_cast<const Row*>(values); }
inline Row& row_at(float* values) { return *reinterpret_cast<Row*>(values); }

// Reads the patch around a tile, [6][6]; `x` points to the first channel. Beyond the image lie zeros.
inline void read_patch(const float* x, const Tiles& tiles, Place at, int64_t channels, Row* patch) {
  const auto inside = [](int64_t first, int64_t size) { return first > 0 && first + kPatch - 1 <= size; };
  const int64_t line = tiles.width * channels, top = at.top - 1, left = at.left - 1;
  const int64_t corner = (at.image * tiles.height + top) * line + left * channels;  // may lie before x
  if (inside(at.top, tiles.height) && inside(at.left, tiles.width)) {
    for (int64_t i = 0; i < kPatch; ++i)
      for (int64_t j = 0; j < kPatch; ++j) patch[i * kPatch + j] = row_at(x + corner + i * line + j * channels);
    return;
  }
  for (int64_t i = 0; i < kPatch; ++i)
    for (int64_t j = 0; j < kPatch; ++j) {
      const bool there = top + i >= 0 && top + i < tiles.height && left + j >= 0 && left + j < tiles.width;
      patch[i * kPatch + j] = there ? row_at(x + corner + i * line + j * channels) : Row{};
    }
}

// Transforms the patches of tiles [begin, end) into spread, [36, tiles, C].
void spread_tiles(const float* x, const Tiles& tiles, int64_t channels, int64_t begin, int64_t end, float* spread) {
  const int64_t point = (end - begin) * channels;
  parallel_for(begin, end, kGrain, [&](int64_t first, int64_t last) {
    Row patch[kPoints];
    for (int64_t tile = first; tile < last; ++tile)
      for (int64_t c = 0; c < channels; c += kLanes) {
        read_patch(x + c, tiles, place(tiles, tile), channels, patch);
        spread_patch(patch);
        float* const out = spread + (tile - begin) * channels + c;
        for (int64_t p = 0; p < kPoints; ++p) row_at(out + p * point) = patch[p];
      }
  });
}

// Transforms products [36, tiles, K] back into tiles [begin, end) of y.
void gather_tiles(const float* products, const float* bias, const Tiles& tiles, int64_t channels, int64_t begin, int64_t end,
                  float* y) {
  const int64_t point = (end - begin) * channels, line = tiles.width * channels;
  parallel_for(begin, end, kGrain, [&](int64_t first, int64_t last) {
    Row patch[kPoints], made[kTile * kTile];
    for (int64_t tile = first; tile < last; ++tile) {
      const Place at = place(tiles, tile);
      const int64_t rows = std::min(kTile, tiles.height - at.top), columns = std::min(kTile, tiles.width - at.left);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const float* const in = products + (tile - begin) * channels + c;
        for (int64_t p = 0; p < kPoints; ++p) patch[p] = row_at(in + p * point);
        gather_patch(patch, made);
        const Row added = bias ? row_at(bias + c) : Row{};
        float* const out = y + (at.image * tiles.height + at.top) * line + at.left * channels + c;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < columns; ++j) row_at(out + i * line + j * channels) = made[i * kTile + j] + added;
      }
    }
  });
}

}  // namespace
}  // namespace knife::winograd
