// What the kernels of a norm do before they compute: check the arguments, lay x out in one of two ways, make the outputs.
#pragma once

#include <initializer_list>
#include <optional>

#include "norm.h"
#include "norm_walk.h"
#include "tensors.h"

namespace knife {

using MaybeTensor = std::optional<Tensor>;

// Whether a tensor is dense with its channels first, [N, C, ...] in that order, or last, [N, ..., C].
inline bool lies(const Tensor& x, bool last) {
  int64_t expected = last ? x.size(1) : 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (last && d == 1) {
      if (x.size(1) != 1 && x.stride(1) != 1) return false;
      continue;
    }
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// What parameters are given in: the type that x is computed in.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void expect_numbers(const Tensor& numbers, const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
                           const char* wanted) {
  expect(std::equal(numbers.sizes().begin(), numbers.sizes().end(), shape.begin(), shape.end()), name, " is ", Shape{numbers},
         ", but x is ", Shape{x}, ": give ", wanted, ".");
  expect(numbers.scalar_type() == compute_type(x), name, " is ", Dtype{numbers.scalar_type()}, ", but x is ",
         Dtype{x.scalar_type()}, ": give ", Dtype{compute_type(x)}, ".");
  expect_device(numbers, name, x);
}

inline void check_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, const MaybeTensor& scale,
                       const MaybeTensor& shift) {
  expect_dtype(x);
  expect(x.dim() >= 2, "x is ", Shape{x}, ": give features [N, C, ...].");
  expect(groups >= 1 && x.size(1) % groups == 0, "x is ", Shape{x}, " and groups is ", groups,
         ": give groups that divide the channels.");
  expect_numbers(weight, "weight", x, {x.size(1)}, "one number per channel");
  expect_numbers(bias, "bias", x, {x.size(1)}, "one number per channel");
  if (scale) expect_numbers(*scale, "scale", x, {x.size(0), x.size(1)}, "one number per image and channel");
  if (shift) expect_numbers(*shift, "shift", x, {x.size(0), x.size(1)}, "one number per image and channel");
}

inline void check_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& moments, const Tensor& weight,
                                const Tensor& bias, int64_t groups, const MaybeTensor& scale, const MaybeTensor& shift) {
  check_norm(x, weight, bias, groups, scale, shift);
  expect_image(grad, "grad", x);
  expect_numbers(moments, "moments", x, {2, x.size(0), groups}, "two numbers per image and group");
}

// The walk over x, whose channels lie first or last.
inline Walk walk_over(const Tensor& x, int64_t groups) {
  const int64_t images = x.size(0), channels = x.size(1);
  const int64_t pixels = images * channels > 0 ? x.numel() / (images * channels) : 0;
  return {images, channels, pixels, groups, lies(x, true) && (pixels == 1 || !lies(x, false))};
}

// Returns x if its channels lie first or last, else a copy where they lie first.
inline Tensor laid_out(const Tensor& x) { return lies(x, true) || lies(x, false) ? x : torch::stable::contiguous(x); }

// Returns what the kernel wrote as x is stored: with its type and, if it is dense, its strides.
inline Tensor finish_like(const Tensor& x, const Tensor& out) {
  Tensor expected = torch::stable::empty_like(x);
  return same_strides(expected, out) && expected.scalar_type() == out.scalar_type() ? out : torch::stable::copy_(expected, out);
}

// Makes a tensor of numbers of the type that x is computed in, for a kernel to write; of an empty x they are 0.
inline Tensor numbers_like(const Tensor& x, std::initializer_list<int64_t> shape) {
  Tensor numbers = torch::stable::new_empty(x, shape, compute_type(x));
  return x.numel() == 0 ? torch::stable::zero_(numbers) : numbers;
}

template <typename T>
Table<T> table_of(const MaybeTensor& tensor) {
  if (!tensor) return {nullptr, 0, 0};
  return {input<T>(*tensor), tensor->dim() == 2 ? tensor->stride(0) : 0, tensor->stride(tensor->dim() - 1)};
}

template <typename T>
Affine<T> affine_of(const Tensor& weight, const Tensor& bias, const MaybeTensor& scale, const MaybeTensor& shift) {
  return {table_of<T>(weight), table_of<T>(bias), table_of<T>(scale), table_of<T>(shift)};
}

}  // namespace knife
