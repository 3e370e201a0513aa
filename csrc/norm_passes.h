// The norm on the CPU, forwards and backwards: two passes over each unit (norm_walk.h), in parallel over units or, if they are
// few, over the tiles of each. No torch in this file, but for its threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "norm.h"
#include "norm_walk.h"
#include "threads.h"

namespace knife {
namespace {

constexpr int64_t kGrain = 32768;  // values that are worth a thread of their own

// Calls f(unit): side by side if there is one for each thread, else in turn, and then the tiles share the threads.
template <typename F>
void each_unit(const Walk& walk, const F& f) {
  const int64_t units = walk.units(), grain = kGrain / std::max<int64_t>(walk.unit_size(), 1) + 1;
  const bool enough = units >= static_cast<int64_t>(get_num_threads());
  parallel_for(0, units, enough ? grain : std::max<int64_t>(units, 1), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) f(unit);
  });
}

// Calls f(tile, its number).
template <typename F>
void each_tile(const Walk& walk, int64_t unit, const F& f) {
  const int64_t grain = kGrain / (kRows * walk.columns()) + 1;
  parallel_for(0, walk.tiles(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(walk.tile(unit, i), i);
  });
}

// Mean and sum of squared deviations of neighbouring columns of a tile, at most kColumns. Sums are taken around the first row: of
// kRows values none is further than sqrt(kRows) deviations from their mean, so little cancels.
template <typename S, typename T>
inline void column_moments(const S* x, Tile tile, int64_t columns, T* __restrict mean, T* __restrict deviation) {
  T first[kColumns], sum[kColumns] = {}, squares[kColumns] = {};
  for (int64_t c = 0; c < columns; ++c) first[c] = static_cast<T>(x[c]);
  for (int64_t r = 1; r < tile.rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const T apart = static_cast<T>(x[r * tile.columns + c]) - first[c];
      sum[c] += apart;
      squares[c] = multiply_add(apart, apart, squares[c]);
    }
  const T share = 1 / static_cast<T>(tile.rows);
  for (int64_t c = 0; c < columns; ++c) {
    mean[c] = first[c] + sum[c] * share;
    deviation[c] = squares[c] - sum[c] * sum[c] * share;
  }
}

// The same for all columns.
template <typename S, typename T>
void tile_moments(const S* x, Tile tile, T* mean, T* deviation) {
  int64_t c = 0;
  for (; c + kColumns <= tile.columns; c += kColumns) column_moments(x + c, tile, kColumns, mean + c, deviation + c);
  if (c < tile.columns) column_moments(x + c, tile, tile.columns - c, mean + c, deviation + c);
}

// Mean and variance of each group of a unit.
template <typename T, typename S>
std::vector<Pool> pool(const Walk& walk, int64_t unit, const S* x) {
  const int64_t columns = walk.columns(), group_columns = columns / walk.unit_groups();
  std::vector<T> mean(walk.tiles() * columns), deviation(walk.tiles() * columns);
  each_tile(walk, unit, [&](Tile tile, int64_t i) {
    tile_moments(x + tile.offset, tile, &mean[i * columns], &deviation[i * columns]);
  });
  std::vector<Pool> pools(walk.unit_groups());
  for (int64_t i = 0; i < walk.tiles(); ++i) {
    const Tile tile = walk.tile(unit, i);
    for (int64_t g = 0; g < walk.unit_groups(); ++g)
      for (int64_t c = g * group_columns; c < std::min((g + 1) * group_columns, tile.columns); ++c)
        pools[g].add(tile.rows, mean[i * columns + c], deviation[i * columns + c]);
  }
  return pools;
}

// Below, `last` says whether each column of a tile is a channel, with numbers of its own, or the whole tile lies in one. Then its
// values are one row.
template <bool last>
Tile flat(Tile tile) {
  return last ? tile : Tile{tile.offset, 1, tile.rows * tile.columns, tile.channel};
}

template <bool last, typename S, typename T>
void activate_tile(S* __restrict y, const S* x, Tile tile, const T* __restrict slope, const T* __restrict lift) {
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t c = 0; c < tile.columns; ++c) {
      const int64_t i = r * tile.columns + c, k = last ? c : 0;
      y[i] = static_cast<S>(activate(slope[k], lift[k], static_cast<T>(x[i])));
    }
}

// dz of a tile; its sum over each column, and that of dz (x - mean).
template <bool last, typename S, typename T>
void descend_tile(T* __restrict dz, const S* dy, const S* x, Tile tile, const T* __restrict slope, const T* __restrict lift,
                  const T* __restrict mean, T* __restrict sum, T* __restrict tilt) {
  for (int64_t r = 0; r < tile.rows; ++r)
    for (int64_t c = 0; c < tile.columns; ++c) {
      const int64_t i = r * tile.columns + c, k = last ? c : 0;
      const T value = static_cast<T>(x[i]), one = descend(slope[k], lift[k], value, static_cast<T>(dy[i]));
      dz[i] = one;
      sum[c] += one;
      tilt[c] = multiply_add(one, value - mean[k], tilt[c]);
    }
}

// dx of a tile, which may lie where dz does.
template <bool last, typename S, typename T>
void finish_tile(S* dx, const T* dz, const S* x, Tile tile, const T* __restrict slope, const T* __restrict mean,
                 const T* __restrict bend, const T* __restrict level) {
  for (int64_t r = 0; r < tile.rows; ++r)
#pragma GCC ivdep
    for (int64_t c = 0; c < tile.columns; ++c) {
      const int64_t i = r * tile.columns + c, k = last ? c : 0;
      dx[i] = static_cast<S>(multiply_add(bend[k], static_cast<T>(x[i]) - mean[k], multiply_add(slope[k], dz[i], level[k])));
    }
}

// The sum of a few numbers, halved until one is left.
template <typename T>
T halved(T* numbers, int64_t count) {
  for (int64_t half; count > 1; count = half) {
    half = (count + 1) / 2;
    for (int64_t c = 0; c < count - half; ++c) numbers[c] += numbers[half + c];
  }
  return numbers[0];
}

// S is stored, T is computed in.
template <bool last, typename S, typename T>
void forward(const Walk& walk, const Affine<T>& affine, double eps, const S* x, S* y, T* mean, T* rstd) {
  each_unit(walk, [&](int64_t unit) {
    const std::vector<Pool> pools = pool<T>(walk.by_group(), unit, x);
    std::vector<T> slope(walk.unit_channels()), lift(walk.unit_channels());
    for (int64_t g = 0; g < walk.unit_groups(); ++g) {
      const double center = pools[g].mean(), inverse = 1 / std::sqrt(pools[g].variance() + eps);
      mean[unit * walk.unit_groups() + g] = static_cast<T>(center);
      rstd[unit * walk.unit_groups() + g] = static_cast<T>(inverse);
      for (int64_t c = g * walk.group_channels(); c < (g + 1) * walk.group_channels(); ++c) {
        const Line<T> line = line_of(affine, walk.image(unit), walk.first_channel(unit) + c, center, inverse);
        slope[c] = line.slope;
        lift[c] = line.lift;
      }
    }
    each_tile(walk, unit, [&](Tile tile, int64_t) {
      activate_tile<last>(y + tile.offset, x + tile.offset, flat<last>(tile), &slope[tile.channel], &lift[tile.channel]);
    });
  });
}

// Numbers of the channels of a unit.
template <typename T>
struct Channels {
  explicit Channels(int64_t count) : slope(count), lift(count), mean(count), bend(count), level(count), sum(count), tilt(count) {}
  std::vector<T> slope, lift, mean, bend, level;
  std::vector<double> sum, tilt;  // of dz, and of dz (x - mean), over the pixels
};

// Writes dz of a unit, and adds it up.
template <bool last, typename S, typename T>
void descend_unit(const Walk& walk, int64_t unit, const S* dy, const S* x, T* dz, Channels<T>& numbers) {
  const int64_t width = last ? walk.channels : 1, begin = unit * walk.unit_size();  // numbers that are left of a tile
  std::vector<T> sums(walk.tiles() * width), tilts(walk.tiles() * width);
  each_tile(walk, unit, [&](Tile tile, int64_t i) {
    T columns[2][kColumns] = {};
    T *const sum = last ? &sums[i * width] : columns[0], *const tilt = last ? &tilts[i * width] : columns[1];
    descend_tile<last>(dz + (tile.offset - begin), dy + tile.offset, x + tile.offset, tile, &numbers.slope[tile.channel],
                       &numbers.lift[tile.channel], &numbers.mean[tile.channel], sum, tilt);
    if (last) return;
    sums[i] = halved(sum, tile.columns);
    tilts[i] = halved(tilt, tile.columns);
  });
  for (int64_t i = 0; i < walk.tiles(); ++i) {
    const int64_t channel = walk.tile(unit, i).channel;
    for (int64_t c = 0; c < width; ++c) {
      numbers.sum[channel + c] += sums[i * width + c];
      numbers.tilt[channel + c] += tilts[i * width + c];
    }
  }
}

template <bool last, typename S, typename T>
void backward(const Walk& walk, const Affine<T>& affine, const T* mean, const T* rstd, const S* dy, const S* x, S* dx, T* dgain,
              T* doffset) {
  each_unit(walk, [&](int64_t unit) {
    const int64_t image = walk.image(unit), first = walk.first_channel(unit), group_channels = walk.group_channels();
    const int64_t first_group = unit * walk.unit_groups();
    Channels<T> numbers(walk.unit_channels());
    for (int64_t c = 0; c < walk.unit_channels(); ++c) {
      const int64_t group = first_group + c / group_channels;
      const Line<T> line = line_of(affine, image, first + c, mean[group], rstd[group]);
      numbers.slope[c] = line.slope;
      numbers.lift[c] = line.lift;
      numbers.mean[c] = mean[group];
    }
    const int64_t start = unit * walk.unit_size();
    std::unique_ptr<T[]> apart;  // dz lies where dx will be, unless that has fewer digits
    T* dz;
    if constexpr (std::is_same_v<S, T>) {
      dz = dx + start;
    } else {
      apart.reset(new T[walk.unit_size()]);
      dz = apart.get();
    }
    descend_unit<last>(walk, unit, dy, x, dz, numbers);
    for (int64_t g = 0; g < walk.unit_groups(); ++g) {
      const int64_t begin = g * group_channels, end = begin + group_channels;
      const double inverse = rstd[first_group + g];
      double pull = 0, tilt = 0;
      for (int64_t c = begin; c < end; ++c) {
        const double gain = affine.gain(image, first + c);
        dgain[image * walk.channels + first + c] = static_cast<T>(numbers.tilt[c] * inverse);
        doffset[image * walk.channels + first + c] = static_cast<T>(numbers.sum[c]);
        pull += gain * numbers.sum[c];
        tilt += gain * numbers.tilt[c] * inverse;
      }
      const auto gradient = gradient_of<T>(inverse, pull / walk.group_size(), tilt / walk.group_size());
      std::fill(&numbers.bend[begin], &numbers.bend[begin] + group_channels, gradient.bend);
      std::fill(&numbers.level[begin], &numbers.level[begin] + group_channels, gradient.level);
    }
    each_tile(walk, unit, [&](Tile tile, int64_t) {
      const int64_t c = tile.channel;
      finish_tile<last>(dx + tile.offset, dz + (tile.offset - start), x + tile.offset, flat<last>(tile), &numbers.slope[c],
                        &numbers.mean[c], &numbers.bend[c], &numbers.level[c]);
    });
  });
}

}  // namespace
}  // namespace knife
