// SPDX-License-Identifier: Apache-2.0
#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../futex.h"

namespace ey::cpu {
namespace {

// Long enough to bridge the gap between two MoE layers of a decode step, short enough that an idle
// process is seen as idle.
constexpr auto kSpinTime = std::chrono::microseconds(100);

}  // namespace

void Event::advance() {
  // seq_cst on both sides: either the waiter sees the new value, or we see the waiter.
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex_wake_all(value_);
}

void Event::wait_while(uint32_t value) {
  const auto give_up = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 64; ++i) {
      if (value_.load(std::memory_order_acquire) != value) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < give_up);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == value) futex_wait(value_, value);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

Tasks::Run Tasks::take(int64_t total, int64_t longest, int threads) {
  int64_t begin = next_.load(std::memory_order_relaxed);
  for (;;) {
    if (begin >= total) return {total, total};
    const int64_t run = std::clamp<int64_t>((total - begin) / (threads * 4), 1, longest);
    const int64_t end = std::min(begin + run, total);
    if (next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) return {begin, end};
  }
}

void Tasks::finish(int64_t tasks, int64_t total) {
  if (tasks == 0) return;
  if (done_.fetch_add(tasks, std::memory_order_acq_rel) + tasks == total) over_.advance();
}

void Tasks::wait(int64_t total) {
  if (done_.load(std::memory_order_acquire) < total) over_.wait_while(0);
}

namespace {

struct Worker {
  alignas(64) Event go;
  std::thread thread;
};

// Who is in a run. A worker may enter while it is open; the caller closes it when no task is left,
// and returns when the last worker has gone.
class Door {
 public:
  void open() { inside_.store(0, std::memory_order_release); }
  bool enter() {
    uint32_t inside = inside_.load(std::memory_order_relaxed);
    while ((inside & kClosed) == 0) {
      if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acquire)) return true;
    }
    return false;
  }
  void leave() {
    if (inside_.fetch_sub(1, std::memory_order_acq_rel) == (kClosed | 1)) empty_.advance();
  }
  void close() {
    const uint32_t round = empty_.value();
    if (inside_.fetch_or(kClosed, std::memory_order_acq_rel) != 0) empty_.wait_while(round);
  }

 private:
  static constexpr uint32_t kClosed = 1u << 31;
  alignas(64) std::atomic<uint32_t> inside_{kClosed};
  alignas(64) Event empty_;
};

class Pool {
 public:
  void run(int n, TeamFunction function, void* context) {
    const std::lock_guard<std::mutex> one_run_at_a_time(mutex_);
    n = 1 + grow(n - 1);
    function_ = function;
    context_ = context;
    threads_ = n;
    door_.open();
    for (int i = 1; i < n; ++i) workers_[i - 1]->go.advance();
    function(context, 0, n);
    door_.close();
  }

 private:
  // Makes workers up to n; fewer if the system refuses more threads. Returns how many may be used.
  int grow(int n) {
    try {
      while (static_cast<int>(workers_.size()) < n) {
        auto worker = std::make_unique<Worker>();
        const int index = static_cast<int>(workers_.size()) + 1;
        worker->thread = std::thread([this, w = worker.get(), index] { serve(*w, index); });
        workers_.push_back(std::move(worker));
      }
    } catch (const std::system_error&) {
    }
    return std::min(n, static_cast<int>(workers_.size()));
  }

  void serve(Worker& self, int index) {
    for (uint32_t seen = 0;;) {
      self.go.wait_while(seen);
      seen = self.go.value();
      if (!door_.enter()) continue;  // too late: the run is over
      // A worker that was called to an earlier run may find itself in a smaller one.
      if (index < threads_) function_(context_, index, threads_);
      door_.leave();
    }
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
  TeamFunction function_ = nullptr;
  void* context_ = nullptr;
  int threads_ = 0;
  Door door_;
};

// Never destroyed: at exit its workers are asleep in it, and a forked child has none to join.
std::atomic<Pool*> pool{nullptr};
std::once_flag fork_handler;

Pool& the_pool() {
  std::call_once(fork_handler, [] { pthread_atfork(nullptr, nullptr, [] { pool = nullptr; }); });
  Pool* p = pool.load(std::memory_order_acquire);
  if (p == nullptr) {
    auto* fresh = new Pool;
    if (pool.compare_exchange_strong(p, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *p;
}

thread_local LentTeam lent = nullptr;

}  // namespace

void lend_team(LentTeam team) { lent = team; }

void run_team(int n, TeamFunction function, void* context) {
  if (n <= 1) return function(context, 0, 1);
  if (lent != nullptr) return lent(n, function, context);
  the_pool().run(n, function, context);
}

namespace {

bool read_line(const std::string& path, char* line, int size) {
  std::FILE* file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return false;
  const bool ok = std::fgets(line, size, file) != nullptr;
  std::fclose(file);
  return ok;
}

// The smallest quota on the way from the root to this process's cgroup, in CPUs; 0: none.
int cgroup_cpus() {
  double cpus = INFINITY;
  char line[4096];
  std::FILE* file = std::fopen("/proc/self/cgroup", "re");
  if (file == nullptr) return 0;
  while (std::fgets(line, sizeof line, file) != nullptr) {  // "id:controllers:/path"
    line[std::strcspn(line, "\n")] = 0;
    char* controllers = std::strchr(line, ':');
    if (controllers == nullptr) continue;
    char* path = std::strchr(++controllers, ':');
    if (path == nullptr) continue;
    *path++ = 0;
    const bool v2 = *controllers == 0;
    path[-1] = ',';  // "cpu" among "cpu,cpuacct", but not in "cpuset"
    if (!v2 && (',' + std::string(controllers, path)).find(",cpu,") == std::string::npos) continue;
    for (std::string group = path;; group.erase(group.rfind('/'))) {
      if (group == "/") group.clear();
      const std::string dir = (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu") + group;
      double quota = 0, period = 0;
      char text[64];
      if (v2) {
        if (read_line(dir + "/cpu.max", text, sizeof text))
          std::sscanf(text, "%lf %lf", &quota, &period);  // "max 100000" leaves both 0
      } else if (read_line(dir + "/cpu.cfs_quota_us", text, sizeof text)) {
        quota = std::atof(text);
        if (read_line(dir + "/cpu.cfs_period_us", text, sizeof text)) period = std::atof(text);
      }
      if (quota > 0 && period > 0) cpus = std::min(cpus, quota / period);
      if (group.empty() || group.rfind('/') == std::string::npos) break;
    }
  }
  std::fclose(file);
  return std::isinf(cpus) ? 0 : std::max(1, static_cast<int>(std::ceil(cpus)));
}

int affinity_cpus() {
  for (int size = 1024; size <= 1 << 20; size *= 2) {  // machines with more than 1024 CPUs exist
    cpu_set_t* set = CPU_ALLOC(size);
    const size_t bytes = CPU_ALLOC_SIZE(size);
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    const int count = ok ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (ok) return count;
    if (errno != EINVAL) break;
  }
  return 1;
}

}  // namespace

namespace {
thread_local int limit_of_this_thread = INT_MAX;
}

void limit_caller(int threads) { limit_of_this_thread = threads; }
int callers_limit() { return limit_of_this_thread; }

ThreadLimits thread_limits() {
  static const int cgroup = cgroup_cpus();  // a file read; quotas do not change under a process
  return {affinity_cpus(), cgroup};
}

}  // namespace ey::cpu
