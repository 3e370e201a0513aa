// One DDIM step for one pixel. The formula stands here once; step_cpu.cpp and step_cuda.cu compile it, and knife/ops.py
// states it in plain torch. No torch in this file.
//
//     e  = eps - scale sqrt(1 - ab) grad
//     x0 = (x - sqrt(1 - ab) e) / sqrt(ab)
//     x' = sqrt(ab') x0 + sqrt(1 - ab') e
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace knife {

// One number per image.
struct PerImage {
  const double* data;
  int64_t stride;

  KNIFE_FN double operator[](int64_t image) const { return data[image * stride]; }
};

// What a step does, for all images.
struct Settings {
  PerImage alpha_bar, alpha_bar_next, scale;
  double low, high;  // limits of x0
};

// The coefficients of one image: formed in double, rounded once to T, the type that is computed in.
template <typename T>
struct Step {
  T signal, noise;            // sqrt(ab), sqrt(1 - ab): how much x holds of the clean image and of eps
  T next_signal, next_noise;  // the same at the level stepped to
  T guide;                    // scale sqrt(1 - ab)
  T ratio;                    // signal / noise; 0 at level 0, where x holds no eps that a clamp could change
  T low, high;
};

template <typename T>
KNIFE_FN Step<T> make_step(const Settings& settings, int64_t image) {
  const double alpha_bar = settings.alpha_bar[image], alpha_bar_next = settings.alpha_bar_next[image];
  const double signal = sqrt(alpha_bar), noise = sqrt(1 - alpha_bar);
  Step<T> step;
  step.signal = static_cast<T>(signal);
  step.noise = static_cast<T>(noise);
  step.next_signal = static_cast<T>(sqrt(alpha_bar_next));
  step.next_noise = static_cast<T>(sqrt(1 - alpha_bar_next));
  step.guide = static_cast<T>(settings.scale[image] * noise);
  step.ratio = static_cast<T>(noise > 0 ? signal / noise : 0);
  step.low = static_cast<T>(settings.low);
  step.high = static_cast<T>(settings.high);
  return step;
}

// Returns x' of one pixel. Unless `guided`, grad is not used. A NaN passes through the clamp.
template <bool guided, bool clamped, typename T>
KNIFE_FN T take(const Step<T>& step, T x, T eps, T grad) {
  T e = guided ? eps - step.guide * grad : eps;
  T x0 = (x - step.noise * e) / step.signal;
  if (clamped) {
    const T raised = x0 < step.low ? step.low : x0;
    const T kept = raised > step.high ? step.high : raised;
    e = e + step.ratio * (x0 - kept);  // the eps that x and the clamped x0 imply: (x - signal kept) / noise
    x0 = kept;
  }
  return step.next_signal * x0 + step.next_noise * e;
}

}  // namespace knife
