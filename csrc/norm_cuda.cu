// knife::group_norm_silu and its derivative on CUDA (norm_kernels.h). Nothing waits for the host, so a norm can be captured in a
// CUDA graph.
#include <tuple>

#include "cuda_tools.h"
#include "norm_arguments.h"
#include "norm_kernels.h"

namespace knife {
namespace {

// Returns what calls a kernel of a norm of x on the current stream.
auto launcher(const Tensor& x) {
  return [stream = current_stream(x.get_device_index())](int64_t blocks, auto kernel, const auto&... arguments) {
    kernel<<<static_cast<unsigned>(blocks), kNormThreads, 0, stream>>>(arguments...);
    expect_success(cudaGetLastError());
  };
}

Slabs slabs_of(const Tensor& x, int64_t groups, bool aligned) {
  const Slabs slabs =
      share_out(walk_over(x, groups), static_cast<int>(x.element_size()), aligned, processors(x.get_device_index()));
  expect(slabs.blocks() < int64_t{1} << 31, "there is work for ", slabs.blocks(), " blocks: give fewer images at once.");
  return slabs;
}

// Calls f with a value of the type that is stored, one of that which is computed in, and the width of a pack.
template <typename F>
void with_kind(const Slabs& slabs, const Tensor& x, const F& f) {
  with_types(x, [&](auto stored, auto computed) {
    constexpr int widest = 16 / sizeof(stored);
    if (slabs.width == 1) return f(stored, computed, std::integral_constant<int, 1>{});
    if (slabs.width == widest) return f(stored, computed, std::integral_constant<int, widest>{});
    if constexpr (widest > 4) f(stored, computed, std::integral_constant<int, 4>{});
  });
}

std::tuple<Tensor, Tensor> group_norm_silu(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps, MaybeTensor scale,
                                           MaybeTensor shift) {
  named("group_norm_silu", [&] { check_norm(x, weight, bias, groups, scale, shift); });
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor in = laid_out(x), y = torch::stable::empty_like(in), moments = numbers_like(x, {2, x.size(0), groups});
  if (x.numel() == 0) return {finish_like(x, y), moments};
  const Slabs slabs = slabs_of(in, groups, aligned(in) && aligned(y));
  const Tensor left = numbers_like(x, {slabs.group_numbers()});
  with_kind(slabs, x, [&](auto stored, auto computed, auto width) {
    using S = decltype(stored);
    using T = decltype(computed);
    T* const mean = output<T>(moments);
    launch_forward<decltype(width)::value>(launcher(x), slabs, affine_of<T>(weight, bias, scale, shift), eps, input<S>(in),
                                           output<S>(y), mean, mean + x.size(0) * groups, output<T>(left));
  });
  return {finish_like(x, y), moments};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor grad, Tensor x, Tensor moments, Tensor weight, Tensor bias,
                                                            int64_t groups, MaybeTensor scale, MaybeTensor shift) {
  named("group_norm_silu_backward", [&] { check_norm_backward(grad, x, moments, weight, bias, groups, scale, shift); });
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor in = laid_out(x), dy = lay_like(grad, in), dx = torch::stable::empty_like(in);
  const Tensor dgain = numbers_like(x, {x.size(0), x.size(1)}), doffset = numbers_like(x, {x.size(0), x.size(1)});
  const Tensor known = torch::stable::contiguous(moments);
  if (x.numel() == 0) return {finish_like(x, dx), dgain, doffset};
  const Slabs slabs = slabs_of(in, groups, aligned(in) && aligned(dy) && aligned(dx));
  const Tensor left = numbers_like(x, {slabs.group_numbers() + slabs.channel_numbers()});
  with_kind(slabs, x, [&](auto stored, auto computed, auto width) {
    using S = decltype(stored);
    using T = decltype(computed);
    const T* const mean = input<T>(known);
    launch_backward<decltype(width)::value>(launcher(x), slabs, affine_of<T>(weight, bias, scale, shift), mean,
                                            mean + x.size(0) * groups, input<S>(dy), input<S>(in), output<S>(dx),
                                            output<T>(dgain), output<T>(doffset), output<T>(left));
  });
  return {finish_like(x, dx), dgain, doffset};
}

}  // namespace
}  // namespace knife

STABLE_TORCH_LIBRARY_IMPL(knife, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&knife::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&knife::group_norm_silu_backward));
}
