// knife::ddim_step on CUDA (step_kernels.h). Nothing waits for the host, so a step can be captured in a CUDA graph.
#include "cuda_tools.h"
#include "step_arguments.h"
#include "step_kernels.h"

namespace knife {
namespace {

template <bool guided, bool clamped, int width, typename S, typename T>
void launch(const Call& call) {
  const int device = call.out.get_device_index();
  const StepGrid blocks = step_grid(call.layout, width, processors(device));
  const dim3 grid(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y));
  step_kernel<guided, clamped, width, S, T><<<grid, kStepThreads, 0, current_stream(device)>>>(
      output<S>(call.out), input<S>(call.x), input<S>(call.eps), call.grad ? input<S>(*call.grad) : nullptr, call.layout,
      call.settings);
  expect_success(cudaGetLastError());
}

bool packs_fit(const Call& call, int64_t width) {
  return rows_fit(call.layout, width) && aligned(call.out) && aligned(call.x) && aligned(call.eps) &&
         (!call.grad || aligned(*call.grad));
}

Tensor ddim_step(Tensor x, Tensor eps, std::optional<Tensor> grad, Tensor alpha_bar, Tensor alpha_bar_next, Tensor scale,
                 double low, double high) {
  Call call = prepare(x, eps, grad, alpha_bar, alpha_bar_next, scale, low, high);
  if (call.layout.pixels() == 0) return call.finish();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with(grad.has_value(), [&](auto guided) {
    with(call.clamped(), [&](auto clamped) {
      with_types(x, [&](auto stored, auto computed) {
        using S = decltype(stored);
        using T = decltype(computed);
        if (packs_fit(call, 16 / sizeof(S)))
          launch<decltype(guided)::value, decltype(clamped)::value, 16 / sizeof(S), S, T>(call);
        else
          launch<decltype(guided)::value, decltype(clamped)::value, 1, S, T>(call);
      });
    });
  });
  return call.finish();
}

}  // namespace
}  // namespace knife

STABLE_TORCH_LIBRARY_IMPL(knife, CUDA, m) { m.impl("ddim_step", TORCH_BOX(&knife::ddim_step)); }
