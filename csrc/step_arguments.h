// What both kernels of a step do before they compute: check the arguments, make the output, plan the walk.
#pragma once

#include <cmath>
#include <optional>

#include "step.h"
#include "step_layout.h"
#include "tensors.h"

namespace knife {

inline PerImage per_image(const Tensor& numbers, const char* name, const Tensor& x) {
  expect(numbers.dim() == 1 && numbers.size(0) == x.size(0), name, " is ", Shape{numbers}, ", but x is ", Shape{x},
         ": give one number per image.");
  expect(numbers.scalar_type() == ScalarType::Double, name, " is ", Dtype{numbers.scalar_type()}, ": give float64.");
  expect_device(numbers, name, x);
  return {static_cast<const double*>(numbers.const_data_ptr()), numbers.stride(0)};
}

// The arguments of one call after the checks, its output, and the walk over them.
struct Call {
  Tensor result, out, x, eps;  // out is written; it is the result unless the images of x lie interleaved
  std::optional<Tensor> grad;
  Settings settings;
  Layout layout;

  Tensor finish() { return same_strides(result, out) ? out : torch::stable::copy_(result, out); }

  bool clamped() const { return std::isfinite(settings.low) || std::isfinite(settings.high); }
};

inline Settings check(const Tensor& x, const Tensor& eps, const std::optional<Tensor>& grad, const Tensor& alpha_bar,
                      const Tensor& alpha_bar_next, const Tensor& scale, double low, double high) {
  expect_dtype(x);
  expect(x.dim() >= 1, "x is [], a single number: give images [N, ...].");
  expect_image(eps, "eps", x);
  if (grad) expect_image(*grad, "grad", x);
  const Settings settings{per_image(alpha_bar, "alpha_bar", x), per_image(alpha_bar_next, "alpha_bar_next", x),
                          per_image(scale, "scale", x), low, high};
  expect(low <= high, "low is ", low, " and high is ", high, ": give a low that does not exceed high.");
  return settings;
}

// Whether the images of a dense tensor lie one after the other.
inline bool images_outermost(const Tensor& tensor) {
  return tensor.size(0) <= 1 || tensor.stride(0) == tensor.numel() / tensor.size(0);
}

// Checks the arguments and lays them out for one pass; only what lies neither like x nor in rows (step_layout.h) is copied first.
inline Call prepare(const Tensor& x, const Tensor& eps, const std::optional<Tensor>& grad, const Tensor& alpha_bar,
                    const Tensor& alpha_bar_next, const Tensor& scale, double low, double high) {
  const Settings settings =
      named("ddim_step", [&] { return check(x, eps, grad, alpha_bar, alpha_bar_next, scale, low, high); });
  const Tensor result = torch::stable::empty_like(x);
  const Tensor out = images_outermost(result) ? result : torch::stable::empty_like(torch::stable::contiguous(x));
  Call call{result, out, lay_like(x, out), eps, grad, settings, {}};
  if (grad) call.grad = lay_like(*grad, out);
  auto layout = plan(x.dim(), x.sizes().data(), out.strides().data(), eps.strides().data());
  if (!layout) {
    call.eps = lay_like(eps, out);
    layout = plan(x.dim(), x.sizes().data(), out.strides().data(), out.strides().data());
  }
  call.layout = *layout;
  return call;
}

}  // namespace knife
