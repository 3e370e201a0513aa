// How a norm is shared out on CUDA. No torch and no CUDA in this file.
//
// A unit is normalised on its own: one group of an image, or if the channels lie last some neighbouring groups of it, so many
// that their channels fill a line of the cache. It is columns and rows of packs of `width` values. If the channels lie last, a
// column is `width` channels and a row is a pixel; else a column is a channel and a row is `width` of its pixels. Units are cut
// into slabs, one for each block: enough to fill the GPU, however many images there are.
//
// A block sees a slab through its threads: `columns_at_once` columns side by side, a chunk, and `rows_at_once` rows of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "norm_walk.h"

#ifndef KNIFE_NORM_THREADS
#define KNIFE_NORM_THREADS 320
#endif

namespace knife {

constexpr int kNormThreads = KNIFE_NORM_THREADS;  // of a block
constexpr int kNormBlocks = 2;                    // of those on a multiprocessor at a time: 96 registers for each thread
constexpr int kChunk = 256;  // channels that a block sees at once, at most: their numbers lie in shared memory
constexpr int kLine = 128;   // bytes of neighbouring channels that are worth a unit of their own
// Packs that a thread takes:
constexpr int64_t kAlone = 8;   // of a unit before it is cut; fewer are not worth a second launch
constexpr int64_t kFewest = 4;  // of a slab, about, so that it does more than add up
constexpr int64_t kMost = 64;   // of a slab at most, within a factor of two: of so few values the sums may be in float32

struct Slabs {
  Walk walk;
  int width;
  int64_t parts;  // units of an image
  int64_t unit_channels, columns, rows;
  int unit_groups;
  int64_t column_run, row_run;  // of a slab, at most
  int column_pieces, row_pieces;
  int columns_at_once, rows_at_once;

  KNIFE_FN int count() const { return column_pieces * row_pieces; }  // slabs of a unit
  KNIFE_FN bool whole() const { return count() == 1; }
  KNIFE_FN int lane_channels() const { return walk.last ? width : 1; }  // channels of a column

  // Values of each group of a unit that lie in a slab.
  KNIFE_FN int64_t values(int slab) const {
    const int64_t column = slab / row_pieces * column_run, row = slab % row_pieces * row_run;
    const int64_t taken = row_run < rows - row ? row_run : rows - row;
    if (walk.last) return taken * walk.group_channels();
    return taken * width * (column_run < columns - column ? column_run : columns - column);
  }

  int64_t blocks() const { return walk.images * parts * count(); }

  // Numbers that the blocks of a first launch leave for those of a second: two for each group of each slab, and for gradients two
  // more for each channel of each piece of its rows.
  int64_t group_numbers() const { return whole() ? 0 : blocks() * unit_groups * 2; }
  int64_t channel_numbers() const { return whole() ? 0 : walk.images * walk.channels * row_pieces * 2; }
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether a block can take units of which there are so many an image: whole packs, and either one group or all channels at once.
inline bool unit_fits(const Walk& walk, int width, int64_t parts) {
  if (walk.groups % parts != 0 || walk.channels / parts % width != 0) return false;
  const int64_t groups = walk.groups / parts, channels = walk.channels / parts;
  return groups == 1 || (channels <= kChunk && channels / width <= kNormThreads && groups <= kNormThreads);
}

// Returns how many units to make of an image, or 0 if no unit holds whole packs. If the channels lie last, the most whose rows fill
// a line, or else the fewest that fit.
inline int64_t units_of_image(const Walk& walk, int width, int value_bytes) {
  if (!walk.last) return walk.pixels % width == 0 ? walk.groups : 0;
  int64_t found = 0;
  for (int64_t parts = 1; parts <= walk.groups; ++parts) {
    if (!unit_fits(walk, width, parts)) continue;
    if (found && walk.channels / parts * value_bytes < kLine) break;
    found = parts;
  }
  return found;
}

// Says which threads take what, once the runs of a slab are known.
inline void place_threads(Slabs& slabs) {
  const int64_t most = std::min<int64_t>(kNormThreads, kChunk / slabs.lane_channels());
  if (slabs.walk.last) {
    slabs.columns_at_once = static_cast<int>(std::min(slabs.column_run, most));
    slabs.rows_at_once = kNormThreads / slabs.columns_at_once;
  } else {
    slabs.rows_at_once = static_cast<int>(std::min<int64_t>(slabs.row_run, kNormThreads));
    slabs.columns_at_once = static_cast<int>(std::min({slabs.column_run, most, int64_t{kNormThreads} / slabs.rows_at_once}));
  }
}

// Packs that a thread takes of a slab.
inline int64_t turns(const Slabs& slabs) {
  return ceil_divide(slabs.row_run, slabs.rows_at_once) * ceil_divide(slabs.column_run, slabs.columns_at_once);
}

// Cuts units so that the blocks of all units fill the multiprocessors once, or some whole times if that makes slabs too large. Of
// small units each stays whole, and then one launch does all.
inline void cut(Slabs& slabs, int processors) {
  const int64_t alone = turns(slabs), units = slabs.walk.images * slabs.parts;
  if (alone <= kAlone) return;
  const int64_t side_by_side = std::max<int64_t>(1, int64_t{processors} * kNormBlocks / units);
  int64_t wanted = std::min(side_by_side, alone / kFewest);
  wanted *= ceil_divide(alone, kMost * wanted);
  if (!slabs.walk.last) slabs.column_run = ceil_divide(slabs.columns, std::min(wanted, slabs.columns));
  const int64_t column_pieces = ceil_divide(slabs.columns, slabs.column_run);
  slabs.row_run = ceil_divide(slabs.rows, std::clamp<int64_t>(wanted / column_pieces, 1, slabs.rows));
  slabs.column_pieces = static_cast<int>(column_pieces);
  slabs.row_pieces = static_cast<int>(ceil_divide(slabs.rows, slabs.row_run));
  place_threads(slabs);
}

// Shares out features of `value_bytes` a value on so many multiprocessors, in packs of up to 16 bytes if they are aligned so.
inline Slabs share_out(const Walk& walk, int value_bytes, bool aligned, int processors) {
  int width = aligned ? 16 / value_bytes : 1;
  if (width > 4 && units_of_image(walk, width, value_bytes) == 0) width = 4;
  if (units_of_image(walk, width, value_bytes) == 0) width = 1;
  Slabs slabs{};
  slabs.walk = walk;
  slabs.width = width;
  slabs.parts = units_of_image(walk, width, value_bytes);
  slabs.unit_groups = static_cast<int>(walk.groups / slabs.parts);
  slabs.unit_channels = walk.channels / slabs.parts;
  slabs.columns = slabs.column_run = walk.last ? slabs.unit_channels / width : slabs.unit_channels;
  slabs.rows = slabs.row_run = walk.last ? walk.pixels : walk.pixels / width;
  slabs.column_pieces = slabs.row_pieces = 1;
  place_threads(slabs);
  cut(slabs, processors);
  return slabs;
}

}  // namespace knife
