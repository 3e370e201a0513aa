// knife::group_norm_silu and its derivative on the CPU.
#include <tuple>

#include "norm_arguments.h"
#include "norm_passes.h"

namespace knife {
namespace {

// Calls f with whether the channels lie last, and values of the types that are stored and computed in.
template <typename F>
void with_kind(const Walk& walk, const Tensor& x, const F& f) {
  with(walk.last, [&](auto last) { with_types(x, [&](auto stored, auto computed) { f(last, stored, computed); }); });
}

std::tuple<Tensor, Tensor> group_norm_silu(Tensor x, Tensor weight, Tensor bias, int64_t groups, double eps, MaybeTensor scale,
                                           MaybeTensor shift) {
  named("group_norm_silu", [&] { check_norm(x, weight, bias, groups, scale, shift); });
  const Tensor in = laid_out(x), y = torch::stable::empty_like(in), moments = numbers_like(x, {2, x.size(0), groups});
  const Walk walk = walk_over(in, groups);
  if (x.numel() != 0) with_kind(walk, x, [&](auto last, auto stored, auto computed) {
    using S = decltype(stored);
    using T = decltype(computed);
    T* const mean = output<T>(moments);
    forward<last.value>(walk, affine_of<T>(weight, bias, scale, shift), eps, input<S>(in), output<S>(y), mean,
            mean + x.size(0) * groups);
  });
  return {finish_like(x, y), moments};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(Tensor grad, Tensor x, Tensor moments, Tensor weight, Tensor bias,
                                                            int64_t groups, MaybeTensor scale, MaybeTensor shift) {
  named("group_norm_silu_backward", [&] { check_norm_backward(grad, x, moments, weight, bias, groups, scale, shift); });
  const Tensor in = laid_out(x), dy = lay_like(grad, in), dx = torch::stable::empty_like(in);
  const Tensor dgain = numbers_like(x, {x.size(0), x.size(1)}), doffset = numbers_like(x, {x.size(0), x.size(1)});
  const Tensor known = torch::stable::contiguous(moments);
  const Walk walk = walk_over(in, groups);
  if (x.numel() != 0) with_kind(walk, x, [&](auto last, auto stored, auto computed) {
    using S = decltype(stored);
    using T = decltype(computed);
    const T* const mean = input<T>(known);
    backward<last.value>(walk, affine_of<T>(weight, bias, scale, shift), mean, mean + x.size(0) * groups, input<S>(dy),
             input<S>(in), output<S>(dx), output<T>(dgain), output<T>(doffset));
  });
  return {finish_like(x, dx), dgain, doffset};
}

}  // namespace
}  // namespace knife

STABLE_TORCH_LIBRARY_IMPL(knife, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&knife::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&knife::group_norm_silu_backward));
}
