// knife::ddim_step on the CPU: one pass over x, eps and grad, in parallel over the pixels of all images.
#include "step_arguments.h"

namespace knife {
namespace {

constexpr int64_t kGrain = 32768;  // pixels that are worth a thread of their own

// Computes neighbouring pixels; the compiler vectorises this loop.
template <bool guided, bool clamped, typename S, typename T>
inline void run(const Step<T>& step, S* __restrict out, const S* x, const S* eps, const S* grad, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i)
    out[i] = static_cast<S>(take<guided, clamped, T>(step, x[i], eps[i], guided ? static_cast<T>(grad[i]) : T{}));
}

// Computes the pixels [begin, end), counted through all images.
template <bool guided, bool clamped, typename S, typename T>
void compute(const Call& call, int64_t begin, int64_t end) {
  const Layout& layout = call.layout;
  S* const out = output<S>(call.out);
  const S *const x = input<S>(call.x), *const eps = input<S>(call.eps);
  const S* const grad = guided ? input<S>(*call.grad) : x;  // unguided, it is not read
  while (begin < end) {
    const int64_t image = begin / layout.image_pixels(), first = image * layout.image_pixels();
    const int64_t stop = std::min(end, first + layout.image_pixels());
    const Step<T> step = make_step<T>(call.settings, image);
    int64_t row = (begin - first) / layout.columns, column = (begin - first) % layout.columns;
    for (; begin < stop; ++row, column = 0) {
      const int64_t pixels = std::min(layout.columns - column, stop - begin);
      const int64_t eps_at = image * layout.eps_image_stride + row * layout.eps_row_stride + column;
      run<guided, clamped, S, T>(step, out + begin, x + begin, eps + eps_at, grad + begin, pixels);
      begin += pixels;
    }
  }
}

Tensor ddim_step(Tensor x, Tensor eps, std::optional<Tensor> grad, Tensor alpha_bar, Tensor alpha_bar_next, Tensor scale,
                 double low, double high) {
  Call call = prepare(x, eps, grad, alpha_bar, alpha_bar_next, scale, low, high);
  with(grad.has_value(), [&](auto guided) {
    with(call.clamped(), [&](auto clamped) {
      with_types(x, [&](auto stored, auto computed) {
        const auto part = compute<guided.value, clamped.value, decltype(stored), decltype(computed)>;
        torch::stable::parallel_for(0, call.layout.pixels(), kGrain, [&](int64_t begin, int64_t end) { part(call, begin, end); });
      });
    });
  });
  return call.finish();
}

}  // namespace
}  // namespace knife

STABLE_TORCH_LIBRARY_IMPL(knife, CPU, m) { m.impl("ddim_step", TORCH_BOX(&knife::ddim_step)); }
