// knife::winograd on the CPU: patches are transformed, multiplied by torch's matrix products, and transformed back, in blocks of
// tiles that stay in a cache.
#include <algorithm>
#include <optional>

#include "tensors.h"
#include "winograd.h"

namespace knife {
namespace {

using namespace winograd;
using torch::stable::parallel_for;

constexpr int64_t kBlock = 256;  // tiles that are multiplied at once
constexpr int64_t kGrain = 4;    // tiles that are worth a thread of their own

// Images [N, C, H, W] whose channels lie last, cut into tiles from left to right and down; at the edges they may hang over.
struct Tiles {
  int64_t images, height, width;

  int64_t down() const { return (height + kTile - 1) / kTile; }
  int64_t across() const { return (width + kTile - 1) / kTile; }
  int64_t count() const { return images * down() * across(); }
};

struct Place {
  int64_t image, top, left;  // of a tile's first pixel
};

inline Place place(const Tiles& tiles, int64_t tile) {
  const int64_t row = tile / tiles.across(), column = tile % tiles.across();
  return {row / tiles.down(), row % tiles.down() * kTile, column * kTile};
}

inline const Row& row_at(const float* values) { return *reinterpret_cast<const Row*>(values); }
inline Row& row_at(float* values) { return *reinterpret_cast<Row*>(values); }

// Reads the patch around a tile, [6][6]; `x` points to the first channel. Beyond the image lie zeros.
inline void read_patch(const float* x, const Tiles& tiles, Place at, int64_t channels, Row* patch) {
  const auto inside = [](int64_t first, int64_t size) { return first > 0 && first + kPatch - 1 <= size; };
  const int64_t line = tiles.width * channels, top = at.top - 1, left = at.left - 1;
  const float* const corner = x + (at.image * tiles.height + top) * line + left * channels;
  if (inside(at.top, tiles.height) && inside(at.left, tiles.width)) {
    for (int64_t i = 0; i < kPatch; ++i)
      for (int64_t j = 0; j < kPatch; ++j) patch[i * kPatch + j] = row_at(corner + i * line + j * channels);
    return;
  }
  for (int64_t i = 0; i < kPatch; ++i)
    for (int64_t j = 0; j < kPatch; ++j) {
      const bool there = top + i >= 0 && top + i < tiles.height && left + j >= 0 && left + j < tiles.width;
      patch[i * kPatch + j] = there ? row_at(corner + i * line + j * channels) : Row{};
    }
}

// Transforms the patches of tiles [begin, end) into spread, [36, tiles, C].
void spread_tiles(const float* x, const Tiles& tiles, int64_t channels, int64_t begin, int64_t end, float* spread) {
  const int64_t point = (end - begin) * channels;
  parallel_for(begin, end, kGrain, [&](int64_t first, int64_t last) {
    Row patch[kPoints];
    for (int64_t tile = first; tile < last; ++tile)
      for (int64_t c = 0; c < channels; c += kLanes) {
        read_patch(x + c, tiles, place(tiles, tile), channels, patch);
        spread_patch(patch);
        float* const out = spread + (tile - begin) * channels + c;
        for (int64_t p = 0; p < kPoints; ++p) row_at(out + p * point) = patch[p];
      }
  });
}

// Transforms products [36, tiles, K] back into tiles [begin, end) of y.
void gather_tiles(const float* products, const float* bias, const Tiles& tiles, int64_t channels, int64_t begin, int64_t end,
                  float* y) {
  const int64_t point = (end - begin) * channels, line = tiles.width * channels;
  parallel_for(begin, end, kGrain, [&](int64_t first, int64_t last) {
    Row patch[kPoints], made[kTile * kTile];
    for (int64_t tile = first; tile < last; ++tile) {
      const Place at = place(tiles, tile);
      const int64_t rows = std::min(kTile, tiles.height - at.top), columns = std::min(kTile, tiles.width - at.left);
      for (int64_t c = 0; c < channels; c += kLanes) {
        const float* const in = products + (tile - begin) * channels + c;
        for (int64_t p = 0; p < kPoints; ++p) patch[p] = row_at(in + p * point);
        gather_patch(patch, made);
        const Row added = bias ? row_at(bias + c) : Row{};
        float* const out = y + (at.image * tiles.height + at.top) * line + at.left * channels + c;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < columns; ++j) row_at(out + i * line + j * channels) = made[i * kTile + j] + added;
      }
    }
  });
}

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
