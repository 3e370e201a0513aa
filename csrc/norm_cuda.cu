// knife::group_norm_silu and its derivative on CUDA: one block for each group of each image, which reads the group twice; the
// second time it mostly lies in the second-level cache. Sums are joined in a fixed order, so the result is the same every time.
// Nothing waits for the host, so a norm can be captured in a CUDA graph.
#include <tuple>

#include "cuda_tools.h"
#include "norm_arguments.h"

namespace knife {
namespace {

constexpr int kThreads = 512;

// How the threads of a block share a group: it is seen as columns and rows of packs of `width` values. If the channels lie last, a
// column is `width` channels and a row is a pixel; else a column is a channel and a row is `width` of its pixels. A thread keeps to
// its column while it takes every so many-th row, then goes on to another column.
struct Share {
  int64_t base, column_step, columns, row_step, rows;  // where the group begins, and how it continues
  int columns_at_once, rows_at_once, column, row;      // which part of it this thread takes
  int slot_step;                                       // from a thread to the one in the next row

  template <int width>
  static __device__ Share of(const Walk& walk, int64_t image, int64_t group) {
    const int64_t channels = walk.group_channels(), pixels = walk.pixels;
    const int thread = static_cast<int>(threadIdx.x);
    Share share;
    if (walk.last) {
      share = {image * pixels * walk.channels + group * channels, width, channels / width, walk.channels, pixels};
      share.columns_at_once = static_cast<int>(share.columns < kThreads ? share.columns : kThreads);
      share.rows_at_once = kThreads / share.columns_at_once;
      share.column = thread % share.columns_at_once;
      share.row = thread / share.columns_at_once;
      share.slot_step = share.columns_at_once;
    } else {
      share = {(image * walk.channels + group * channels) * pixels, pixels, channels, width, pixels / width};
      share.rows_at_once = static_cast<int>(share.rows < kThreads ? share.rows : kThreads);
      share.columns_at_once = kThreads / share.rows_at_once;
      share.column = thread / share.rows_at_once;
      share.row = thread % share.rows_at_once;
      share.slot_step = 1;
    }
    return share;
  }

  // Whether this thread has work when the block is at columns from `first` on; the last threads may be one too many.
  __device__ bool works(int64_t first) const {
    return column < columns_at_once && row < rows_at_once && first + column < columns;
  }

  // Calls f with the place of each pack of a column.
  template <typename F>
  __device__ void each_row(int64_t at_column, const F& f) const {
    for (int64_t r = row; r < rows; r += rows_at_once) f(base + at_column * column_step + r * row_step);
  }
};

// The sum of one number of every thread, for all of them.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  __syncthreads();  // whoever reads an earlier sum is done
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

template <int width, typename S, typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(S* y, const S* x, T* mean, T* rstd, const Walk walk, const Affine<T> affine, double eps) {
  const int64_t image = blockIdx.x / walk.groups, group = blockIdx.x % walk.groups, first_channel = group * walk.group_channels();
  const Share share = Share::of<width>(walk, image, group);
  const T pivot = static_cast<T>(x[share.base]);
  double own_sum = 0, own_squares = 0;  // around the first value of the group
  for (int64_t first = 0; first < share.columns; first += share.columns_at_once) {
    if (!share.works(first)) continue;
    T sum = 0, squares = 0, start = 0;  // around the first value of this column that the thread meets
    int count = 0;
    share.each_row(first + share.column, [&](int64_t at) {
      const auto pack = load<S, width>(x + at);
      if (count == 0) start = static_cast<T>(pack.value[0]);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const T apart = static_cast<T>(pack.value[k]) - start;
        sum += apart;
        squares += apart * apart;
      }
      count += width;
    });
    const double shift = static_cast<double>(start) - static_cast<double>(pivot);
    own_sum += sum + count * shift;
    own_squares += squares + 2 * shift * sum + count * shift * shift;
  }
  const double size = static_cast<double>(walk.group_size());
  const double average = block_sum(own_sum) / size, variance = block_sum(own_squares) / size - average * average;
  const double center = pivot + average, inverse = 1 / sqrt((variance > 0 ? variance : 0) + eps);
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = static_cast<T>(center);
    rstd[blockIdx.x] = static_cast<T>(inverse);
  }
  for (int64_t first = 0; first < share.columns; first += share.columns_at_once) {
    if (!share.works(first)) continue;
    Line<T> lines[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const int64_t channel = walk.last ? (first + share.column) * width + k : first + share.column;
      lines[k] = line_of(affine, image, first_channel + channel, center, inverse);
    }
    share.each_row(first + share.column, [&](int64_t at) {
      auto pack = load<S, width>(x + at);
#pragma unroll
      for (int k = 0; k < width; ++k)
        pack.value[k] = static_cast<S>(activate(lines[k].slope, lines[k].lift, static_cast<T>(pack.value[k])));
      *reinterpret_cast<Pack<S, width>*>(y + at) = pack;
    });
  }
}

// Adds up the numbers of the threads that share a column; the thread in its first row gets the sum.
template <typename T>
__device__ T column_sum(const Share& share, T value) {
  __shared__ T sums[kThreads];
  __syncthreads();  // whoever reads an earlier sum is done
  sums[threadIdx.x] = value;
  for (int left = share.rows_at_once, half; left > 1; left = half) {
    half = (left + 1) / 2;
    __syncthreads();
    if (share.column < share.columns_at_once && share.row < left - half)
      sums[threadIdx.x] += sums[threadIdx.x + half * share.slot_step];
  }
  return sums[threadIdx.x];
}

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(S* dx, T* dgain, T* doffset, const S* dy, const S* x, const T* means, const T* rstds, const Walk walk,
                    const Affine<T> affine) {
  const int64_t image = blockIdx.x / walk.groups, group = blockIdx.x % walk.groups, first_channel = group * walk.group_channels();
  const Share share = Share::of<1>(walk, image, group);
  const T mean = means[blockIdx.x], rstd = rstds[blockIdx.x];
  double own_pull = 0, own_tilt = 0;
  for (int64_t first = 0; first < share.columns; first += share.columns_at_once) {
    const int64_t channel = first_channel + first + share.column;
    T sum = 0, tilt = 0;
    if (share.works(first)) {
      const Line<T> line = line_of(affine, image, channel, mean, rstd);
      share.each_row(first + share.column, [&](int64_t at) {
        const T value = static_cast<T>(x[at]), dz = descend(line.slope, line.lift, value, static_cast<T>(dy[at]));
        sum += dz;
        tilt += dz * (value - mean);
      });
    }
    sum = column_sum(share, sum);
    tilt = column_sum(share, tilt) * rstd;
    if (share.works(first) && share.row == 0) {
      dgain[image * walk.channels + channel] = tilt;
      doffset[image * walk.channels + channel] = sum;
      own_pull += static_cast<double>(affine.gain(image, channel)) * sum;
      own_tilt += static_cast<double>(affine.gain(image, channel)) * tilt;
    }
  }
  const double size = static_cast<double>(walk.group_size());
  const double pull = block_sum(own_pull) / size, tilt = block_sum(own_tilt) / size;
  const Gradient<T> gradient = gradient_of<T>(rstd, pull, tilt);
  for (int64_t first = 0; first < share.columns; first += share.columns_at_once) {
    if (!share.works(first)) continue;
    const Line<T> line = line_of(affine, image, first_channel + first + share.column, mean, rstd);
    share.each_row(first + share.column, [&](int64_t at) {
      const T value = static_cast<T>(x[at]), dz = descend(line.slope, line.lift, value, static_cast<T>(dy[at]));
      dx[at] = static_cast<S>(multiply_add(gradient.bend, value - mean, multiply_add(line.slope, dz, gradient.level)));
    });
  }
}

// Calls f with the widest pack that fits every row, as a compile-time number.
template <typename S, typename F>
void with_width(const Walk& walk, bool aligned, const F& f) {
  constexpr int widest = 16 / sizeof(S);
  const int64_t run = walk.last ? walk.group_channels() : walk.pixels;  // neighbours of one kind; channels are whole runs
  if (aligned && run % widest == 0) return f(std::integral_constant<int, widest>{});
  if (aligned && run % 4 == 0 && widest > 4) return f(std::integral_constant<int, (widest > 4 ? 4 : 1)>{});
  f(std::integral_constant<int, 1>{});
}

// One block for each group of each image.
unsigned blocks(const Walk& walk) {
  const int64_t count = walk.images * walk.groups;
  expect(count < int64_t{1} << 31, "there are ", count, " groups: give fewer images at once.");
  return static_cast<unsigned>(count);
}

std::tuple<Tensor, Tensor> group_norm_silu(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps, MaybeTensor scale,
                                           MaybeTensor shift) {
  named("group_norm_silu", [&] { check_norm(x, weight, bias, groups, scale, shift); });
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor in = laid_out(x), y = torch::stable::empty_like(in), moments = numbers_like(x, {2, x.size(0), groups});
  const Walk walk = walk_over(in, groups);
  if (x.numel() == 0) return {finish_like(x, y), moments};
  with_types(x, [&](auto stored, auto computed) {
    using S = decltype(stored);
    using T = decltype(computed);
    with_width<S>(walk, aligned(in) && aligned(y), [&](auto width) {
      T* const mean = output<T>(moments);
      forward_kernel<decltype(width)::value, S, T><<<blocks(walk), kThreads, 0, current_stream(x.get_device_index())>>>(
          output<S>(y), input<S>(in), mean, mean + x.size(0) * groups, walk, affine_of<T>(weight, bias, scale, shift), eps);
    });
  });
  expect_success(cudaGetLastError());
  return {finish_like(x, y), moments};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor grad, Tensor x, Tensor moments, Tensor weight, Tensor bias,
                                                            int64_t groups, MaybeTensor scale, MaybeTensor shift) {
  named("group_norm_silu_backward", [&] { check_norm_backward(grad, x, moments, weight, bias, groups, scale, shift); });
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor in = laid_out(x), dy = lay_like(grad, in), dx = torch::stable::empty_like(in);
  const Tensor dgain = numbers_like(x, {x.size(0), x.size(1)}), doffset = numbers_like(x, {x.size(0), x.size(1)});
  const Tensor known = torch::stable::contiguous(moments);
  const Walk walk = walk_over(in, groups);
  if (x.numel() == 0) return {finish_like(x, dx), dgain, doffset};
  with_types(x, [&](auto stored, auto computed) {
    using S = decltype(stored);
    using T = decltype(computed);
    const T* const mean = input<T>(known);
    backward_kernel<S, T><<<blocks(walk), kThreads, 0, current_stream(x.get_device_index())>>>(
        output<S>(dx), output<T>(dgain), output<T>(doffset), input<S>(dy), input<S>(in), mean, mean + x.size(0) * groups, walk,
        affine_of<T>(weight, bias, scale, shift));
  });
  expect_success(cudaGetLastError());
  return {finish_like(x, dx), dgain, doffset};
}

}  // namespace
}  // namespace knife

STABLE_TORCH_LIBRARY_IMPL(knife, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&knife::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&knife::group_norm_silu_backward));
}
