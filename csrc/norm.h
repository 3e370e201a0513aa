// Group normalisation, an affine map and SiLU for one value. The formula stands here once; norm_cpu.cpp and norm_cuda.cu compile
// it, and knife/ops.py states it in plain torch. No torch in this file.
//
//     y = silu(z),  z = gain (x - mean) rstd + offset,  gain = weight (1 + scale),  offset = bias (1 + scale) + shift
//
// and backwards, where the means are taken over the pixels and channels of a group:
//
//     dz = dy silu'(z),  dx = rstd (gain dz - mean(gain dz) - (x - mean) rstd mean(gain dz (x - mean) rstd))
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace knife {

// One number per image and channel; an image stride of 0 makes it one per channel.
template <typename T>
struct Table {
  const T* data;
  int64_t image_stride, channel_stride;

  KNIFE_FN T operator()(int64_t image, int64_t channel) const { return data[image * image_stride + channel * channel_stride]; }
};

// What follows the normalisation.
template <typename T>
struct Affine {
  Table<T> weight, bias, scale, shift;  // the data of scale and shift may be null: then they are 0

  KNIFE_FN T factor(int64_t image, int64_t channel) const { return scale.data ? 1 + scale(image, channel) : T(1); }
  KNIFE_FN T gain(int64_t image, int64_t channel) const { return weight(image, channel) * factor(image, channel); }
  KNIFE_FN T offset(int64_t image, int64_t channel) const {
    const T offset = bias(image, channel) * factor(image, channel);
    return shift.data ? offset + shift(image, channel) : offset;
  }
};

// The same as one map of x: z = slope x + lift.
template <typename T>
struct Line {
  T slope, lift;
};

template <typename T>
KNIFE_FN Line<T> line_of(const Affine<T>& affine, int64_t image, int64_t channel, double mean, double rstd) {
  const double slope = rstd * affine.gain(image, channel);
  return {static_cast<T>(slope), static_cast<T>(affine.offset(image, channel) - mean * slope)};
}

// The map from dz to the gradient of x: dx = slope dz + bend (x - mean) + level.
template <typename T>
struct Gradient {
  T bend, level;

  // The same with the mean in the level, which is as exact as a line's lift: dx = slope dz + bend x + level.
  KNIFE_FN Gradient around_zero(double mean) const { return {bend, static_cast<T>(level - bend * mean)}; }
};

// `pull` and `tilt` are the means of gain dz and of gain dz (x - mean) rstd over the group.
template <typename T>
KNIFE_FN Gradient<T> gradient_of(double rstd, double pull, double tilt) {
  return {static_cast<T>(-rstd * rstd * tilt), static_cast<T>(-rstd * pull)};
}

// a b + c, in one instruction where the machine has it.
template <typename T>
KNIFE_FN T multiply_add(T a, T b, T c) {
#if defined(FP_FAST_FMAF) || defined(__CUDACC__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

#ifdef __CUDACC__
KNIFE_FN float exponential(float x) { return expf(x); }
#else
// e^x to two units in the last place, in arithmetic that compilers vectorise. Beyond 80 it stays at e^80: all that 1 / (1 + e^x)
// needs, and nothing becomes so small that a processor slows down. On the bits, no compiler makes the limit a branch.
inline float exponential(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x), limit = std::bit_cast<int32_t>(80.0f);
  x = std::bit_cast<float>((bits & INT32_MIN) | std::min(bits & INT32_MAX, limit));
  const float whole = multiply_add(x, 1.44269504f, 12582912.0f) - 12582912.0f;  // x / ln 2; the sum has no room for a fraction
  const float r = multiply_add(whole, 2.12194440e-4f, multiply_add(whole, -0.693359375f, x));  // x - whole ln 2, in two parts
  float p = 1.9875691500e-4f;  // a polynomial in |r| <= ln 2 / 2 (Cephes)
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  p = multiply_add(p, r * r, r + 1);
  return p * std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}
#endif
KNIFE_FN double exponential(double x) { return exp(x); }

// a / b; of float32 on a GPU to two units in the last place, in a few instructions. A norm in 16 bits would else compute for longer
// than it reads and writes.
template <typename T>
KNIFE_FN T quotient(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == sizeof(float)) return __fdividef(a, b);
#endif
  return a / b;
}

template <typename T>
KNIFE_FN T logistic(T z) {
  return quotient<T>(1, 1 + exponential(-z));
}

// Returns y of one x.
template <typename T>
KNIFE_FN T activate(T slope, T lift, T x) {
  const T z = multiply_add(slope, x, lift);
  return quotient(z, 1 + exponential(-z));
}

// Returns dz of one x and dy.
template <typename T>
KNIFE_FN T descend(T slope, T lift, T x, T dy) {
  const T z = multiply_add(slope, x, lift), s = logistic(z);
  return dy * (s * (1 + z * (1 - s)));
}

}  // namespace knife
