// The CUDA kernels of the norm, and which of them follow each other. No torch in this file (cuda_kernel.h).
//
// Forwards and backwards alike there are two launches over the same slabs (norm_slabs.h). In the first each block adds up its
// slab and leaves the sums; in the second each block joins the sums of its unit and writes its slab. Where a slab is a whole unit,
// the second launch does both. Threads next to each other read and write packs next to each other. Sums are joined in a fixed
// order and in double, so the result is the same every time.
#pragma once

#include <cstdint>

#include "cuda_kernel.h"
#include "norm.h"
#include "norm_slabs.h"

namespace knife {
namespace {

constexpr int kHalf = (kNormThreads + 1) / 2;

// Two numbers that lie side by side.
template <typename T>
using Two = Pack<T, 2>;

// What this thread takes of the slab of its block. Blocks next to each other read lines next to each other.
template <int width>
struct Share {
  const Slabs& slabs;
  int slab, part;
  int64_t image, unit, base;  // where the unit begins
  int64_t first_channel, column_step, row_step;
  int64_t first_column, end_column, first_row, end_row;
  int column, row;

  __device__ explicit Share(const Slabs& of, unsigned block) : slabs(of) {
    const unsigned parts = static_cast<unsigned>(of.parts), count = static_cast<unsigned>(of.count());
    part = static_cast<int>(block % parts);
    slab = static_cast<int>(block / parts % count);
    image = block / parts / count;
    unit = image * of.parts + part;
    first_channel = part * of.unit_channels;
    base = image * of.walk.channels * of.walk.pixels + first_channel * (of.walk.last ? 1 : of.walk.pixels);
    column_step = of.walk.last ? width : of.walk.pixels;
    row_step = of.walk.last ? of.walk.channels : width;
    first_column = slab / of.row_pieces * of.column_run;
    end_column = min_of(first_column + of.column_run, of.columns);
    first_row = slab % of.row_pieces * of.row_run;
    end_row = min_of(first_row + of.row_run, of.rows);
    const int thread = static_cast<int>(threadIdx.x);
    column = of.walk.last ? thread % of.columns_at_once : thread / of.rows_at_once;
    row = of.walk.last ? thread / of.columns_at_once : thread % of.rows_at_once;
  }

  static __device__ int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

  // Whether this thread has work in the chunk of columns from `chunk` on; the last threads may be one too many.
  __device__ bool works(int64_t chunk) const {
    return column < slabs.columns_at_once && row < slabs.rows_at_once && chunk + column < end_column;
  }
  __device__ int64_t first_at(int64_t chunk) const {
    return base + (chunk + column) * column_step + (first_row + row) * row_step;
  }
  // Packs that a working thread takes of its column.
  __device__ int packs() const {
    const int left = static_cast<int>(end_row - first_row) - row;
    return left > 0 ? (left + slabs.rows_at_once - 1) / slabs.rows_at_once : 0;
  }
  // Calls f(chunk) with the first column of each chunk.
  template <typename F>
  __device__ void each_chunk(const F& f) const {
    for (int64_t chunk = first_column; chunk < end_column; chunk += slabs.columns_at_once) f(chunk);
  }
  // Calls use(place, read(place)) for each pack of this thread's column; `batch` are read before the first is used.
  template <int batch, typename Read, typename Use>
  __device__ void each_pack(int64_t chunk, const Read& read, const Use& use) const {
    const int64_t step = slabs.rows_at_once * row_step;
    int64_t at = first_at(chunk);
    for (int left = packs(); left > 0; left -= batch, at += batch * step) {
      decltype(read(at)) values[batch] = {};
#pragma unroll
      for (int b = 0; b < batch; ++b)
        if (b < left) values[b] = read(at + b * step);
#pragma unroll
      for (int b = 0; b < batch; ++b)
        if (b < left) use(at + b * step, values[b]);
    }
  }

  // Of a chunk: its channels, counted from its first one, in the unit; and the channel of one value of this thread's packs.
  __device__ int64_t chunk_channel(int64_t chunk) const { return chunk * slabs.lane_channels(); }
  __device__ int chunk_channels(int64_t chunk) const {
    return static_cast<int>(min_of(slabs.columns_at_once, end_column - chunk)) * slabs.lane_channels();
  }
  __device__ int lane_channel(int k) const { return slabs.walk.last ? column * width + k : column; }

  // The group of a channel, both counted in the unit.
  __device__ int group_of(int64_t channel) const {
    return slabs.unit_groups == 1 ? 0 : static_cast<int>(channel) / static_cast<int>(slabs.walk.group_channels());
  }
  __device__ int64_t group_index(int group) const { return unit * slabs.unit_groups + group; }  // in all images
  __device__ int64_t channel_index(int64_t channel) const { return image * slabs.walk.channels + first_channel + channel; }
  // The first value of a group: what its sums are taken around.
  __device__ int64_t pivot_at(int group) const { return base + (slabs.walk.last ? group * slabs.walk.group_channels() : 0); }

  // Threads share the groups of a unit as well: each has a strand of one group.
  __device__ int strands() const { return kNormThreads / slabs.unit_groups; }
  __device__ int group() const { return static_cast<int>(threadIdx.x) % slabs.unit_groups; }
  __device__ int strand() const { return static_cast<int>(threadIdx.x) / slabs.unit_groups; }
  __device__ bool leads() const { return strand() == 0; }  // the thread that gets the sum of its group
};

// Adds up numbers of threads that form a matrix: those in the first row get the sums over their columns.
template <int count>
__device__ void add_rows(double (&values)[count], double* buffer, int row, int rows, int column, int columns) {
  for (int left = rows, half; left > 1; left = half) {
    half = (left + 1) / 2;
    if (column < columns && row >= half && row < left) {
#pragma unroll
      for (int k = 0; k < count; ++k) buffer[k * kHalf + (row - half) * columns + column] = values[k];
    }
    __syncthreads();
    if (column < columns && row < left - half) {
#pragma unroll
      for (int k = 0; k < count; ++k) values[k] += buffer[k * kHalf + row * columns + column];
    }
    __syncthreads();  // who is read from may write again
  }
}

// The same over the strands of each group.
template <int width>
__device__ void add_strands(const Share<width>& share, double (&own)[2], double* buffer) {
  add_rows(own, buffer, share.strand(), share.strands(), share.group(), share.slabs.unit_groups);
}

// Adds two numbers of each value of a pack up to `own` of the strands: over the rows of a chunk, then the channels of a group.
// `keep(channel, first, second)` sees the sums of each channel of the unit, and returns what is added up to those of its group.
// Between two calls there must be a barrier.
template <int width, typename Keep>
__device__ void add_chunk(const Share<width>& share, int64_t chunk, double (&first)[width], double (&second)[width],
                          double* buffer, double (&own)[2], const Keep& keep) {
  __shared__ double sums[2][kChunk];
  const Slabs& slabs = share.slabs;
  const int64_t start = share.chunk_channel(chunk);
  if (slabs.walk.last) {
    add_rows(first, buffer, share.row, slabs.rows_at_once, share.column, slabs.columns_at_once);
    add_rows(second, buffer, share.row, slabs.rows_at_once, share.column, slabs.columns_at_once);
  } else {  // all values of a pack are of one channel
    double both[2] = {};
#pragma unroll
    for (int k = 0; k < width; ++k) both[0] += first[k], both[1] += second[k];
    add_rows(both, buffer, share.row, slabs.rows_at_once, share.column, slabs.columns_at_once);
    first[0] = both[0], second[0] = both[1];
  }
  if (share.works(chunk) && share.row == 0) {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (k >= slabs.lane_channels()) break;
      const Two<double> kept = keep(start + share.lane_channel(k), first[k], second[k]);
      sums[0][share.lane_channel(k)] = kept.value[0];
      sums[1][share.lane_channel(k)] = kept.value[1];
    }
  }
  __syncthreads();
  const int channels = slabs.unit_groups == 1 ? share.chunk_channels(chunk) : static_cast<int>(slabs.walk.group_channels());
  if (share.strand() < share.strands())
    for (int c = share.strand(); c < channels; c += share.strands()) {
      own[0] += sums[0][share.group() * channels + c];
      own[1] += sums[1][share.group() * channels + c];
    }
}

// Joins what the slabs of a unit have left: `add(slab, its numbers)` is called for each, by the strands of its group.
template <int width, typename T, typename Add>
__device__ void each_slab(const Share<width>& share, const Two<T>* left, const Add& add) {
  const int count = share.slabs.count();
  if (share.strand() < share.strands())
    for (int slab = share.strand(); slab < count; slab += share.strands())
      add(slab, left[(share.unit * count + slab) * share.slabs.unit_groups + share.group()]);
}

// --- Forwards ----------------------------------------------------------------------------------------------------------------

// The sum of a slab's values and that of their squares, around the first value of the group; the leader of each group gets them.
template <int width, typename S, typename T>
__device__ void add_values(const Share<width>& share, const S* __restrict__ x, double* buffer, double (&own)[2]) {
  share.each_chunk([&](int64_t chunk) {
    double sums[width] = {}, squares[width] = {};
    if (share.works(chunk) && share.packs() > 0) {
      const auto start = load<width>(x + share.first_at(chunk));  // float32 sums are taken around these
      T sum[width] = {}, square[width] = {};
      share.template each_pack<4>(
          chunk, [&](int64_t at) { return load<width>(x + at); },
          [&](int64_t, const Pack<S, width>& pack) {
#pragma unroll
            for (int k = 0; k < width; ++k) {
              const T apart = static_cast<T>(pack.value[k]) - static_cast<T>(start.value[k]);
              sum[k] += apart;
              square[k] = multiply_add(apart, apart, square[k]);
            }
          });
      const double count = static_cast<double>(share.packs());
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const int group = share.group_of(share.chunk_channel(chunk) + share.lane_channel(k));
        const double pivot = static_cast<T>(x[share.pivot_at(group)]), shift = static_cast<T>(start.value[k]) - pivot;
        sums[k] = sum[k] + count * shift;
        squares[k] = square[k] + 2 * shift * sum[k] + count * shift * shift;
      }
    }
    if (share.slabs.unit_groups == 1) {  // the threads need no order
#pragma unroll
      for (int k = 0; k < width; ++k) own[0] += sums[k], own[1] += squares[k];
    } else {
      add_chunk(share, chunk, sums, squares, buffer, own,
                [](int64_t, double sum, double square) { return Two<double>{{sum, square}}; });
    }
  });
  add_strands(share, own, buffer);
}

// Leaves, for each group of each slab, how far its mean lies from the first value of the group, and the squared deviations.
template <int width, typename S, typename T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    moments_kernel(Two<T>* left, const S* __restrict__ x, const Slabs slabs) {
  __shared__ double buffer[width * kHalf > 2 * kHalf ? width * kHalf : 2 * kHalf];
  const Share<width> share(slabs, blockIdx.x);
  double own[2] = {};
  add_values<width, S, T>(share, x, buffer, own);
  if (!share.leads()) return;
  const double apart = own[0] / static_cast<double>(slabs.values(share.slab)), squares = own[1] - own[0] * apart;
  left[(share.unit * slabs.count() + share.slab) * slabs.unit_groups + share.group()] =
      {{static_cast<T>(apart), static_cast<T>(squares > 0 ? squares : 0)}};
}

// Writes y, and the moments of each group. Blocks go from the last slab to the first: what was read last may still be cached.
template <int width, typename S, typename T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    activate_kernel(S* __restrict__ y, T* mean, T* rstd, const Two<T>* left, const S* __restrict__ x, const Slabs slabs,
                    const Affine<T> affine, double eps) {
  __shared__ double buffer[width * kHalf > 2 * kHalf ? width * kHalf : 2 * kHalf];
  __shared__ double means[kChunk], inverses[kChunk];
  __shared__ Line<T> lines[kChunk];
  const Share<width> share(slabs, gridDim.x - 1 - blockIdx.x);
  double own[2] = {};
  if (slabs.whole()) {
    add_values<width, S, T>(share, x, buffer, own);
  } else {
    each_slab(share, left, [&](int slab, const Two<T>& numbers) {
      const double count = static_cast<double>(slabs.values(slab)), apart = numbers.value[0];
      own[0] += count * apart;
      own[1] += numbers.value[1] + count * apart * apart;
    });
    add_strands(share, own, buffer);
  }
  if (share.leads()) {
    const int group = share.group();
    const double size = static_cast<double>(slabs.walk.group_size()), apart = own[0] / size;
    const double variance = own[1] / size - apart * apart;
    means[group] = static_cast<T>(x[share.pivot_at(group)]) + apart;
    inverses[group] = 1 / sqrt((variance < 0 ? 0 : variance) + eps);  // a NaN stays one
    if (share.slab == 0) {
      mean[share.group_index(group)] = static_cast<T>(means[group]);
      rstd[share.group_index(group)] = static_cast<T>(inverses[group]);
    }
  }
  share.each_chunk([&](int64_t chunk) {
    const int64_t start = share.chunk_channel(chunk);
    __syncthreads();  // the means are there, and the lines of the last chunk no longer needed
    for (int c = static_cast<int>(threadIdx.x); c < share.chunk_channels(chunk); c += kNormThreads) {
      const int group = share.group_of(start + c);
      lines[c] = line_of(affine, share.image, share.first_channel + start + c, means[group], inverses[group]);
    }
    __syncthreads();
    if (!share.works(chunk)) return;
    Line<T> own_lines[width];
#pragma unroll
    for (int k = 0; k < width; ++k) own_lines[k] = lines[share.lane_channel(k)];
    share.template each_pack<4>(
        chunk, [&](int64_t at) { return load<width>(x + at); },
        [&](int64_t at, Pack<S, width>& pack) {
#pragma unroll
          for (int k = 0; k < width; ++k)
            pack.value[k] = static_cast<S>(activate(own_lines[k].slope, own_lines[k].lift, static_cast<T>(pack.value[k])));
          store(y + at, pack);
        });
  });
}

// Calls launch(blocks, kernel, its arguments) for what makes y and the moments. `left` has room for slabs.group_numbers().
template <int width, typename S, typename T, typename Launch>
void launch_forward(const Launch& launch, const Slabs& slabs, const Affine<T>& affine, double eps, const S* x, S* y, T* mean,
                    T* rstd, T* left) {
  Two<T>* const sums = reinterpret_cast<Two<T>*>(left);
  if (!slabs.whole()) launch(slabs.blocks(), moments_kernel<width, S, T>, sums, x, slabs);
  launch(slabs.blocks(), activate_kernel<width, S, T>, y, mean, rstd, sums, x, slabs, affine, eps);
}

// --- Backwards ---------------------------------------------------------------------------------------------------------------

// The features and their gradient at one place.
template <typename S, int width>
struct Pair {
  Pack<S, width> x, dy;
};

// The numbers of the groups of a unit, and of the channels of a chunk.
template <typename T>
struct Known {
  T means[kChunk], inverses[kChunk];
  Line<T> lines[kChunk];
};

template <int width, typename T>
__device__ void know_groups(const Share<width>& share, Known<T>& known, const T* mean, const T* rstd) {
  for (int g = static_cast<int>(threadIdx.x); g < share.slabs.unit_groups; g += kNormThreads) {
    known.means[g] = mean[share.group_index(g)];
    known.inverses[g] = rstd[share.group_index(g)];
  }
}

template <int width, typename T>
__device__ void know_chunk(const Share<width>& share, int64_t chunk, Known<T>& known, const Affine<T>& affine) {
  const int64_t start = share.chunk_channel(chunk);
  __syncthreads();  // the groups are known, and the lines of the last chunk no longer needed
  for (int c = static_cast<int>(threadIdx.x); c < share.chunk_channels(chunk); c += kNormThreads) {
    const int group = share.group_of(start + c);
    known.lines[c] =
        line_of(affine, share.image, share.first_channel + start + c, known.means[group], known.inverses[group]);
  }
  __syncthreads();
}

// The sums of gain dz and of gain dz (x - mean) rstd over a slab; the leader of each group gets them. `keep(channel, sum, tilt)`
// sees the sums of dz and of dz (x - mean) rstd for each channel of the unit.
template <int width, typename S, typename T, typename Keep>
__device__ void add_gradients(const Share<width>& share, Known<T>& known, const S* __restrict__ dy, const S* __restrict__ x,
                              const Affine<T>& affine, double* buffer, double (&own)[2], const Keep& keep) {
  share.each_chunk([&](int64_t chunk) {
    know_chunk(share, chunk, known, affine);
    double sums[width] = {}, tilts[width] = {};
    if (share.works(chunk)) {
      Line<T> lines[width];
      T means[width], sum[width] = {}, tilt[width] = {};
#pragma unroll
      for (int k = 0; k < width; ++k) {
        lines[k] = known.lines[share.lane_channel(k)];
        means[k] = known.means[share.group_of(share.chunk_channel(chunk) + share.lane_channel(k))];
      }
      share.template each_pack<2>(
          chunk, [&](int64_t at) { return Pair<S, width>{load<width>(x + at), load<width>(dy + at)}; },
          [&](int64_t, const Pair<S, width>& pair) {
#pragma unroll
            for (int k = 0; k < width; ++k) {
              const T value = static_cast<T>(pair.x.value[k]);
              const T dz = descend(lines[k].slope, lines[k].lift, value, static_cast<T>(pair.dy.value[k]));
              sum[k] += dz;
              tilt[k] = multiply_add(dz, value - means[k], tilt[k]);
            }
          });
#pragma unroll
      for (int k = 0; k < width; ++k) sums[k] = sum[k], tilts[k] = tilt[k];
    }
    add_chunk(share, chunk, sums, tilts, buffer, own, [&](int64_t channel, double sum, double tilt) {
      tilt *= known.inverses[share.group_of(channel)];
      keep(channel, sum, tilt);
      const double gain = affine.gain(share.image, share.first_channel + channel);
      return Two<double>{{gain * sum, gain * tilt}};
    });
  });
  add_strands(share, own, buffer);
}

// Leaves those sums, for the groups of each slab and for the channels of each piece of its rows.
template <int width, typename S, typename T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    gradients_kernel(Two<T>* left, Two<T>* left_of_channels, const S* __restrict__ dy, const S* __restrict__ x, const T* mean,
                     const T* rstd, const Slabs slabs, const Affine<T> affine) {
  __shared__ double buffer[width * kHalf > 2 * kHalf ? width * kHalf : 2 * kHalf];
  __shared__ Known<T> known;
  const Share<width> share(slabs, blockIdx.x);
  double own[2] = {};
  know_groups(share, known, mean, rstd);
  const int64_t piece = share.unit * slabs.row_pieces + share.slab % slabs.row_pieces;
  Two<T>* const channels = left_of_channels + piece * slabs.unit_channels;
  add_gradients<width, S, T>(share, known, dy, x, affine, buffer, own, [&](int64_t channel, double sum, double tilt) {
    channels[channel] = {{static_cast<T>(sum), static_cast<T>(tilt)}};
  });
  if (share.leads())
    left[(share.unit * slabs.count() + share.slab) * slabs.unit_groups + share.group()] =
        {{static_cast<T>(own[0]), static_cast<T>(own[1])}};
}

// Joins the sums of the channels of a unit, which its slabs share out, and writes them.
template <int width, typename T>
__device__ void join_channels(const Share<width>& share, const Two<T>* left_of_channels, T* dgain, T* doffset, double* buffer) {
  const Slabs& slabs = share.slabs;
  const int64_t run = (slabs.unit_channels + slabs.count() - 1) / slabs.count();
  const int64_t end = Share<width>::min_of((share.slab + 1) * run, slabs.unit_channels);
  const Two<T>* const sums = left_of_channels + share.unit * slabs.row_pieces * slabs.unit_channels;
  for (int64_t first = share.slab * run; first < end; first += kNormThreads) {
    const int channels = static_cast<int>(Share<width>::min_of(kNormThreads, end - first)), strands = kNormThreads / channels;
    const int channel = static_cast<int>(threadIdx.x) % channels, strand = static_cast<int>(threadIdx.x) / channels;
    double own[2] = {};
    if (strand < strands)
      for (int piece = strand; piece < slabs.row_pieces; piece += strands) {
        const Two<T> numbers = sums[piece * slabs.unit_channels + first + channel];
        own[0] += numbers.value[0];
        own[1] += numbers.value[1];
      }
    add_rows(own, buffer, strand, strands, channel, channels);
    if (strand == 0) {
      doffset[share.channel_index(first + channel)] = static_cast<T>(own[0]);
      dgain[share.channel_index(first + channel)] = static_cast<T>(own[1]);
    }
  }
}

// Writes dx, and the gradients of gain and offset; blocks go from the last slab to the first.
template <int width, typename S, typename T>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    descend_kernel(S* __restrict__ dx, T* dgain, T* doffset, const Two<T>* left, const Two<T>* left_of_channels,
                   const S* __restrict__ dy, const S* __restrict__ x, const T* mean, const T* rstd, const Slabs slabs,
                   const Affine<T> affine) {
  __shared__ double buffer[width * kHalf > 2 * kHalf ? width * kHalf : 2 * kHalf];
  __shared__ Known<T> known;
  __shared__ Gradient<T> gradients[kChunk];
  const Share<width> share(slabs, gridDim.x - 1 - blockIdx.x);
  double own[2] = {};
  know_groups(share, known, mean, rstd);
  if (slabs.whole()) {
    add_gradients<width, S, T>(share, known, dy, x, affine, buffer, own, [&](int64_t channel, double sum, double tilt) {
      doffset[share.channel_index(channel)] = static_cast<T>(sum);
      dgain[share.channel_index(channel)] = static_cast<T>(tilt);
    });
  } else {
    join_channels(share, left_of_channels, dgain, doffset, buffer);
    each_slab(share, left, [&](int, const Two<T>& numbers) {
      own[0] += numbers.value[0];
      own[1] += numbers.value[1];
    });
    add_strands(share, own, buffer);
  }
  if (share.leads()) {
    const double size = static_cast<double>(slabs.walk.group_size()), inverse = rstd[share.group_index(share.group())];
    const Gradient<T> gradient = gradient_of<T>(inverse, own[0] / size, own[1] / size);
    gradients[share.group()] = gradient.around_zero(mean[share.group_index(share.group())]);
  }
  share.each_chunk([&](int64_t chunk) {
    know_chunk(share, chunk, known, affine);
    if (!share.works(chunk)) return;
    Line<T> lines[width];
    Gradient<T> own_gradients[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      lines[k] = known.lines[share.lane_channel(k)];
      own_gradients[k] = gradients[share.group_of(share.chunk_channel(chunk) + share.lane_channel(k))];
    }
    share.template each_pack<2>(
        chunk, [&](int64_t at) { return Pair<S, width>{load<width>(x + at), load<width>(dy + at)}; },
        [&](int64_t at, Pair<S, width>& pair) {
#pragma unroll
          for (int k = 0; k < width; ++k) {
            const T value = static_cast<T>(pair.x.value[k]);
            const T dz = descend(lines[k].slope, lines[k].lift, value, static_cast<T>(pair.dy.value[k]));
            const T rest = multiply_add(lines[k].slope, dz, own_gradients[k].level);
            pair.x.value[k] = static_cast<S>(multiply_add(own_gradients[k].bend, value, rest));
          }
          store(dx + at, pair.x);
        });
  });
}

// Calls launch(blocks, kernel, its arguments) for what makes the gradients. `left` has room for slabs.group_numbers() and then
// for slabs.channel_numbers().
template <int width, typename S, typename T, typename Launch>
void launch_backward(const Launch& launch, const Slabs& slabs, const Affine<T>& affine, const T* mean, const T* rstd, const S* dy,
                     const S* x, S* dx, T* dgain, T* doffset, T* left) {
  Two<T>* const sums = reinterpret_cast<Two<T>*>(left);
  Two<T>* const channels = sums + slabs.group_numbers() / 2;
  if (!slabs.whole()) launch(slabs.blocks(), gradients_kernel<width, S, T>, sums, channels, dy, x, mean, rstd, slabs, affine);
  launch(slabs.blocks(), descend_kernel<width, S, T>, dx, dgain, doffset, sums, channels, dy, x, mean, rstd, slabs, affine);
}

}  // namespace
}  // namespace knife
