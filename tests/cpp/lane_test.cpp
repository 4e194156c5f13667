// SPDX-License-Identifier: Apache-2.0
// Lanes, made to run under a thread sanitizer: jobs of several askers, jobs that are given up,
// mailboxes that another thread writes into as a GPU would, and a child after a fork.
#include "handoff/lane.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using ey::Status;
using ey::handoff::Job;
using ey::handoff::lane;
using ey::handoff::Mailbox;

constexpr int64_t kSecond = 1'000'000'000;

class Add : public Job {
 public:
  Add(int a, int b, int sleep_ms) : a_(a), b_(b), sleep_ms_(sleep_ms) {}
  Status run() override {
    std::this_thread::sleep_for(std::chrono::milliseconds(sleep_ms_));
    sum = a_ + b_;
    return sum < 0 ? ey::failure("a sum of %d", sum) : Status{};
  }
  int sum = 0;  // plain memory: handed over by wait()

 private:
  const int a_, b_, sleep_ms_;
};

bool adds(const char* name, int a, int b) {
  const auto job = std::make_shared<Add>(a, b, 0);
  if (!lane(name, 1).submit(job).ok || !lane(name, 1).wait(*job, 10 * kSecond, "a sum").ok) {
    return false;
  }
  return job->sum == a + b && job->status.ok == (job->sum >= 0) && job->end_ns >= job->begin_ns;
}

// Doubles what it is asked.
class Doubler : public Mailbox {
 public:
  bool asked() override {
    return __atomic_load_n(&asked_, __ATOMIC_ACQUIRE) !=
           __atomic_load_n(&answered_, __ATOMIC_ACQUIRE);
  }
  void answer() override {
    out_ = 2 * in_;
    __atomic_store_n(&answered_, asked_, __ATOMIC_RELEASE);
  }
  bool doubles(int in) {  // the GPU's side
    in_ = in;
    const uint32_t epoch = asked_ + 1;
    __atomic_store_n(&asked_, epoch, __ATOMIC_RELEASE);
    const int64_t begin = ey::handoff::now_ns();
    while (__atomic_load_n(&answered_, __ATOMIC_ACQUIRE) != epoch) {
      if (ey::handoff::now_ns() - begin > 10 * kSecond) return false;
      std::this_thread::yield();
    }
    return out_ == 2 * in;
  }

 private:
  uint32_t asked_ = 0, answered_ = 0;
  int in_ = 0, out_ = 0;  // plain memory
};

double cpu_seconds() {
  rusage used;
  getrusage(RUSAGE_SELF, &used);
  return static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
         static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
}

double used_in(int milliseconds) {
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  return (cpu_seconds() - before) * 1e3 / milliseconds;
}

}  // namespace

int main() {
  int passed = 0, failed = 0;
  const auto check = [&](bool ok, const char* what) {
    ok ? ++passed : ++failed;
    if (!ok) std::printf("FAIL %s\n", what);
  };

  for (int i = 0; i < 200; ++i) check(adds(i % 2 ? "a" : "b", i, -100), "one asker");
  std::vector<std::thread> askers;
  std::vector<int> right(4, 0);
  for (int t = 0; t < 4; ++t) {
    askers.emplace_back([&right, t] {
      for (int i = 0; i < 100; ++i) right[t] += adds("a", i, t);
    });
  }
  for (std::thread& asker : askers) asker.join();
  for (const int r : right) check(r == 100, "several askers");

  const auto slow = std::make_shared<Add>(1, 2, 300);
  check(lane("c", 1).submit(slow).ok, "submit");
  const Status late = lane("c", 1).wait(*slow, kSecond / 50, "its sum");
  check(!late.ok && std::strstr(late.what, "c: its sum did not finish within 0.02 s"), late.what);
  const Status refused = lane("c", 1).submit(std::make_shared<Add>(1, 2, 0));
  check(!refused.ok && std::strstr(refused.what, "still busy with its sum"), refused.what);
  check(lane("c", 1).wait(*slow, 10 * kSecond, "its sum").ok && slow->sum == 3, "it comes late");
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  check(adds("c", 3, 4), "the lane goes on");

  {
    Doubler box;
    lane("gpu", 1).watch(&box);
    for (int replay = 0; replay < 20; ++replay) {
      if (replay % 5 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      lane("gpu", 1).expect(10, 10 * kSecond);
      for (int i = 0; i < 10; ++i) check(box.doubles(replay + i), "a mailbox");
    }
    // Nothing is expected any more: the lane sleeps, and a question that nobody has announced is
    // answered when the lane wakes up.
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    check(used_in(500) < 0.02, "an idle lane uses no CPU");
    lane("gpu", 1).expect(1, kSecond / 50);  // and does not come
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    check(used_in(500) < 0.02, "a question that never comes is not waited for for ever");
    check(adds("gpu", 1, 1), "jobs and mailboxes on one lane");
    lane("gpu", 1).unwatch(&box);
  }

#if !defined(__SANITIZE_THREAD__)  // which lets no forked child make threads
  std::fflush(stdout);
  if (const pid_t child = fork(); child == 0) {
    _exit(adds("a", 5, 6) ? 0 : 1);
  } else {
    int status = 1;
    check(waitpid(child, &status, 0) == child && status == 0, "lanes of a forked child");
  }
#endif
  check(adds("a", 5, 6), "lanes after a fork");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
