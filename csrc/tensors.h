// What the kernels of every op need of a tensor: checks with their sentences, layouts, types.
// The sentences are those of the `_complaints` in knife/ops.py, word for word; tests/test_ops.py compares them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace knife {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void expect(bool fine, const Parts&... parts) {
  if (fine) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// Runs f, the checks of an op; a complaint gets the name of the op in front.
template <typename F>
auto named(const char* op, const F& f) {
  try {
    return f();
  } catch (const std::runtime_error& complaint) {
    throw std::runtime_error(std::string(op) + ": " + complaint.what());
  }
}

// Words of a sentence, which are only put together for a complaint.
struct Dtype {
  ScalarType of;
};
struct Device {
  const Tensor& of;
};
struct Shape {
  const Tensor& of;
};

inline std::ostream& operator<<(std::ostream& out, Dtype dtype) {
  switch (dtype.of) {
    case ScalarType::Float: return out << "float32";
    case ScalarType::Double: return out << "float64";
    case ScalarType::BFloat16: return out << "bfloat16";
    case ScalarType::Half: return out << "float16";
    case ScalarType::Bool: return out << "bool";
    case ScalarType::Byte: return out << "uint8";
    case ScalarType::Int: return out << "int32";
    case ScalarType::Long: return out << "int64";
    case ScalarType::ComplexFloat: return out << "complex64";
    case ScalarType::ComplexDouble: return out << "complex128";
    default: return out << torch::headeronly::toString(dtype.of);
  }
}

inline std::ostream& operator<<(std::ostream& out, Device device) {
  if (device.of.is_cpu()) return out << "cpu";
  if (device.of.is_cuda()) return out << "cuda:" << device.of.get_device_index();
  return out << "another device";
}

inline std::ostream& operator<<(std::ostream& out, Shape shape) {
  out << "[";
  for (int64_t d = 0; d < shape.of.dim(); ++d) out << (d ? ", " : "") << shape.of.size(d);
  return out << "]";
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
  expect(tensor.device() == x.device(), name, " is on ", Device{tensor}, ", but x is on ", Device{x},
         ": move both to one device.");
}

inline void expect_dtype(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  expect(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
         "x is ", Dtype{x.scalar_type()}, ": give float32, float64, bfloat16 or float16.");
}

inline void expect_image(const Tensor& image, const char* name, const Tensor& x) {
  expect(same_shape(image, x), name, " is ", Shape{image}, ", but x is ", Shape{x}, ": give both one shape.");
  expect(image.scalar_type() == x.scalar_type(), name, " is ", Dtype{image.scalar_type()}, ", but x is ", Dtype{x.scalar_type()},
         ": give both one dtype.");
  expect_device(image, name, x);
}

// Returns the tensor itself if it lies like `model` in memory, else a copy that does.
inline Tensor lay_like(const Tensor& tensor, const Tensor& model) {
  if (same_strides(tensor, model)) return tensor;
  Tensor copy = torch::stable::empty_like(model);
  return torch::stable::copy_(copy, tensor);
}

template <typename S>
S* output(const Tensor& tensor) {
  return static_cast<S*>(tensor.mutable_data_ptr());
}

template <typename S>
const S* input(const Tensor& tensor) {
  return static_cast<const S*>(tensor.const_data_ptr());
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
