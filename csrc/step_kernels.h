// The CUDA kernel of the step, and its grid: one pass over x, eps and grad, up to 16 bytes of each per thread and turn.
// No torch in this file (cuda_kernel.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda_kernel.h"
#include "step.h"
#include "step_layout.h"

#ifndef KNIFE_STEP_THREADS
#define KNIFE_STEP_THREADS 256
#endif

namespace knife {
namespace {

constexpr int kStepThreads = KNIFE_STEP_THREADS;  // of a block
constexpr int kBlocksPerProcessor = 8;  // 2048 threads, all that a multiprocessor holds; more images or pixels take turns
constexpr int kMaxGridY = 65535;

// Block y takes images y, y + gridDim.y, ...; within one image the threads of all blocks x take packs in turn.
template <bool guided, bool clamped, int width, typename S, typename T>
__global__ void __launch_bounds__(kStepThreads)
    step_kernel(S* out, const S* x, const S* eps, const S* grad, const Layout layout, const Settings settings) {
  __shared__ Step<T> step;
  const int64_t columns = layout.columns / width, packs = layout.rows * columns;
  for (int64_t image = blockIdx.y; image < layout.images; image += gridDim.y) {
    __syncthreads();  // the coefficients of the last image are no longer needed
    if (threadIdx.x == 0) step = make_step<T>(settings, image);
    __syncthreads();
    for (int64_t i = blockIdx.x * int64_t{kStepThreads} + threadIdx.x; i < packs; i += gridDim.x * int64_t{kStepThreads}) {
      const int64_t row = layout.rows == 1 ? 0 : i / columns, column = i - row * columns;
      const int64_t at = (image * packs + i) * width;
      const int64_t eps_at = image * layout.eps_image_stride + row * layout.eps_row_stride + column * width;
      const auto xs = load<width>(x + at), es = load<width>(eps + eps_at);
      const auto gs = guided ? load<width>(grad + at) : Pack<S, width>{};
      Pack<S, width> result;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const T next = take<guided, clamped, T>(step, static_cast<T>(xs.value[k]), static_cast<T>(es.value[k]),
                                                static_cast<T>(gs.value[k]));
        result.value[k] = static_cast<S>(next);
      }
      store(out + at, result);
    }
  }
}

// How many blocks take packs of one image, and how many take images.
struct StepGrid {
  int64_t x, y;
};

inline StepGrid step_grid(const Layout& layout, int width, int processors) {
  const int64_t blocks = (layout.image_pixels() / width + kStepThreads - 1) / kStepThreads;
  const int64_t y = std::min<int64_t>(layout.images, kMaxGridY);
  return {std::min(blocks, std::max<int64_t>(1, int64_t{processors} * kBlocksPerProcessor / y)), y};
}

// Whether every row starts at a multiple of a pack and is some packs long. That the tensors do is asked elsewhere.
inline bool rows_fit(const Layout& layout, int64_t width) {
  return layout.columns % width == 0 && layout.eps_row_stride % width == 0 && layout.eps_image_stride % width == 0;
}

}  // namespace
}  // namespace knife
