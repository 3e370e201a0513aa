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
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

std::string wrong;      // what is wrong on purpose
bool together = false;  // pieces of work run on threads of their own
int64_t shares = 1;     // pieces that work is cut into
int64_t displaced = 0;  // values by which each buffer misses the alignment of the heap
long long calls = 0, values = 0;

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

using namespace knife;
using Sizes = std::vector<int64_t>;

// A number of 16 bits: what is stored in one type and computed in another.
struct Short {
  uint16_t bits = 0;
  Short() = default;
  explicit Short(float value) : bits(std::bit_cast<uint32_t>(value) >> 16) {}
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};

// Values on the heap, and none beyond them.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t size, const char* use)
      : size_(std::max<int64_t>(0, size - (wrong == use))), values_(new T[size_ + displaced]) {}
  T* data() const { return values_.get() + displaced; }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> values_;
};

std::mt19937 chance;

template <typename T>
Buffer<T> drawn(int64_t size, double low = -2, double high = 2) {
  Buffer<T> buffer(size, "read");
  for (int64_t i = 0; i < buffer.size() - (wrong == "unset"); ++i)
    buffer[i] = static_cast<T>(static_cast<float>(std::uniform_real_distribution(low, high)(chance)));
  return buffer;
}

template <typename T>
Buffer<T> unwritten(int64_t size) {
  return Buffer<T>(size, "write");
}

void expect(bool right, const char* what, double got = 0, double wanted = 0) {
  ++values;
  if (right) return;
  std::fprintf(stderr, "core: %s: %.9g instead of %.9g\n", what, got, wanted);
  std::exit(1);
}

void near(double got, double wanted, double off, const char* what) {
  if (wrong == "sum") wanted += 1;
  expect(std::abs(got - wanted) <= off * (1 + std::abs(wanted)), what, got, wanted);
}

double silu(double z) { return z / (1 + std::exp(-z)); }

double silu_slope(double z) {
  const double s = 1 / (1 + std::exp(-z));
  return s * (1 + z * (1 - s));
}

// --- The step ----------------------------------------------------------------------------------------------------------------

// Where things lie: the dimensions from the outermost to the innermost, and how much wider than needed each is stored.
Sizes strides_of(const Sizes& sizes, const Sizes& order, const Sizes& widths) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = stride;
    stride *= std::max<int64_t>(1, sizes[order[i]] * widths[order[i]]);
  }
  return strides;
}

int64_t extent(const Sizes& sizes, const Sizes& strides) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

// Calls f(image, offset by the first strides, offset by the second) for each pixel.
template <typename F>
void each_pixel(const Sizes& sizes, const Sizes& first, const Sizes& second, const F& f) {
  Sizes index(sizes.size(), 0);
  if (!extent(sizes, first)) return;
  for (size_t d = 0; d < sizes.size();) {
    int64_t a = 0, b = 0;
    for (size_t i = 0; i < sizes.size(); ++i) a += index[i] * first[i], b += index[i] * second[i];
    f(index[0], a, b);
    for (d = 0; d < sizes.size() && ++index[d] == sizes[d]; ++d) index[d] = 0;
  }
}

double stepped(const Settings& by, int64_t image, double x, double eps, double grad, bool guided) {
  const double a = by.alpha_bar[image], b = by.alpha_bar_next[image];
  double e = guided ? eps - by.scale[image] * std::sqrt(1 - a) * grad : eps;
  double x0 = (x - std::sqrt(1 - a) * e) / std::sqrt(a);
  if (x0 < by.low || x0 > by.high) {
    x0 = std::min(std::max(x0, by.low), by.high);
    e = a < 1 ? (x - std::sqrt(a) * x0) / std::sqrt(1 - a) : e;
  }
  return std::sqrt(b) * x0 + std::sqrt(1 - b) * e;
}

template <bool guided, bool clamped, typename S, typename T>
void step_as(const Sizes& sizes, const Sizes& strides, const Sizes& eps_strides, const Layout& layout, double off) {
  const int64_t images = sizes[0], apart = clamped ? 3 : 1;  // numbers of neighbouring images lie so far apart
  const auto table = [&](double low, double high) { return drawn<double>(images ? (images - 1) * apart + 1 : 0, low, high); };
  const auto from = table(0.1, 1), to = table(0.1, 1), scale = table(0, 3);
  if (images && wrong.empty()) from[0] = 1;  // level 0
  const double limit = clamped ? 0.5 : std::numeric_limits<double>::infinity();
  const Settings settings{{from.data(), apart}, {to.data(), apart}, {scale.data(), apart}, -limit, limit};
  const auto x = drawn<S>(layout.pixels()), grad = drawn<S>(guided ? layout.pixels() : 0);
  const auto eps = drawn<S>(extent(sizes, eps_strides));
  const auto out = unwritten<S>(layout.pixels());
  parallel_for(0, layout.pixels(), 1, [&](int64_t begin, int64_t end) {
    step_pixels<guided, clamped, S, T>(settings, layout, out.data(), x.data(), eps.data(), grad.data(), begin, end);
  });
  ++calls;
  each_pixel(sizes, strides, eps_strides, [&](int64_t image, int64_t at, int64_t eps_at) {
    const double slope = guided ? static_cast<double>(grad[at]) : 0;
    near(out[at], stepped(settings, image, x[at], eps[eps_at], slope, guided), off, "a step");
  });
}

template <typename S, typename T>
void step_in(const Sizes& sizes, const Sizes& strides, const Sizes& eps_strides, const Layout& layout, double off) {
  step_as<false, false, S, T>(sizes, strides, eps_strides, layout, off);
  step_as<false, true, S, T>(sizes, strides, eps_strides, layout, off);
  step_as<true, false, S, T>(sizes, strides, eps_strides, layout, off);
  step_as<true, true, S, T>(sizes, strides, eps_strides, layout, off);
}

// The dimensions with the channels, the second, first or last.
Sizes order_of(size_t dims, bool last) {
  Sizes order{0};
  for (size_t d = last ? 2 : 1; d < dims; ++d) order.push_back(static_cast<int64_t>(d));
  if (last && dims > 1) order.push_back(1);
  return order;
}

void steps() {
  const std::vector<Sizes> shapes{{0, 4, 8, 8}, {1},          {3},           {2, 0},          {1, 1, 1, 1},
                                  {2, 3, 7, 5}, {3, 1, 9, 4}, {2, 8, 4, 17}, {3, 4, 5, 2, 3}, {5, 2}};
  for (const Sizes& sizes : shapes)
    for (const bool last : {false, true})
      for (const std::string eps : {"alike", "slice", "other slice", "one row", "gaps"}) {
        const Sizes order = order_of(sizes.size(), last), plain(sizes.size(), 1);
        Sizes widths = plain, eps_order = eps == "other slice" ? order_of(sizes.size(), !last) : order;
        if (sizes.size() > 1 && eps.ends_with("slice")) widths[1] = 2;
        if (eps == "gaps") widths = Sizes(sizes.size(), 2);
        const Sizes strides = strides_of(sizes, order, plain);
        Sizes eps_strides = strides_of(sizes, eps_order, widths);
        if (eps == "one row") eps_strides.back() = 0;
        const auto layout = plan(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), eps_strides.data());
        if (eps == "alike" || eps == "slice") expect(layout.has_value(), "no walk over a slice");
        if (!layout) continue;
        step_in<float, float>(sizes, strides, eps_strides, *layout, 1e-4);
        step_in<double, double>(sizes, strides, eps_strides, *layout, 1e-12);
        step_in<Short, float>(sizes, strides, eps_strides, *layout, 1e-2);
      }
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

// What a norm takes and gives, and the same in double.
template <typename T>
struct Norm {
  Walk walk;
  bool conditioned;
  int64_t size = walk.images * walk.channels * walk.pixels, pairs = walk.images * walk.channels;
  Buffer<T> x = drawn<T>(size, 1, 7), dy = drawn<T>(size);
  Buffer<T> weight = drawn<T>(2 * walk.channels - 1), bias = drawn<T>(walk.channels);  // weights lie two apart
  Buffer<T> scale = drawn<T>(2 * pairs - walk.channels), shift = drawn<T>(2 * pairs - walk.channels);  // halves of wider rows
  Buffer<T> y = unwritten<T>(size), dx = unwritten<T>(size), dgain = unwritten<T>(pairs), doffset = unwritten<T>(pairs);
  Buffer<T> mean = unwritten<T>(walk.images * walk.groups), rstd = unwritten<T>(walk.images * walk.groups);

  int64_t at(int64_t n, int64_t c, int64_t p) const {
    return walk.last ? (n * walk.pixels + p) * walk.channels + c : (n * walk.channels + c) * walk.pixels + p;
  }
  Affine<T> affine() const {
    const Table<T> none{nullptr, 0, 0}, factors{scale.data(), 2 * walk.channels, 1}, summands{shift.data(), 2 * walk.channels, 1};
    return {{weight.data(), 0, 2}, {bias.data(), 0, 1}, conditioned ? factors : none, conditioned ? summands : none};
  }
  double factor(int64_t n, int64_t c) const { return conditioned ? 1.0 + scale[n * 2 * walk.channels + c] : 1; }
  double gain(int64_t n, int64_t c) const { return weight[2 * c] * factor(n, c); }
  double offset(int64_t n, int64_t c) const {
    return bias[c] * factor(n, c) + (conditioned ? static_cast<double>(shift[n * 2 * walk.channels + c]) : 0);
  }
};

template <typename T>
void compute(const Norm<T>& norm, double eps) {
  const auto both = [&]<bool last>() {
    forward<last>(norm.walk, norm.affine(), eps, norm.x.data(), norm.y.data(), norm.mean.data(), norm.rstd.data());
    backward<last>(norm.walk, norm.affine(), norm.mean.data(), norm.rstd.data(), norm.dy.data(), norm.x.data(), norm.dx.data(),
                   norm.dgain.data(), norm.doffset.data());
  };
  norm.walk.last ? both.template operator()<true>() : both.template operator()<false>();
  calls += 2;
}

// Compares what was made of one group of an image with sums in double.
template <typename T>
void compare(const Norm<T>& norm, int64_t n, int64_t group, double eps, double off) {
  const int64_t first = group * norm.walk.group_channels(), end = first + norm.walk.group_channels(), pixels = norm.walk.pixels;
  const double count = static_cast<double>(norm.walk.group_size());
  const auto total = [&](const auto& f) {
    double sum = 0;
    for (int64_t c = first; c < end; ++c)
      for (int64_t p = 0; p < pixels; ++p) sum += f(c, norm.at(n, c, p));
    return sum;
  };
  const double mean = total([&](int64_t, int64_t i) { return norm.x[i]; }) / count;
  const double variance = total([&](int64_t, int64_t i) { return (norm.x[i] - mean) * (norm.x[i] - mean); }) / count;
  const double rstd = 1 / std::sqrt(variance + eps);
  const auto unit = [&](int64_t i) { return (norm.x[i] - mean) * rstd; };
  const auto z = [&](int64_t c, int64_t i) { return norm.gain(n, c) * unit(i) + norm.offset(n, c); };
  const auto dz = [&](int64_t c, int64_t i) { return norm.dy[i] * silu_slope(z(c, i)); };
  const double pull = total([&](int64_t c, int64_t i) { return norm.gain(n, c) * dz(c, i); }) / count;
  const double tilt = total([&](int64_t c, int64_t i) { return norm.gain(n, c) * dz(c, i) * unit(i); }) / count;
  near(norm.mean[n * norm.walk.groups + group], mean, off, "a mean");
  near(norm.rstd[n * norm.walk.groups + group] / rstd, 1, off, "a deviation");
  for (int64_t c = first; c < end; ++c) {
    double dgain = 0, doffset = 0;
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t i = norm.at(n, c, p);
      near(norm.y[i], silu(z(c, i)), off * (1 + rstd), "a norm");
      near(norm.dx[i], rstd * (norm.gain(n, c) * dz(c, i) - pull - unit(i) * tilt), off * (1 + rstd), "a gradient");
      dgain += dz(c, i) * unit(i), doffset += dz(c, i);
    }
    near(norm.dgain[n * norm.walk.channels + c], dgain, off * std::sqrt(count) * (1 + rstd), "the gradient of a gain");
    near(norm.doffset[n * norm.walk.channels + c], doffset, off * std::sqrt(count), "the gradient of an offset");
  }
}

template <typename T>
void norm_of(const Walk& walk, bool conditioned, double off) {
  const double eps = 0.01;
  const Norm<T> norm{walk, conditioned};
  compute(norm, eps);
  for (int64_t n = 0; n < walk.images; ++n)
    for (int64_t group = 0; group < walk.groups; ++group) compare(norm, n, group, eps, off);
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
        norm_of<float>(walk, conditioned, 2e-5);
        norm_of<double>(walk, conditioned, 1e-12);
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
