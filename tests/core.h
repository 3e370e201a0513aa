// What core.cpp and cuda_core.cpp share: buffers that end where a kernel may no longer read or write, a number of 16 bits, and
// comparisons with what sums in double say.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "norm.h"
#include "norm_walk.h"
#include "step.h"
#include "step_layout.h"

namespace {

using namespace knife;
using Sizes = std::vector<int64_t>;

std::string wrong;      // what is wrong on purpose
int64_t displaced = 0;  // values by which each buffer misses the alignment of the heap
long long calls = 0, values = 0;

// bfloat16: what is stored in one type and computed in another.
struct Short {
  uint16_t bits;
  Short() = default;
  explicit Short(float value) {
    const uint32_t all = std::bit_cast<uint32_t>(value);
    bits = static_cast<uint16_t>((all + 0x7fff + (all >> 16 & 1)) >> 16);  // to the nearest, or the even one of two
  }
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

// How far a stored value may be from what it rounds.
template <typename S>
constexpr double kRounding = sizeof(S) == 2 ? 1.0 / 256 : 0;

// Values on the heap, and none beyond them.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t size, const char* use)
      : size_(std::max<int64_t>(0, size - (wrong == use))), values_(new T[static_cast<size_t>(size_ + displaced)]) {}
  T* data() const { return values_.get() + displaced; }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> values_;
};

std::mt19937 chance;

template <typename T>
Buffer<T> drawn(int64_t size, double low = -2, double high = 2) {
  Buffer<T> buffer(size, "read");
  for (int64_t i = 0; i < buffer.size() - (wrong == "unset"); ++i)
    buffer[i] = static_cast<T>(static_cast<float>(std::uniform_real_distribution(low, high)(chance)));
  return buffer;
}

template <typename T>
Buffer<T> unwritten(int64_t size) {
  return Buffer<T>(size, "write");
}

void expect(bool right, const char* what, double got = 0, double wanted = 0) {
  ++values;
  if (right || wrong == "barrier") return;  // ThreadSanitizer is to see that one
  std::fprintf(stderr, "core: %s: %.9g instead of %.9g\n", what, got, wanted);
  std::exit(1);
}

void near(double got, double wanted, double off, const char* what) {
  if (wrong == "sum") wanted += 1;
  expect(std::abs(got - wanted) <= off * (1 + std::abs(wanted)), what, got, wanted);
}

// --- The step ----------------------------------------------------------------------------------------------------------------

// Where things lie: the dimensions from the outermost to the innermost, and how much wider than needed each is stored.
inline Sizes strides_of(const Sizes& sizes, const Sizes& order, const Sizes& widths) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(1, sizes[order[i]] * widths[order[i]]);
  }
  return strides;
}

inline int64_t extent(const Sizes& sizes, const Sizes& strides) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

// Calls f(image, offset by the first strides, offset by the second) for each pixel.
template <typename F>
void each_pixel(const Sizes& sizes, const Sizes& first, const Sizes& second, const F& f) {
  Sizes index(sizes.size(), 0);
  if (!extent(sizes, first)) return;
  for (size_t d = 0; d < sizes.size();) {
    int64_t a = 0, b = 0;
    for (size_t i = 0; i < sizes.size(); ++i) a += index[i] * first[i], b += index[i] * second[i];
    f(index[0], a, b);
    for (d = 0; d < sizes.size() && ++index[d] == sizes[d]; ++d) index[d] = 0;
  }
}

inline double stepped(const Settings& by, int64_t image, double x, double eps, double grad, bool guided) {
  const double a = by.alpha_bar[image], b = by.alpha_bar_next[image];
  double e = guided ? eps - by.scale[image] * std::sqrt(1 - a) * grad : eps;
  double x0 = (x - std::sqrt(1 - a) * e) / std::sqrt(a);
  if (x0 < by.low || x0 > by.high) {
    x0 = std::min(std::max(x0, by.low), by.high);
    e = a < 1 ? (x - std::sqrt(a) * x0) / std::sqrt(1 - a) : e;
  }
  return std::sqrt(b) * x0 + std::sqrt(1 - b) * e;
}

// Makes a step by `kernel(settings, out, x, eps, grad)`, and compares it.
template <bool guided, bool clamped, typename S, typename Kernel>
void step_by(const Kernel& kernel, const Sizes& sizes, const Sizes& strides, const Sizes& eps_strides, const Layout& layout,
             double off) {
  const int64_t images = sizes[0], apart = clamped ? 3 : 1;  // numbers of neighbouring images lie so far apart
  const auto table = [&](double low, double high) { return drawn<double>(images ? (images - 1) * apart + 1 : 0, low, high); };
  const auto from = table(0.1, 1), to = table(0.1, 1), scale = table(0, 3);
  if (images && wrong.empty()) from[0] = 1;  // level 0
  const double limit = clamped ? 0.5 : std::numeric_limits<double>::infinity();
  const Settings settings{{from.data(), apart}, {to.data(), apart}, {scale.data(), apart}, -limit, limit};
  const auto x = drawn<S>(layout.pixels()), grad = drawn<S>(guided ? layout.pixels() : 0);
  const auto eps = drawn<S>(extent(sizes, eps_strides));
  const auto out = unwritten<S>(layout.pixels());
  kernel(settings, out.data(), x.data(), eps.data(), grad.data());
  ++calls;
  each_pixel(sizes, strides, eps_strides, [&](int64_t image, int64_t at, int64_t eps_at) {
    const double slope = guided ? static_cast<double>(grad[at]) : 0;
    near(out[at], stepped(settings, image, x[at], eps[eps_at], slope, guided), off, "a step");
  });
}

// The dimensions with the channels, the second, first or last.
inline Sizes order_of(size_t dims, bool last) {
  Sizes order{0};
  for (size_t d = last ? 2 : 1; d < dims; ++d) order.push_back(static_cast<int64_t>(d));
  if (last && dims > 1) order.push_back(1);
  return order;
}

// Calls f(strides, strides of eps, walk) for the ways in which x and eps of these sizes can lie.
template <typename F>
void each_layout(const Sizes& sizes, const F& f) {
  for (const bool last : {false, true})
    for (const std::string eps : {"alike", "slice", "other slice", "one row", "gaps"}) {
      const Sizes order = order_of(sizes.size(), last), plain(sizes.size(), 1);
      Sizes widths = plain, eps_order = eps == "other slice" ? order_of(sizes.size(), !last) : order;
      if (sizes.size() > 1 && eps.ends_with("slice")) widths[1] = 2;
      if (eps == "gaps") widths = Sizes(sizes.size(), 2);
      const Sizes strides = strides_of(sizes, order, plain);
      Sizes eps_strides = strides_of(sizes, eps_order, widths);
      if (eps == "one row") eps_strides.back() = 0;
      const auto layout = plan(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), eps_strides.data());
      if (eps == "alike" || eps == "slice") expect(layout.has_value(), "no walk over a slice");
      if (layout) f(strides, eps_strides, *layout);
    }
}

// --- The norm ----------------------------------------------------------------------------------------------------------------

inline double silu(double z) { return z / (1 + std::exp(-z)); }

inline double silu_slope(double z) {
  const double s = 1 / (1 + std::exp(-z));
  return s * (1 + z * (1 - s));
}

// What a norm takes and gives, and the same in double. S is stored, T is computed in.
template <typename S, typename T>
struct Norm {
  Walk walk;
  bool conditioned;
  int64_t size = walk.images * walk.channels * walk.pixels, pairs = walk.images * walk.channels;
  Buffer<S> x = drawn<S>(size, 1, 7), dy = drawn<S>(size);
  Buffer<T> weight = drawn<T>(2 * walk.channels - 1), bias = drawn<T>(walk.channels);  // weights lie two apart
  Buffer<T> scale = drawn<T>(2 * pairs - walk.channels), shift = drawn<T>(2 * pairs - walk.channels);  // halves of wider rows
  Buffer<S> y = unwritten<S>(size), dx = unwritten<S>(size);
  Buffer<T> dgain = unwritten<T>(pairs), doffset = unwritten<T>(pairs);
  Buffer<T> mean = unwritten<T>(walk.images * walk.groups), rstd = unwritten<T>(walk.images * walk.groups);

  int64_t at(int64_t n, int64_t c, int64_t p) const {
    return walk.last ? (n * walk.pixels + p) * walk.channels + c : (n * walk.channels + c) * walk.pixels + p;
  }
  Affine<T> affine() const {
    const Table<T> none{nullptr, 0, 0}, factors{scale.data(), 2 * walk.channels, 1}, summands{shift.data(), 2 * walk.channels, 1};
    return {{weight.data(), 0, 2}, {bias.data(), 0, 1}, conditioned ? factors : none, conditioned ? summands : none};
  }
  double factor(int64_t n, int64_t c) const { return conditioned ? 1.0 + scale[n * 2 * walk.channels + c] : 1; }
  double gain(int64_t n, int64_t c) const { return weight[2 * c] * factor(n, c); }
  double offset(int64_t n, int64_t c) const {
    return bias[c] * factor(n, c) + (conditioned ? static_cast<double>(shift[n * 2 * walk.channels + c]) : 0);
  }
};

// Compares what was made of one group of an image with sums in double.
template <typename S, typename T>
void compare_group(const Norm<S, T>& norm, int64_t n, int64_t group, double eps, double off) {
  const int64_t first = group * norm.walk.group_channels(), end = first + norm.walk.group_channels(), pixels = norm.walk.pixels;
  const double count = static_cast<double>(norm.walk.group_size()), stored = kRounding<S>;
  const auto total = [&](const auto& f) {
    double sum = 0;
    for (int64_t c = first; c < end; ++c)
      for (int64_t p = 0; p < pixels; ++p) sum += f(c, norm.at(n, c, p));
    return sum;
  };
  const double mean = total([&](int64_t, int64_t i) { return norm.x[i]; }) / count;
  const double variance = total([&](int64_t, int64_t i) { return (norm.x[i] - mean) * (norm.x[i] - mean); }) / count;
  const double rstd = 1 / std::sqrt(variance + eps);
  const auto unit = [&](int64_t i) { return (norm.x[i] - mean) * rstd; };
  const auto z = [&](int64_t c, int64_t i) { return norm.gain(n, c) * unit(i) + norm.offset(n, c); };
  const auto dz = [&](int64_t c, int64_t i) { return norm.dy[i] * silu_slope(z(c, i)); };
  const double pull = total([&](int64_t c, int64_t i) { return norm.gain(n, c) * dz(c, i); }) / count;
  const double tilt = total([&](int64_t c, int64_t i) { return norm.gain(n, c) * dz(c, i) * unit(i); }) / count;
  near(norm.mean[n * norm.walk.groups + group], mean, off, "a mean");
  near(norm.rstd[n * norm.walk.groups + group] / rstd, 1, off, "a deviation");
  for (int64_t c = first; c < end; ++c) {
    double dgain = 0, doffset = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t i = norm.at(n, c, p);
      near(norm.y[i], silu(z(c, i)), off * (1 + rstd) + stored, "a norm");
      near(norm.dx[i], rstd * (norm.gain(n, c) * dz(c, i) - pull - unit(i) * tilt), off * (1 + rstd) + stored, "a gradient");
      dgain += dz(c, i) * unit(i), doffset += dz(c, i);
    }
    near(norm.dgain[n * norm.walk.channels + c], dgain, off * std::sqrt(count) * (1 + rstd), "the gradient of a gain");
    near(norm.doffset[n * norm.walk.channels + c], doffset, off * std::sqrt(count), "the gradient of an offset");
  }
}

template <typename S, typename T>
void compare(const Norm<S, T>& norm, double eps, double off) {
  for (int64_t n = 0; n < norm.walk.images; ++n)
    for (int64_t group = 0; group < norm.walk.groups; ++group) compare_group(norm, n, group, eps, off);
}

}  // namespace
