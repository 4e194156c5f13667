// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA kernel's C++ on one CPU thread: each CUDA thread is a fiber, and after every step the
// next fiber is drawn at random (by seed) from all that can run, in all resident blocks, one of
// which is slow. So two threads are in order only if the kernel orders them, and a missing barrier
// shows as a wrong or poisoned value.
//
// Reported by name instead of hanging or passing: lanes of a warp that meet in different
// operations, barriers and warp operations that not everyone reaches, deadlock, endless waiting,
// shared memory overrun (its end lies on a page that faults), copies still under way at exit.
//
// Not modelled: the memory model's weaker orders (fibers see one order of all writes), time,
// occupancy, bank conflicts. Fences are therefore not checked by running here.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emu {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  uint64_t seed = 0;
  int resident_blocks =
      3;  // that run side by side; a grid whose blocks wait for each other needs all
  uint64_t most_steps_without_progress = 2'000'000;
  uint64_t most_polls_without_change = 3'000'000;
  unsigned slow_block_one_in = 4;  // one block of each grid runs that much more slowly
  unsigned slow_warp_one_in = 1;   // and one warp of each block, the same one of all
};
inline Options options;

struct Thread;

// One operation that several threads take part in: the last to arrive does it for all.
struct Meeting {
  const void* operation = nullptr;
  const char* name = "";
  uint32_t mask = 0;
  int arrived = 0;
  std::vector<Thread*> waiting;
  void* arguments[32] = {};
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  std::vector<Thread*> waiting;
};

struct AsyncCopy {
  char* to;
  const char* from;
  unsigned bytes, from_bytes;  // the rest is zeros
};

// One wgmma of one lane: its sums and weights, and the descriptor of the tokens.
struct Wgmma {
  float* d;
  uint32_t a[4];
  uint64_t tokens;
  bool adds;
  bool e4m3;  // else bf16
};

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  dim3 index;
  int linear = 0, lane = 0;
  bool done = false, blocked = false;
  std::vector<AsyncCopy> uncommitted;
  std::vector<std::vector<AsyncCopy>> groups;
  std::vector<Wgmma> wgmma;
  std::vector<std::vector<Wgmma>> wgmma_groups;
  size_t wgmma_count = 0;
  bool wgmma_fenced = false;
  std::vector<uint32_t> written;  // 16-byte pieces of shared memory, since its last fence
};

// A block's dynamic shared memory: its last byte is the last before a page that faults, and all of
// it starts as 0xff, which is NaN as bf16, fp16 and fp32 and -1 as an integer.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    const size_t page = size_t(getpagesize());
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) abort();
    data_ = base_ + mapped_ - page - (bytes + 127) / 128 * 128;  // kernels rely on the alignment
    std::memset(data_, 0xff, size_t(base_ + mapped_ - page - data_));
  }
  ~SharedMemory() { munmap(base_, mapped_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // The bytes between the end and the page are still as they were.
  bool rim_is_whole() const {
    for (size_t i = bytes_; i < (bytes_ + 127) / 128 * 128; ++i) {
      if (data_[i] != char(0xff)) return false;
    }
    return true;
  }

 private:
  size_t bytes_, mapped_;
  char *base_, *data_;
};

struct Block {
  dim3 index;
  uint64_t number = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Meeting> warps;
  NamedBarrier barriers[16];
  std::unique_ptr<SharedMemory> shared;
  std::vector<std::function<void()>> bulk_copies;  // under way
  // By 16-byte piece of shared memory: the thread that wrote it, whom wgmma must not overtake; -1.
  // Empty until the block sets barriers.
  std::vector<int> unfenced;
  std::map<size_t, std::vector<uint64_t>> wgmma_issued;  // descriptors, by warpgroup
  int alive = 0;
};

class Grid;
inline Thread* current = nullptr;  // the CUDA thread that runs now
inline Grid* grid = nullptr;

class Grid {
 public:
  dim3 grid_dim, block_dim;
  uint64_t steps = 0;

  Grid(dim3 g, dim3 b, size_t shared_bytes, std::function<void()> body)
      : grid_dim(g), block_dim(b), shared_bytes_(shared_bytes), body_(std::move(body)) {
    random_.seed(options.seed * 0x9e3779b97f4a7c15u + 1);
    slow_block_ = random_() % (uint64_t(g.x) * g.y * g.z);
    if (g.x * g.y * g.z == 1) slow_block_ = kNone;  // there is nobody to be slower than
    slow_warp_ = random_() % ((uint64_t(b.x) * b.y * b.z + 31) / 32);
  }

  void run() {
    Grid* const before = grid;
    grid = this;
    const uint64_t blocks = uint64_t(grid_dim.x) * grid_dim.y * grid_dim.z;
    std::vector<std::unique_ptr<Block>> resident;
    uint64_t next = 0;
    while (failure_.empty() && (next < blocks || !resident.empty())) {
      while (next < blocks && int(resident.size()) < options.resident_blocks) {
        resident.push_back(start_block(next++));
      }
      if (ready_.empty()) {
        failure_ = "deadlock: " + describe(resident);
        break;
      }
      Block* const block = step();
      if (block->alive == 0 && failure_.empty()) {
        end_block(*block);
        std::erase_if(resident, [&](auto& b) { return b.get() == block && recycle(*b); });
      }
    }
    grid = before;
    current = nullptr;
    if (!failure_.empty()) throw Failure(failure_);
  }

  // Called on a fiber.
  void yield() { current->fiber.leave(); }
  void block_current() {
    current->blocked = true;
    current->fiber.leave();
  }
  void wake(std::vector<Thread*>& threads) {
    for (Thread* t : threads) {
      t->blocked = false;
      ready_.push_back(t);
    }
    threads.clear();
    last_progress_ = steps;
  }
  // A counter that threads wait for was looked at, or changed.
  void polled() {
    if (++polls_ > options.most_polls_without_change) {
      fail("livelock: threads poll a counter that nobody changes");
    }
  }
  void changed() {
    polls_ = 0;
    last_progress_ = steps;
  }
  bool chance(unsigned one_in) { return random_() % one_in == 0; }
  size_t below(size_t n) { return size_t(random_() % n); }
  [[noreturn]] void fail(const std::string& what) {
    const dim3 b = current->block->index;
    if (failure_.empty()) {
      failure_ = "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " +
                 std::to_string(b.z) + ") thread " + std::to_string(current->linear) + ": " + what;
    }
    current->done = true;
    current->fiber.leave();
    abort();
  }

 private:
  static void entry() {
    try {
      grid->body_();
      if (!current->uncommitted.empty() || !current->groups.empty()) {
        grid->fail("exits with cp.async copies that it has not waited for");
      }
      if (!current->wgmma.empty() || !current->wgmma_groups.empty()) {
        grid->fail("exits with wgmma that it has not waited for");
      }
    } catch (const std::exception& e) {
      grid->fail(e.what());
    }
    current->done = true;
    current->fiber.leave();
    abort();
  }

  std::unique_ptr<Block> start_block(uint64_t number) {
    auto block = std::make_unique<Block>();
    block->number = number;
    block->index = dim3(unsigned(number % grid_dim.x), unsigned(number / grid_dim.x % grid_dim.y),
                        unsigned(number / grid_dim.x / grid_dim.y));
    const int threads = int(block_dim.x * block_dim.y * block_dim.z);
    block->alive = threads;
    block->warps.resize(size_t(threads + 31) / 32);
    block->shared = std::make_unique<SharedMemory>(shared_bytes_);
    for (int i = 0; i < threads; ++i) {
      std::unique_ptr<Thread> t;
      if (spare_.empty()) {
        t = std::make_unique<Thread>();
      } else {
        t = std::move(spare_.back());
        spare_.pop_back();
      }
      t->block = block.get();
      t->linear = i;
      t->lane = i % 32;
      t->index = dim3(unsigned(i) % block_dim.x, unsigned(i) / block_dim.x % block_dim.y,
                      unsigned(i) / block_dim.x / block_dim.y);
      t->done = t->blocked = false;
      t->uncommitted.clear();
      t->groups.clear();
      t->wgmma.clear();
      t->wgmma_groups.clear();
      t->wgmma_count = 0;
      t->wgmma_fenced = false;
      t->written.clear();
      t->fiber.start(entry);
      ready_.push_back(t.get());
      block->threads.push_back(std::move(t));
    }
    return block;
  }

  Block* step() {
    size_t i = random_() % ready_.size();
    const auto waits = [this](const Thread& t) {
      return (t.block->number == slow_block_ && !chance(options.slow_block_one_in)) ||
             (uint64_t(t.linear) / 32 == slow_warp_ && !chance(options.slow_warp_one_in));
    };
    for (int again = 0; again < 8 && waits(*ready_[i]); ++again) i = random_() % ready_.size();
    Thread* const t = ready_[i];
    ready_[i] = ready_.back();
    ready_.pop_back();
    current = t;
    ++steps;
    t->fiber.enter();
    if (t->done) {
      --t->block->alive;
      last_progress_ = steps;
    } else if (!t->blocked) {
      ready_.push_back(t);
      if (steps - last_progress_ > options.most_steps_without_progress) {
        failure_ = "livelock: threads poll and nothing happens any more";
      }
    }
    return t->block;
  }

  void end_block(const Block& block) {
    for (const Meeting& w : block.warps) {
      if (w.arrived) failure_ = std::string("threads exited while others wait in ") + w.name;
    }
    if (!block.bulk_copies.empty()) failure_ = "the block ended with bulk copies under way";
    if (!block.shared->rim_is_whole()) failure_ = "shared memory was written past its end";
  }

  bool recycle(Block& block) {
    for (auto& t : block.threads) spare_.push_back(std::move(t));
    return true;
  }

  std::string describe(const std::vector<std::unique_ptr<Block>>& resident) const {
    std::string s;
    for (const auto& b : resident) {
      s += "block (" + std::to_string(b->index.x) + ", " + std::to_string(b->index.y) + "):";
      s += " " + std::to_string(int(b->threads.size()) - b->alive) + " threads exited;";
      for (int k = 0; k < 16; ++k) {
        if (b->barriers[k].arrived) {
          s += " barrier " + std::to_string(k) + " has " + std::to_string(b->barriers[k].arrived) +
               " of " + std::to_string(b->barriers[k].expected) + ";";
        }
      }
      for (size_t w = 0; w < b->warps.size(); ++w) {
        if (b->warps[w].arrived) {
          s += " warp " + std::to_string(w) + " has " + std::to_string(b->warps[w].arrived) +
               " lanes in " + b->warps[w].name + ";";
        }
      }
    }
    return s;
  }

  size_t shared_bytes_;
  std::function<void()> body_;
  std::mt19937_64 random_;
  std::vector<Thread*> ready_;
  std::string failure_;
  static constexpr uint64_t kNone = ~uint64_t(0);
  uint64_t last_progress_ = 0, slow_block_ = 0, slow_warp_ = 0, polls_ = 0;
  inline static std::vector<std::unique_ptr<Thread>> spare_;  // stacks are dear to make
};

inline void barrier(int id, int expected) {
  NamedBarrier& b = current->block->barriers[id];
  if (b.arrived && b.expected != expected) {
    grid->fail("barrier " + std::to_string(id) + " is used with two thread counts");
  }
  b.expected = expected;
  if (++b.arrived == expected) {
    b.arrived = 0;
    grid->wake(b.waiting);
    grid->yield();
    return;
  }
  b.waiting.push_back(current);
  grid->block_current();
}

// All lanes of the mask must come here with the same operation. do_it(arguments by lane) runs once.
template <class Arguments, class Fn>
void meet(uint32_t mask, Arguments& mine, const char* name, Fn&& do_it) {
  static const char operation = 0;  // one address for each kind of operation
  Thread* const t = current;
  Meeting& m = t->block->warps[size_t(t->linear) / 32];
  if (!(mask >> t->lane & 1))
    grid->fail(std::string(name) + ": the calling lane is not in the mask");
  if (m.arrived == 0) {
    m.operation = &operation;
    m.name = name;
    m.mask = mask;
  } else if (m.operation != &operation || m.mask != mask) {
    grid->fail(std::string("lanes of one warp meet in ") + m.name + " and in " + name);
  }
  m.arguments[t->lane] = &mine;
  if (++m.arrived == std::popcount(mask)) {
    m.arrived = 0;
    do_it(reinterpret_cast<Arguments**>(m.arguments));
    grid->wake(m.waiting);
    grid->yield();
    return;
  }
  m.waiting.push_back(t);
  grid->block_current();
}

}  // namespace emu
