// The CUDA kernels of the norm and of the step on a CPU (cuda_twin.h): on buffers that end where they may no longer read or
// write, against sums in double, with blocks in several orders.
//
//     c++ -std=c++20 -g -pthread -fsanitize=address,undefined -fno-sanitize-recover=all -DKNIFE_NORM_THREADS=24
//         -DKNIFE_STEP_THREADS=24 -I csrc tests/cuda_core.cpp
//     ./a.out [all | steps | norms] [few | WRONG]
//
// prints how many calls, blocks and values were right; the first that is wrong ends it. A block has as many threads as the macros
// say; without them as many as on a GPU, which takes long: for that `few`, which leaves most shapes out. WRONG makes one thing
// wrong on purpose, to show that it is seen: `read` and `write` make the buffers for that one value too short, `room` those
// between two launches, `sum` expects another value, `barrier` leaves out every second barrier and compares nothing:
// ThreadSanitizer is to see it.
#include "cuda_twin.h"

#include <set>

#include "core.h"
#include "norm_kernels.h"
#include "step_kernels.h"

namespace {

bool few = false;             // of the shapes
std::set<std::string> taken;  // kernels of the norm and ways to launch them that were compared

// --- The step ----------------------------------------------------------------------------------------------------------------

template <bool guided, bool clamped, int width, typename S, typename T>
void step_as(const Sizes& sizes, const Sizes& strides, const Sizes& eps_strides, const Layout& layout, int processors,
             double off) {
  const auto kernel = [&](const Settings& settings, S* out, const S* x, const S* eps, const S* grad) {
    if (layout.pixels() == 0) return;
    const StepGrid grid = step_grid(layout, width, processors);
    expect(grid.x >= 1 && grid.y >= 1 && grid.y <= kMaxGridY, "a grid");
    const int64_t rows = processors == 1 ? 2 : grid.y;  // blocks that take several images, as of more than 65535
    twin::launch({static_cast<unsigned>(grid.x), static_cast<unsigned>(rows)}, kStepThreads,
                 step_kernel<guided, clamped, width, S, T>, out, x, eps, grad, layout, settings);
  };
  step_by<guided, clamped, S>(kernel, sizes, strides, eps_strides, layout, off);
}

template <int width, typename S, typename T>
void step_in(const Sizes& sizes, const Sizes& strides, const Sizes& eps_strides, const Layout& layout, double off) {
  if (!rows_fit(layout, width) || (displaced && width > 1)) return;
  const int processors = sizes[0] > 2 ? 1 : 132;
  step_as<false, true, width, S, T>(sizes, strides, eps_strides, layout, processors, off);
  if (few) return;
  step_as<true, false, width, S, T>(sizes, strides, eps_strides, layout, processors, off);
}

void steps() {
  std::vector<Sizes> shapes{{2, 3, 7, 5}, {3, 2, 8, 4}};
  if (!few) shapes.insert(shapes.end(), {{0, 4, 8, 8}, {1}, {2, 8, 3, 16}, {3, 1, 9, 4}, {4, 4, 8, 24}, {3, 8, 5, 2, 3}, {5, 2}});
  for (const Sizes& sizes : shapes)
    each_layout(sizes, [&](const Sizes& strides, const Sizes& eps_strides, const Layout& layout) {
      step_in<4, float, float>(sizes, strides, eps_strides, layout, 1e-4);
      step_in<1, float, float>(sizes, strides, eps_strides, layout, 1e-4);
      step_in<2, double, double>(sizes, strides, eps_strides, layout, 1e-12);
      step_in<8, Short, float>(sizes, strides, eps_strides, layout, 1e-2);
    });
}

// --- How a norm is shared out ------------------------------------------------------------------------------------------------

// Whether every value of a unit lies in one slab, no slab is empty, and the threads of a block can take it.
void expect_cover(const Slabs& slabs) {
  const Walk& walk = slabs.walk;
  expect(slabs.parts >= 1 && walk.groups % slabs.parts == 0, "groups in whole units");
  expect(slabs.unit_groups * slabs.parts == walk.groups && slabs.unit_channels * slabs.parts == walk.channels, "whole units");
  expect(slabs.columns * slabs.rows * slabs.width == slabs.unit_channels * walk.pixels, "units of whole packs");
  expect((slabs.column_pieces - 1) * slabs.column_run < slabs.columns, "no slab without a column");
  expect((slabs.row_pieces - 1) * slabs.row_run < slabs.rows, "no slab without a row");
  expect(slabs.column_pieces * slabs.column_run >= slabs.columns && slabs.row_pieces * slabs.row_run >= slabs.rows, "no gap");
  expect(!walk.last || slabs.column_pieces == 1, "slabs of all channels");
  int64_t held = 0;
  for (int slab = 0; slab < slabs.count(); ++slab) held += slabs.values(slab);
  expect(held == walk.group_size(), "values of a group", static_cast<double>(held), static_cast<double>(walk.group_size()));
  expect(slabs.columns_at_once >= 1 && slabs.rows_at_once >= 1 && slabs.columns_at_once * slabs.rows_at_once <= kNormThreads,
         "threads of a block");
  expect(slabs.columns_at_once * slabs.lane_channels() <= kChunk, "channels in shared memory");
  expect(slabs.unit_groups == 1 || (slabs.columns <= slabs.columns_at_once && slabs.unit_groups <= kNormThreads), "one chunk");
}

// Of networks as they are, and of what none has, on several GPUs: no block takes too much or too little.
void shares() {
  const std::vector<Sizes> features{{128, 256 * 256, 32}, {192, 64 * 64, 32}, {256, 32 * 32, 32}, {512, 8 * 8, 32},  // networks
                                    {130, 77, 2},         {4099, 5, 4099},    {515 * 8, 9, 8},    {3, 1 << 20, 1},
                                    {8, 1, 4},            {100000, 1, 1},     {1, 1, 1},          {64, int64_t{1} << 33, 4}};
  for (const int processors : {1, 40, 108, 132, 148})
    for (const int bytes : {2, 4, 8})
      for (const bool aligned : {true, false})
        for (const bool last : {true, false})
          for (const int64_t images : {1, 2, 16, 64, 3000})
            for (const Sizes& s : features) {
              const Slabs slabs = share_out({images, s[0], s[1], s[2], last}, bytes, aligned, processors);
              expect(slabs.width == 1 || (aligned && slabs.width * bytes <= 16), "a pack");
              if (slabs.count() < 1 << 20) expect_cover(slabs);
              const auto taken = static_cast<double>(turns(slabs));
              expect(slabs.whole() || taken <= 2 * kMost, "packs that a thread takes", taken, kMost);
              const int64_t waves = ceil_divide(slabs.blocks(), int64_t{processors} * kNormBlocks);
              expect(slabs.whole() || waves == 1 || taken >= kFewest, "waves of small slabs", taken, kFewest);
            }
}

// The largest features of a translation, [N, 128, 256, 256] in bfloat16, on an H100: whole lines, and blocks that fill it.
void share_of_a_translation() {
  for (const int64_t images : {1, 2, 5, 16}) {
    const Slabs slabs = share_out({images, 128, 256 * 256, 32, true}, 2, true, 132);
    expect(slabs.width == 8 && slabs.parts == 2, "units with lines of 128 bytes", static_cast<double>(slabs.parts), 2);
    const double waves = static_cast<double>(slabs.blocks()) / (132 * kNormBlocks);
    expect(waves > 0.9 * std::ceil(waves), "whole waves of blocks", waves, std::ceil(waves));
  }
}

// --- The norm ----------------------------------------------------------------------------------------------------------------

const auto run = [](int64_t blocks, const auto& kernel, const auto&... arguments) {
  twin::launch({static_cast<unsigned>(blocks), 1}, kNormThreads, kernel, arguments...);
};

// Between two launches there is room for these and no more; like all that torch allocates it is aligned.
template <typename T>
std::unique_ptr<T[]> room(int64_t size) {
  return std::make_unique_for_overwrite<T[]>(static_cast<size_t>(std::max<int64_t>(0, size - (wrong == "room"))));
}

template <int width, typename S, typename T>
void compute(const Norm<S, T>& norm, const Slabs& slabs, double eps) {
  const auto left = room<T>(slabs.group_numbers());
  launch_forward<width>(run, slabs, norm.affine(), eps, norm.x.data(), norm.y.data(), norm.mean.data(), norm.rstd.data(),
                        left.get());
  const auto more = room<T>(slabs.group_numbers() + slabs.channel_numbers());
  launch_backward<width>(run, slabs, norm.affine(), norm.mean.data(), norm.rstd.data(), norm.dy.data(), norm.x.data(),
                         norm.dx.data(), norm.dgain.data(), norm.doffset.data(), more.get());
  calls += 2;
}

template <typename S>
double total(const Buffer<S>& buffer) {
  double sum = 0;
  for (int64_t i = 0; i < buffer.size(); ++i) sum = sum * 0.75 + static_cast<double>(buffer[i]);
  return sum;
}

template <int width, typename S, typename T>
void norm_as(const Slabs& slabs, bool conditioned, double off) {
  const double eps = 0.01;
  const Norm<S, T> norm{slabs.walk, conditioned};
  std::vector<double> first;
  for (const twin::Order order : {twin::Order::forwards, slabs.blocks() % 2 ? twin::Order::backwards : twin::Order::inside_out}) {
    if (order != twin::Order::forwards && slabs.blocks() == 1) continue;
    twin::order = order;
    compute<width>(norm, slabs, eps);
    const std::vector<double> all{total(norm.y),  total(norm.mean),  total(norm.rstd),
                                  total(norm.dx), total(norm.dgain), total(norm.doffset)};
    if (first.empty()) first = all;
    expect(all == first, "the same in another order of the blocks");
  }
  twin::order = twin::Order::forwards;
  compare(norm, eps, off);
}

template <typename S, typename T>
void norm_of(const Walk& walk, bool conditioned, int processors, double off) {
  const bool aligned = displaced == 0;
  const Slabs slabs = share_out(walk, sizeof(S), aligned, processors);
  expect_cover(slabs);
  taken.insert(std::to_string(sizeof(S)) + (walk.last ? " last " : " first ") + (slabs.whole() ? "whole " : "cut ") +
               std::to_string(slabs.width));
  constexpr int widest = 16 / sizeof(S);
  if (slabs.width == 1) return norm_as<1, S, T>(slabs, conditioned, off);
  if (slabs.width == widest) return norm_as<widest, S, T>(slabs, conditioned, off);
  if constexpr (widest > 4) norm_as<4, S, T>(slabs, conditioned, off);
}

void norms() {
  std::vector<Sizes> shapes{{2, 32, 60, 4}, {1, 4, 640, 2}};  // images, channels, pixels, groups
  if (!few)
    shapes.insert(shapes.end(), {{1, 1, 1, 1}, {2, 6, 35, 3}, {1, 2, 3000, 1}, {3, 130, 9, 2}, {2, 8, 27, 8}, {4, 12, 1, 4},
                                 {1, 2, 63, 1}, {1, 64, 64, 8}, {1, 4, 2048, 1}, {1, 64, 260, 16}, {1, 48, 100, 8},
                                 {1, 300, 6, 1}, {5, 3, 2, 1}, {3, 24, 5, 24}, {1, 1000, 4, 2}, {2, 128, 48, 32}});
  for (const Sizes& s : shapes)
    for (const bool last : {false, true}) {
      if (displaced && s[1] % 3 != 2) continue;
      const Walk walk{s[0], s[1], s[2], s[3], last};
      const int processors = s[2] % 2 ? 3 : 7;
      norm_of<Short, float>(walk, s[1] % 4 != 0, processors, 2e-5);
      if (!few) norm_of<double, double>(walk, s[1] % 8 == 0, processors, 1e-12);
      if (!displaced) norm_of<float, float>(walk, s[1] % 4 == 0, processors, 2e-5);
    }
}

// A group that begins with a value far from all others, which lie far from 0: sums around any of them would cancel.
void far_from_zero() {
  for (const bool last : {false, true}) {
    const Walk walk{1, 8, few ? 256 : 4096, 2, last};
    const Norm<float, float> norm{walk, false};
    for (int64_t i = 0; i < norm.x.size(); ++i) norm.x[i] = 1000 + norm.x[i];
    norm.x[0] = 1200;
    const Slabs slabs = share_out(walk, sizeof(float), true, 16);
    compute<4>(norm, slabs, 1e-5);
    double sum = 0, squares = 0;
    const auto each = [&](const auto& f) {
      for (int64_t c = 0; c < 4; ++c)
        for (int64_t p = 0; p < walk.pixels; ++p) f(norm.x[norm.at(0, c, p)]);
    };
    each([&](double x) { sum += x; });
    const double count = static_cast<double>(walk.group_size()), mean = sum / count;
    each([&](double x) { squares += (x - mean) * (x - mean); });
    near(norm.mean[0] / mean, 1, 1e-6, "a mean far from 0");
    near(norm.rstd[0] * std::sqrt(squares / count), 1, 1e-5, "a deviation far from 0");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string which = count > 1 ? arguments[1] : "all";
  if (count > 2) wrong = arguments[2];
  few = !wrong.empty();
  if (wrong == "few") wrong.clear();
  if (wrong == "barrier") twin::left_out = 2;
  shares();
  share_of_a_translation();
  for (const int64_t values : {0, 1}) {
    displaced = values;
    if (few && displaced) continue;
    if (which == "all" || which == "steps") steps();
    if (which == "all" || which == "norms") norms();
  }
  displaced = 0;
  if (which == "all" || which == "norms") far_from_zero();
  if (which != "steps" && !few) expect(taken.size() == 28, "kinds of norms", static_cast<double>(taken.size()), 28);
  std::printf("core: %lld calls, %lld blocks, %lld values, all right\n", calls, twin::blocks_run, values);
}
