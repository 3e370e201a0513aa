// CUDA on a CPU, as far as knife's kernels need it: include this, then csrc/*_kernels.h. A thread of a block is a std::thread,
// shared memory is static: blocks run one after the other, in any order. So sanitizers see what a kernel does: a place beyond a
// buffer, and with ThreadSanitizer two threads that meet without a barrier between them.
#pragma once

#include <atomic>
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

// Not std::barrier, where threads that leave one may also meet those that arrive at another: that would hide races. Four of these
// side by side have places of their own in the table that std::atomic keeps of who waits.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    const int phase = phase_.load();
    if (arrived_.fetch_add(1) + 1 == size_) {
      arrived_.store(0);
      phase_.fetch_add(1);
      phase_.notify_all();
    } else {
      while (phase_.load() == phase) phase_.wait(phase);
    }
  }

 private:
  int size_;
  std::atomic<int> arrived_ = 0, phase_ = 0;
};

// The threads of a block, which wait for one block after the other.
class Team {
 public:
  explicit Team(int size) : even_(size), odd_(size), begin_(size + 1), end_(size + 1) {
    for (int i = 0; i < size; ++i)
      members_.emplace_back([this, i] {
        thread_index = {static_cast<unsigned>(i), 0, 0};
        current_ = this;
        for (;;) {
          begin_.wait();
          if (!work_) return;
          barriers = 0;
          work_();
          end_.wait();
        }
      });
  }
  ~Team() {
    work_ = nullptr;
    begin_.wait();
    for (std::thread& member : members_) member.join();
  }

  void run(std::function<void()> work) {
    work_ = std::move(work);
    begin_.wait();
    end_.wait();
    ++blocks_run;
  }
  // A thread may arrive at the next barrier before others have left this one, so there are two.
  static void wait(int turn) { (turn % 2 ? current_->odd_ : current_->even_).wait(); }
  int size() const { return static_cast<int>(members_.size()); }

 private:
  static inline thread_local Team* current_ = nullptr;
  std::function<void()> work_;
  Barrier even_, odd_, begin_, end_;
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
  const int met = ++twin::barriers;
  if (twin::left_out == 0) return twin::Team::wait(met);
  if (met % twin::left_out != 0) twin::Team::wait(met / twin::left_out);
}
