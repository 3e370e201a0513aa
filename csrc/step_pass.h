// The step on the CPU: one pass over the pixels of all images. No torch in this file.
#pragma once

#include <algorithm>
#include <cstdint>

#include "step.h"
#include "step_layout.h"

namespace knife {
namespace {

// Computes neighbouring pixels; the compiler vectorises this loop.
template <bool guided, bool clamped, typename S, typename T>
inline void step_row(const Step<T>& step, S* __restrict out, const S* x, const S* eps, const S* grad, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i)
    out[i] = static_cast<S>(take<guided, clamped, T>(step, x[i], eps[i], guided ? static_cast<T>(grad[i]) : T{}));
}

// Computes the pixels [begin, end), counted through all images. S is stored, T is computed in; unguided, grad is not read.
template <bool guided, bool clamped, typename S, typename T>
void step_pixels(const Settings& settings, const Layout& layout, S* out, const S* x, const S* eps, const S* grad, int64_t begin,
                 int64_t end) {
  while (begin < end) {
    const int64_t image = begin / layout.image_pixels(), first = image * layout.image_pixels();
    const int64_t stop = std::min(end, first + layout.image_pixels());
    const Step<T> step = make_step<T>(settings, image);
    int64_t row = (begin - first) / layout.columns, column = (begin - first) % layout.columns;
    for (; begin < stop; ++row, column = 0) {
      const int64_t pixels = std::min(layout.columns - column, stop - begin);
      const int64_t eps_at = image * layout.eps_image_stride + row * layout.eps_row_stride + column;
      step_row<guided, clamped, S, T>(step, out + begin, x + begin, eps + eps_at, grad + begin, pixels);
      begin += pixels;
    }
  }
}

}  // namespace
}  // namespace knife
