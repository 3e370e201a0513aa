// How a norm walks through its tensors on the CPU. No torch in this file.
//
// A unit is normalised on its own: an image if the channels lie last, else one group of an image. It is cut into tiles, matrices
// whose columns are added up first, each on its own, and then joined. If the channels lie last, a column is a channel; else a tile
// is a stretch of one channel's pixels, in columns enough to fill the vectors of the machine. Tiles do not depend on threads, so
// neither does the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "host_device.h"

namespace knife {

constexpr int64_t kRows = 64;     // of a tile, at most: few enough for sums in float32, and for a cache
constexpr int64_t kColumns = 64;  // of a tile of one channel, at most

struct Tile {
  int64_t offset;  // of its first value in the tensor
  int64_t rows, columns;
  int64_t channel;  // of its first column, counted in its unit
};

struct Walk {
  int64_t images, channels, pixels, groups;
  bool last;  // the channels lie last

  KNIFE_FN int64_t group_channels() const { return channels / groups; }
  KNIFE_FN int64_t group_size() const { return group_channels() * pixels; }

  int64_t units() const { return last ? images : images * groups; }
  int64_t unit_channels() const { return last ? channels : group_channels(); }
  int64_t unit_groups() const { return last ? groups : 1; }
  int64_t unit_size() const { return unit_channels() * pixels; }
  int64_t image(int64_t unit) const { return last ? unit : unit / groups; }
  int64_t first_channel(int64_t unit) const { return last ? 0 : unit % groups * group_channels(); }

  int64_t columns() const { return last ? channels : std::clamp<int64_t>(pixels, 1, kColumns); }  // of a tile, at most
  int64_t channel_tiles() const { return (pixels / columns() + kRows - 1) / kRows + (pixels % columns() != 0); }
  int64_t tiles() const { return last ? (pixels + kRows - 1) / kRows : unit_channels() * channel_tiles(); }

  // The walk for what does not tell the channels of a group apart.
  Walk by_group() const { return last ? *this : Walk{images, groups, group_size(), groups, false}; }

  Tile tile(int64_t unit, int64_t i) const {
    const int64_t offset = unit * unit_size();
    if (last) return {offset + i * kRows * channels, std::min(kRows, pixels - i * kRows), channels, 0};
    const int64_t channel = i / channel_tiles(), row = i % channel_tiles() * kRows, rows = pixels / columns();
    const int64_t start = offset + channel * pixels;
    if (row < rows) return {start + row * columns(), std::min(kRows, rows - row), columns(), channel};
    return {start + rows * columns(), 1, pixels % columns(), channel};  // what is left of a row
  }
};

// Joins means and squared deviations of many parts, in double and around a value that is not far from any.
struct Pool {
  double pivot = 0, count = 0, sum = 0, squares = 0;

  void add(double values, double mean, double deviation) {
    if (count == 0) pivot = mean;
    const double apart = mean - pivot;
    count += values;
    sum += values * apart;
    squares += deviation + values * apart * apart;
  }
  double mean() const { return pivot + sum / count; }
  double variance() const { return std::max(0.0, squares - sum * sum / count) / count; }
};

}  // namespace knife
