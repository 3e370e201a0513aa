// knife::ddim_step on the CPU: in parallel over the pixels of all images.
#include "step_arguments.h"
#include "step_pass.h"
#include "threads.h"

namespace knife {
namespace {

constexpr int64_t kGrain = 32768;  // pixels that are worth a thread of their own

Tensor ddim_step(Tensor x, Tensor eps, std::optional<Tensor> grad, Tensor alpha_bar, Tensor alpha_bar_next, Tensor scale,
                 double low, double high) {
  Call call = prepare(x, eps, grad, alpha_bar, alpha_bar_next, scale, low, high);
  with(grad.has_value(), [&](auto guided) {
    with(call.clamped(), [&](auto clamped) {
      with_types(x, [&](auto stored, auto computed) {
        using S = decltype(stored);
        S* const out = output<S>(call.out);
        const S *const x = input<S>(call.x), *const eps = input<S>(call.eps);
        const S* const grad = guided ? input<S>(*call.grad) : x;  // unguided, it is not read
        const auto part = step_pixels<guided.value, clamped.value, S, decltype(computed)>;
        parallel_for(0, call.layout.pixels(), kGrain, [&](int64_t begin, int64_t end) {
          part(call.settings, call.layout, out, x, eps, grad, begin, end);
        });
      });
    });
  });
  return call.finish();
}

}  // namespace
}  // namespace knife

STABLE_TORCH_LIBRARY_IMPL(knife, CPU, m) { m.impl("ddim_step", TORCH_BOX(&knife::ddim_step)); }
