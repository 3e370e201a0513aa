// Every kernel of the CPU without torch: on buffers that end where it may no longer read or write, against sums in double.
//
//     c++ -std=c++20 -g -DKNIFE_WITHOUT_TORCH -fsanitize=address,undefined -fno-sanitize-recover=all -I csrc tests/core.cpp
//     ./a.out [all | steps | norms | convolutions] [threads | WRONG]
//
// prints how many calls and values were right; the first that is wrong ends it. `threads` lets pieces of work run side by side,
// for -fsanitize=thread. WRONG makes one thing wrong on purpose, to show that it is seen: `read` and `write` make the buffers for
// that one value too short, `unset` leaves a value of each input unset (valgrind sees it), `overflow` adds one to the largest
// number, `race` counts from several threads at once, `sum` expects another value.
#include <climits>
#include <thread>

#include "core.h"

namespace {

bool together = false;  // pieces of work run on threads of their own
int64_t shares = 1;     // pieces that work is cut into

}  // namespace

// What csrc/threads.h takes from torch.
namespace knife {

inline int64_t get_num_threads() { return shares; }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  const int64_t piece = (end - begin + shares - 1) / shares;
  std::vector<std::thread> team;
  for (; begin < end; begin += piece) {
    const int64_t stop = std::min(begin + piece, end);
    if (together)
      team.emplace_back([&f, begin, stop] {
        f(begin, stop);
        if (wrong == "race") ++values;
      });
    else
      f(begin, stop);
  }
  for (std::thread& member : team) member.join();
}

}  // namespace knife

#include "norm_passes.h"
#include "step_pass.h"
#include "winograd_tiles.h"

namespace {

// --- The step ----------------------------------------------------------------------------------------------------------------

template <bool guided, bool clamped, typename S, typename T>
void step_as(const Sizes& sizes, const Sizes& strides, const Sizes& eps_strides, const Layout& layout, double off) {
  const auto kernel = [&](const Settings& settings, S* out, const S* x, const S* eps, const S* grad) {
    parallel_for(0, layout.pixels(), 1, [&](int64_t begin, int64_t end) {
      step_pixels<guided, clamped, S, T>(settings, layout, out, x, eps, grad, begin, end);
    });
  };
  step_by<guided, clamped, S>(kernel, sizes, strides, eps_strides, layout, off);
}

template <typename S, typename T>
void step_in(const Sizes& sizes, const Sizes& strides, const Sizes& eps_strides, const Layout& layout, double off) {
  step_as<false, false, S, T>(sizes, strides, eps_strides, layout, off);
  step_as<false, true, S, T>(sizes, strides, eps_strides, layout, off);
  step_as<true, false, S, T>(sizes, strides, eps_strides, layout, off);
  step_as<true, true, S, T>(sizes, strides, eps_strides, layout, off);
}

void steps() {
  const std::vector<Sizes> shapes{{0, 4, 8, 8}, {1},          {3},           {2, 0},          {1, 1, 1, 1},
                                  {2, 3, 7, 5}, {3, 1, 9, 4}, {2, 8, 4, 17}, {3, 4, 5, 2, 3}, {5, 2}};
  for (const Sizes& sizes : shapes)
    each_layout(sizes, [&](const Sizes& strides, const Sizes& eps_strides, const Layout& layout) {
      step_in<float, float>(sizes, strides, eps_strides, layout, 1e-4);
      step_in<double, double>(sizes, strides, eps_strides, layout, 1e-12);
      step_in<Short, float>(sizes, strides, eps_strides, layout, 1e-2);
    });
}

void huge_steps() {  // of which only the walk is made
  const int64_t side = int64_t{1} << 20;
  const Sizes sizes{8, 3, side, side}, x{3 * side * side, side * side, side, 1}, slice{6 * side * side, side * side, side, 1};
  const auto layout = plan(4, sizes.data(), x.data(), slice.data());
  expect(layout && layout->pixels() == 24 * side * side && layout->eps_image_stride == slice[0], "a walk over 2^44 pixels");
}

// --- The norm ----------------------------------------------------------------------------------------------------------------

void tiles_cover(const Walk& walk) {
  std::vector<int> seen(static_cast<size_t>(walk.units() * walk.unit_size()));
  for (int64_t unit = 0; unit < walk.units(); ++unit)
    for (int64_t i = 0; i < walk.tiles(); ++i) {
      const Tile tile = walk.tile(unit, i);
      expect(tile.rows >= 1 && tile.rows <= kRows && tile.columns <= walk.columns(), "the size of a tile");
      for (int64_t at = tile.offset; at < tile.offset + tile.rows * tile.columns; ++at) ++seen.at(static_cast<size_t>(at));
    }
  for (const int count : seen) expect(count == 1, "tiles that hold a value", count, 1);
}

void huge_tiles() {
  const int64_t pixels = (int64_t{1} << 33) + 77;
  for (const Walk& walk : {Walk{2, 4, pixels, 2, false}, Walk{2, 4, pixels, 2, true}}) {
    const Tile before = walk.tile(1, walk.tiles() - 2), last = walk.tile(1, walk.tiles() - 1);
    expect(before.offset + before.rows * before.columns == last.offset, "tiles without a gap");
    expect(last.offset + last.rows * last.columns == 2 * walk.unit_size(), "the end of the last tile");
  }
}

template <typename S, typename T>
void norm_of(const Walk& walk, bool conditioned, double off) {
  const double eps = 0.01;
  const Norm<S, T> norm{walk, conditioned};
  const auto both = [&]<bool last>() {
    forward<last>(walk, norm.affine(), eps, norm.x.data(), norm.y.data(), norm.mean.data(), norm.rstd.data());
    backward<last>(walk, norm.affine(), norm.mean.data(), norm.rstd.data(), norm.dy.data(), norm.x.data(), norm.dx.data(),
                   norm.dgain.data(), norm.doffset.data());
  };
  walk.last ? both.template operator()<true>() : both.template operator()<false>();
  calls += 2;
  compare(norm, eps, off);
}

void norms() {
  const std::vector<Sizes> shapes{{1, 1, 1, 1},   {2, 6, 35, 3}, {1, 2, 4355, 1}, {3, 130, 9, 2},  {2, 8, 27, 8},
                                  {4, 12, 1, 4},  {1, 64, 64, 8}, {1, 65, 65, 5}, {1, 2, 63, 1},   {1, 2, 4096, 2},
                                  {1, 1, 4097, 1}, {2, 1, 129, 1}, {1, 128, 3, 32}, {5, 3, 2, 1}};
  for (const Sizes& s : shapes)
    for (const bool last : {false, true}) {
      const Walk walk{s[0], s[1], s[2], s[3], last};
      tiles_cover(walk);
      tiles_cover(walk.by_group());
      for (const bool conditioned : {false, true}) {
        norm_of<float, float>(walk, conditioned, 2e-5);
        norm_of<double, double>(walk, conditioned, 1e-12);
        norm_of<Short, float>(walk, conditioned, 2e-5);
      }
    }
}

void exponentials() {
  for (int i = -8000; i <= 8000; ++i)
    near(exponential(static_cast<float>(i) / 100) / std::exp(i / 100.0), 1, 3e-6, "an exponential");
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float x : {-infinity, infinity, -1e30f, 1e30f, 1e-45f, -0.0f, std::nanf("")})
    expect(std::isfinite(exponential(x)), "an exponential of something odd", exponential(x));
}

// --- The convolution ---------------------------------------------------------------------------------------------------------

constexpr int64_t kLanes = winograd::kLanes, kPoints = winograd::kPoints, kPatch = winograd::kPatch;

// G w G' of 3x3 weights: what multiplies the points of a patch.
void weigh(const double (&w)[3][3], double* out) {
  const double near = std::sqrt(0.5), far = std::sqrt(2.0), points[] = {0, near, -near, far, -far};
  double g[kPatch][3] = {{}, {}, {}, {}, {}, {0, 0, 1}};
  for (int i = 0; i < 5; ++i) {
    double apart = 1;
    for (int j = 0; j < 5; ++j) apart *= j == i ? 1 : points[i] - points[j];
    for (int k = 0; k < 3; ++k) g[i][k] = std::pow(points[i], k) / apart;
  }
  for (int64_t p = 0; p < kPoints; ++p) {
    out[p] = 0;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) out[p] += g[p / kPatch][i] * w[i][j] * g[p % kPatch][j];
  }
}

struct Convolution {
  winograd::Tiles tiles;
  int64_t channels, outputs;
  int64_t pixels = tiles.images * tiles.height * tiles.width;
  Buffer<float> x = drawn<float>(pixels * channels), y = unwritten<float>(pixels * outputs);
  Buffer<float> weight = drawn<float>(outputs * channels * 9, -0.3, 0.3), bias = drawn<float>(outputs);

  // One sum of products, in double.
  double operator()(int64_t image, int64_t row, int64_t column, int64_t k) const {
    double sum = 0;
    for (int64_t i = 0; i < 9; ++i) {
      const int64_t y = row + i / 3 - 1, x = column + i % 3 - 1;
      if (y < 0 || y >= tiles.height || x < 0 || x >= tiles.width) continue;
      const int64_t pixel = ((image * tiles.height + y) * tiles.width + x) * channels;
      for (int64_t c = 0; c < channels; ++c)
        sum += static_cast<double>(weight[(k * channels + c) * 9 + i]) * this->x[pixel + c];
    }
    return sum;
  }
};

// Products of a block of tiles: [36, tiles, C] by [36, C, K].
Buffer<float> multiplied(const Buffer<float>& spread, const std::vector<double>& by, int64_t tiles, int64_t channels,
                         int64_t outputs) {
  Buffer<float> products(kPoints * tiles * outputs, "read");
  for (int64_t row = 0; row < kPoints * tiles; ++row)
    for (int64_t k = 0; k < outputs; ++k) {
      double sum = 0;
      for (int64_t c = 0; c < channels; ++c)
        sum += spread[row * channels + c] * by[((row / tiles) * channels + c) * outputs + k];
      if (row * outputs + k < products.size()) products[row * outputs + k] = static_cast<float>(sum);
    }
  return products;
}

void convolve(const Convolution& of, int64_t block, bool biased) {
  std::vector<double> by(kPoints * of.channels * of.outputs);
  for (int64_t pair = 0; pair < of.outputs * of.channels; ++pair) {
    double w[3][3], points[kPoints];
    for (int64_t i = 0; i < 9; ++i) w[i / 3][i % 3] = of.weight[pair * 9 + i];
    weigh(w, points);
    for (int64_t p = 0; p < kPoints; ++p)
      by[(p * of.channels + pair % of.channels) * of.outputs + pair / of.channels] = points[p];
  }
  for (int64_t begin = 0; begin < of.tiles.count(); begin += block) {
    const int64_t end = std::min(begin + block, of.tiles.count());
    const auto spread = unwritten<float>(kPoints * (end - begin) * of.channels);
    winograd::spread_tiles(of.x.data(), of.tiles, of.channels, begin, end, spread.data());
    const auto products = multiplied(spread, by, end - begin, of.channels, of.outputs);
    winograd::gather_tiles(products.data(), biased ? of.bias.data() : nullptr, of.tiles, of.outputs, begin, end, of.y.data());
    calls += 2;
  }
}

void convolutions() {
  const std::vector<Sizes> shapes{{0, 8, 8, 16, 16}, {1, 1, 1, 16, 32},  {1, 4, 4, 16, 16},  {2, 5, 9, 32, 16},
                                  {1, 6, 6, 16, 48}, {3, 13, 3, 16, 16}, {1, 12, 17, 16, 16}};
  for (const Sizes& s : shapes)
    for (const bool biased : {false, true}) {
      const Convolution of{{s[0], s[1], s[2]}, s[3], s[4]};
      convolve(of, biased ? 5 : 256, biased);
      for (int64_t i = 0; i < of.y.size(); ++i) {
        const int64_t k = i % of.outputs, pixel = i / of.outputs, row = pixel / of.tiles.width;
        const double sum = of(row / of.tiles.height, row % of.tiles.height, pixel % of.tiles.width, k);
        near(of.y[i], sum + (biased ? of.bias[k] : 0), 1e-4, "a convolution");
      }
    }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string which = count > 1 ? arguments[1] : "all";
  if (count > 2) wrong = arguments[2];
  together = wrong == "threads" || wrong == "race";
  if (wrong == "threads") wrong.clear();
  volatile int largest = INT_MAX;
  if (wrong == "overflow") largest = largest + 1;
  for (const int64_t pieces : together ? Sizes{3} : Sizes{1, 1000, 3}) {
    shares = pieces;
    displaced = pieces == 3;
    if (which == "all" || which == "steps") steps();
    if (which == "all" || which == "norms") norms();
    if (which == "all" || which == "convolutions") convolutions();
  }
  huge_steps();
  huge_tiles();
  exponentials();
  std::printf("core: %lld calls, %lld values, all right\n", calls, values);
}
