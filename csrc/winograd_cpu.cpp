// knife::winograd on the CPU: patches are transformed, multiplied by torch's matrix products, and transformed back, in blocks of
// tiles that stay in a cache.
#include <algorithm>
#include <optional>

#include "tensors.h"
#include "winograd_tiles.h"

namespace knife {
namespace {

using namespace winograd;

constexpr int64_t kBlock = 256;  // tiles that are multiplied at once

void expect_float(const Tensor& tensor, const char* name, const Tensor& x) {
  expect(tensor.scalar_type() == ScalarType::Float, name, " is ", Dtype{tensor.scalar_type()}, ": give float32.");
  expect_device(tensor, name, x);
}

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  expect_float(x, "x", x);
  expect_float(weight, "weight", x);
  if (bias) expect_float(*bias, "bias", x);
  expect(x.dim() == 4 && x.size(1) % kLanes == 0, "x is ", Shape{x},
         ": give features [N, C, H, W], whose channels are a multiple of 16.");
  expect(weight.dim() == 3 && weight.size(0) == kPoints && weight.size(1) == x.size(1) && weight.size(2) % kLanes == 0,
         "weight is ", Shape{weight}, ", but x is ", Shape{x}, ": give [36, C, K], K a multiple of 16.");
  expect(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(2)), "bias is ", Shape{bias ? *bias : x}, ", but weight is ",
         Shape{weight}, ": give one number per output.");
}

// The images as they are or as a copy whose channels lie last: [N, H, W, C], contiguous.
Tensor channels_last(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3));
}

Tensor winograd_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  named("winograd", [&] { check(x, weight, bias); });
  const int64_t channels = x.size(1), outputs = weight.size(2);
  const Tiles tiles{x.size(0), x.size(2), x.size(3)};
  const Tensor in = channels_last(x), by = torch::stable::contiguous(weight);
  const std::optional<Tensor> added = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  Tensor y = torch::stable::new_empty(x, {tiles.images, tiles.height, tiles.width, outputs});
  for (int64_t begin = 0; begin < tiles.count(); begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, tiles.count());
    const Tensor spread = torch::stable::new_empty(x, {kPoints, end - begin, channels});
    spread_tiles(input<float>(in), tiles, channels, begin, end, output<float>(spread));
    const Tensor products = torch::stable::matmul(spread, by);
    gather_tiles(input<float>(products), added ? input<float>(*added) : nullptr, tiles, outputs, begin, end, output<float>(y));
  }
  return torch::stable::transpose(torch::stable::transpose(y, 2, 3), 1, 2);
}

}  // namespace
}  // namespace knife

STABLE_TORCH_LIBRARY_IMPL(knife, CPU, m) { m.impl("winograd", TORCH_BOX(&knife::winograd_cpu)); }
