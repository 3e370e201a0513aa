// What both kernels do before they compute: check the arguments, make the output, plan the walk.
// The sentences are those of `_complaints` in knife/ops.py, word for word; tests/test_ops.py compares them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "layout.h"
#include "step.h"

namespace knife {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void expect(bool fine, const Parts&... parts) {
  if (fine) return;
  std::ostringstream sentence;
  sentence << "ddim_step: ";
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

inline std::string dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(tensor.scalar_type());
  }
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

inline std::string shape_name(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

// Whether two tensors of one shape lie alike in memory; the stride of a single row means nothing.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

inline void expect_device(const Tensor& tensor, const char* name, const Tensor& x) {
  expect(tensor.device() == x.device(), name, " is on ", device_name(tensor), ", but x is on ", device_name(x),
         ": move both to one device.");
}

inline void expect_image(const Tensor& image, const char* name, const Tensor& x) {
  expect(same_shape(image, x), name, " is ", shape_name(image), ", but x is ", shape_name(x), ": give both one shape.");
  expect(image.scalar_type() == x.scalar_type(), name, " is ", dtype_name(image), ", but x is ", dtype_name(x),
         ": give both one dtype.");
  expect_device(image, name, x);
}

inline PerImage per_image(const Tensor& numbers, const char* name, const Tensor& x) {
  expect(numbers.dim() == 1 && numbers.size(0) == x.size(0), name, " is ", shape_name(numbers), ", but x is ", shape_name(x),
         ": give one number per image.");
  expect(numbers.scalar_type() == ScalarType::Double, name, " is ", dtype_name(numbers), ": give float64.");
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

  template <typename S>
  S* output() const {
    return static_cast<S*>(out.mutable_data_ptr());
  }

  template <typename S>
  static const S* input(const Tensor& tensor) {
    return static_cast<const S*>(tensor.const_data_ptr());
  }
};

inline Settings check(const Tensor& x, const Tensor& eps, const std::optional<Tensor>& grad, const Tensor& alpha_bar,
                      const Tensor& alpha_bar_next, const Tensor& scale, double low, double high) {
  const ScalarType dtype = x.scalar_type();
  expect(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
         "x is ", dtype_name(x), ": give float32, float64, bfloat16 or float16.");
  expect(x.dim() >= 1, "x is [], a single number: give images [N, ...].");
  expect_image(eps, "eps", x);
  if (grad) expect_image(*grad, "grad", x);
  const Settings settings{per_image(alpha_bar, "alpha_bar", x), per_image(alpha_bar_next, "alpha_bar_next", x),
                          per_image(scale, "scale", x), low, high};
  expect(low <= high, "low is ", low, " and high is ", high, ": give a low that does not exceed high.");
  return settings;
}

// Returns the tensor itself if it lies like `model` in memory, else a copy that does.
inline Tensor lay_like(const Tensor& tensor, const Tensor& model) {
  if (same_strides(tensor, model)) return tensor;
  Tensor copy = torch::stable::empty_like(model);
  return torch::stable::copy_(copy, tensor);
}

// Whether the images of a dense tensor lie one after the other.
inline bool images_outermost(const Tensor& tensor) {
  return tensor.size(0) <= 1 || tensor.stride(0) == tensor.numel() / tensor.size(0);
}

// Checks the arguments and lays them out for one pass; only what lies neither like x nor in rows (layout.h) is copied first.
inline Call prepare(const Tensor& x, const Tensor& eps, const std::optional<Tensor>& grad, const Tensor& alpha_bar,
                    const Tensor& alpha_bar_next, const Tensor& scale, double low, double high) {
  const Settings settings = check(x, eps, grad, alpha_bar, alpha_bar_next, scale, low, high);
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

// Turns a run-time bool into a compile-time one.
template <typename F>
void with(bool flag, const F& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// Calls f with a value of the type that a tensor stores, and one of the type that is computed in.
template <typename F>
void with_types(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{}, float{});
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{}, float{});
    default: return f(c10::Half{}, float{});
  }
}

}  // namespace knife
