// How a step walks through its tensors. No torch in this file.
//
// out, x and grad lie alike in memory, image after image without a gap, so one running number finds a pixel in all three.
// eps may be a channel slice of a wider tensor. Seen in the order of x it is rows of neighbouring pixels, a fixed stride apart:
// one row an image if contiguous, one row of C channels a pixel if channels_last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace knife {

struct Layout {
  int64_t images, rows, columns;            // pixels of an image = rows x columns
  int64_t eps_image_stride, eps_row_stride;  // in elements

  int64_t image_pixels() const { return rows * columns; }
  int64_t pixels() const { return images * rows * columns; }
};

// Plans the walk over x and eps of the same sizes [N, ...], where x is dense with its images outermost.
// Returns nothing if eps is no such rows.
inline std::optional<Layout> plan(int64_t dims, const int64_t* sizes, const int64_t* x_strides, const int64_t* eps_strides) {
  std::vector<int64_t> order;  // the dimensions of one image, innermost first
  for (int64_t d = 1; d < dims; ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x_strides[a] < x_strides[b]; });

  Layout layout{sizes[0], 1, 1, eps_strides[0], 0};
  auto d = order.begin();
  for (; d != order.end() && eps_strides[*d] == layout.columns; ++d) layout.columns *= sizes[*d];
  if (d != order.end()) layout.eps_row_stride = eps_strides[*d];
  for (; d != order.end() && eps_strides[*d] == layout.rows * layout.eps_row_stride; ++d) layout.rows *= sizes[*d];
  return d == order.end() ? std::optional(layout) : std::nullopt;
}

}  // namespace knife
