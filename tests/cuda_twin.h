// CUDA on a CPU, as far as knife's kernels need it: include this, then csrc/*_kernels.h. A thread of a block is a std::thread, a
// barrier is a std::barrier, shared memory is static: blocks run one after the other, in any order. So sanitizers see what a kernel
// does: a place beyond a buffer, and with ThreadSanitizer two threads that meet without a barrier between them.
#pragma once

#include <barrier>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace twin {

inline thread_local dim3 thread_index, block_index, block_size, grid_size;
inline thread_local int barriers = 0;  // that this thread has met in its block
inline int left_out = 0;               // every so many-th barrier is left out on purpose
enum class Order { forwards, backwards, inside_out };
inline Order order = Order::forwards;  // of the blocks
inline long long blocks_run = 0;

// The threads of a block, which wait for one block after the other.
class Team {
 public:
  explicit Team(int size) : inside_(size), outside_(size + 1) {
    for (int i = 0; i < size; ++i)
      members_.emplace_back([this, i] {
        thread_index = {static_cast<unsigned>(i), 0, 0};
        current_ = this;
        for (;;) {
          outside_.arrive_and_wait();
          if (!work_) return;
          barriers = 0;
          work_();
          outside_.arrive_and_wait();
        }
      });
  }
  ~Team() {
    work_ = nullptr;
    outside_.arrive_and_wait();
    for (std::thread& member : members_) member.join();
  }

  void run(std::function<void()> work) {
    work_ = std::move(work);
    outside_.arrive_and_wait();
    outside_.arrive_and_wait();
    ++blocks_run;
  }
  static void wait() { current_->inside_.arrive_and_wait(); }
  int size() const { return static_cast<int>(members_.size()); }

 private:
  static inline thread_local Team* current_ = nullptr;
  std::function<void()> work_;
  std::barrier<> inside_, outside_;
  std::vector<std::thread> members_;
};

inline Team& team(int size) {
  static std::unique_ptr<Team> team;
  if (!team || team->size() != size) {
    team.reset();
    team = std::make_unique<Team>(size);
  }
  return *team;
}

// Which block comes as the i-th of `count`.
inline int64_t in_turn(int64_t i, int64_t count) {
  if (order == Order::backwards) return count - 1 - i;
  if (order == Order::inside_out) return (count / 2 + i) % count;
  return i;
}

// Runs a kernel on a grid of blocks.
template <typename Kernel, typename... Arguments>
void launch(dim3 grid, int threads, const Kernel& kernel, const Arguments&... arguments) {
  const int64_t count = int64_t{grid.x} * grid.y;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = in_turn(i, count);
    team(threads).run([&] {
      block_index = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x), 0};
      block_size = {static_cast<unsigned>(threads), 1, 1};
      grid_size = grid;
      kernel(arguments...);
    });
  }
}

}  // namespace twin

#define threadIdx twin::thread_index
#define blockIdx twin::block_index
#define blockDim twin::block_size
#define gridDim twin::grid_size

inline void __syncthreads() {
  if (twin::left_out == 0 || ++twin::barriers % twin::left_out != 0) twin::Team::wait();
}
