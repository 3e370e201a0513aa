// knife::ddim_step on CUDA: one pass over x, eps and grad, up to 16 bytes of each per thread and turn.
// Nothing waits for the host, so a step can be captured in a CUDA graph.
#include "cuda_tools.h"
#include "step_arguments.h"

namespace knife {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;  // 2048 threads, all that a multiprocessor holds; more images or pixels take turns
constexpr int kMaxGridY = 65535;

// Block y takes images y, y + gridDim.y, ...; within one image the threads of all blocks x take packs in turn.
template <bool guided, bool clamped, int width, typename S, typename T>
__global__ void __launch_bounds__(kThreads)
    step_kernel(S* out, const S* x, const S* eps, const S* grad, const Layout layout, const Settings settings) {
  using Packed = Pack<S, width>;
  __shared__ Step<T> step;
  const int64_t columns = layout.columns / width, packs = layout.rows * columns;
  for (int64_t image = blockIdx.y; image < layout.images; image += gridDim.y) {
    __syncthreads();  // the coefficients of the last image are no longer needed
    if (threadIdx.x == 0) step = make_step<T>(settings, image);
    __syncthreads();
    for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < packs; i += gridDim.x * int64_t{kThreads}) {
      const int64_t row = layout.rows == 1 ? 0 : i / columns, column = i - row * columns;
      const int64_t at = (image * packs + i) * width;
      const int64_t eps_at = image * layout.eps_image_stride + row * layout.eps_row_stride + column * width;
      const Packed xs = *reinterpret_cast<const Packed*>(x + at), es = *reinterpret_cast<const Packed*>(eps + eps_at);
      const Packed gs = guided ? *reinterpret_cast<const Packed*>(grad + at) : Packed{};
      Packed result;
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const T next = take<guided, clamped, T>(step, static_cast<T>(xs.value[k]), static_cast<T>(es.value[k]),
                                                static_cast<T>(gs.value[k]));
        result.value[k] = static_cast<S>(next);
      }
      *reinterpret_cast<Packed*>(out + at) = result;
    }
  }
}

template <bool guided, bool clamped, int width, typename S, typename T>
void launch(const Call& call) {
  const Layout& layout = call.layout;
  const int device = call.out.get_device_index();
  const int64_t blocks = (layout.image_pixels() / width + kThreads - 1) / kThreads;
  const int64_t y = std::min<int64_t>(layout.images, kMaxGridY);
  const int64_t x = std::min(blocks, std::max<int64_t>(1, processors(device) * kBlocksPerProcessor / y));
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
  step_kernel<guided, clamped, width, S, T><<<grid, kThreads, 0, current_stream(device)>>>(
      output<S>(call.out), input<S>(call.x), input<S>(call.eps), call.grad ? input<S>(*call.grad) : nullptr, layout,
      call.settings);
  expect_success(cudaGetLastError());
}

// Whether every row starts at a multiple of 16 bytes and is one long, in all tensors.
template <typename S>
bool packs_fit(const Call& call) {
  constexpr int64_t width = 16 / sizeof(S);
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const Layout& layout = call.layout;
  return layout.columns % width == 0 && layout.eps_row_stride % width == 0 && layout.eps_image_stride % width == 0 &&
         aligned(output<S>(call.out)) && aligned(input<S>(call.x)) && aligned(input<S>(call.eps)) &&
         (!call.grad || aligned(input<S>(*call.grad)));
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
        if (packs_fit<S>(call))
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
