// SPDX-License-Identifier: Apache-2.0
#include "lane.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <map>
#include <thread>

#include "../cpu/threads.h"

namespace ey::handoff {
namespace {

// An idle lane spins for twice as long as it was idle before, to be found awake by the next MoE
// layer of a decode step: waking it takes 50 us. Longer gaps are not bridged.
constexpr int64_t kLeastSpin = 100'000, kMostSpin = 2'000'000;
constexpr int64_t kAskerSpin = 200'000;  // an answer of a decode step comes within that
// Between two looks at mailboxes that a GPU is to write into: none at first, while a step is under
// way; then naps that grow to this.
constexpr int64_t kPollSpin = 1'000'000, kLongestNap = 50'000;

void nap(int64_t ns) {
  const timespec time{0, static_cast<long>(ns)};
  nanosleep(&time, nullptr);
}

}  // namespace

Lane::Lane(const std::string& name, int threads) : name_(name) {
  std::thread([this, threads] { serve(threads); }).detach();
}

Status Lane::submit(std::shared_ptr<Job> job) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!late_.empty()) {
      return failure("%s: still busy with %s, which did not finish in time", name_.c_str(),
                     late_.c_str());
    }
    jobs_.push_back(std::move(job));
  }
  bell_.advance();
  return {};
}

Status Lane::wait(Job& job, int64_t timeout_ns, const std::string& what) {
  if (job.done_.wait_while(0, timeout_ns, kAskerSpin)) return {};
  const std::lock_guard<std::mutex> lock(mutex_);
  if (job.done_.value() != 0) return {};
  late_ = what;
  return failure(
      "%s: %s did not finish within %g s. The device hangs, or the time is too short for such a "
      "call: ExpertsConfig(timeout=SECONDS)",
      name_.c_str(), what.c_str(), static_cast<double>(timeout_ns) * 1e-9);
}

void Lane::watch(Mailbox* box) {
  const std::lock_guard<std::mutex> lock(boxes_mutex_);
  boxes_.push_back(box);
}

void Lane::unwatch(Mailbox* box) {
  const std::lock_guard<std::mutex> lock(boxes_mutex_);
  boxes_.erase(std::remove(boxes_.begin(), boxes_.end(), box), boxes_.end());
}

void Lane::expect(int questions, int64_t timeout_ns) {
  poll_for_.store(timeout_ns, std::memory_order_relaxed);
  poll_until_.store(now_ns() + timeout_ns, std::memory_order_relaxed);
  expected_.fetch_add(questions, std::memory_order_release);
  bell_.advance();
}

std::shared_ptr<Job> Lane::next_job() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (jobs_.empty()) return nullptr;
  std::shared_ptr<Job> job = std::move(jobs_.front());
  jobs_.pop_front();
  return job;
}

bool Lane::answer_one() {
  const std::lock_guard<std::mutex> lock(boxes_mutex_);
  for (Mailbox* box : boxes_) {
    if (!box->asked()) continue;
    box->answer();
    // never below 0: a question may come that nobody has announced
    int64_t expected = expected_.load(std::memory_order_relaxed);
    while (expected > 0 && !expected_.compare_exchange_weak(expected, expected - 1)) {
    }
    poll_until_.store(now_ns() + poll_for_.load(std::memory_order_relaxed),
                      std::memory_order_relaxed);
    return true;
  }
  return false;
}

bool Lane::polling() {
  if (expected_.load(std::memory_order_acquire) == 0) return false;
  if (now_ns() < poll_until_.load(std::memory_order_relaxed)) return true;
  expected_.store(0, std::memory_order_relaxed);  // what was announced does not come any more
  return false;
}

void Lane::serve(int threads) {
  pthread_setname_np(pthread_self(), ("ey " + name_).substr(0, 15).c_str());
  cpu::limit_caller(threads);
  int64_t idle_since = now_ns(), spin = kLeastSpin;
  for (;;) {
    const uint32_t seen = bell_.value();
    if (const std::shared_ptr<Job> job = next_job()) {
      job->begin_ns = now_ns();
      const int64_t gap = job->begin_ns - idle_since;
      spin = gap < kMostSpin ? std::clamp(2 * gap, kLeastSpin, kMostSpin) : kLeastSpin;
      job->status = job->run();
      job->end_ns = now_ns();
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        job->done_.advance();
        late_.clear();
      }
      idle_since = job->end_ns;
    } else if (answer_one()) {
      idle_since = now_ns();
    } else if (polling()) {
      const int64_t idle = now_ns() - idle_since - kPollSpin;
      if (idle > 0) nap(std::min(kLongestNap, 1000 + idle / 16));
    } else {
      bell_.wait_while(seen, INT64_MAX, spin);
    }
  }
}

namespace {

struct Lanes {
  std::mutex mutex;
  std::map<std::string, Lane*> all;
};

// Never destroyed: lanes sleep in it at exit, and a forked child leaves its parent's where they
// are.
std::atomic<Lanes*> lanes{new Lanes};
std::once_flag fork_handler;

}  // namespace

Lane& lane(const std::string& name, int threads) {
  std::call_once(fork_handler, [] { pthread_atfork(nullptr, nullptr, [] { lanes = new Lanes; }); });
  Lanes& l = *lanes.load(std::memory_order_acquire);
  const std::lock_guard<std::mutex> lock(l.mutex);
  Lane*& found = l.all[name];
  if (found == nullptr) found = new Lane(name, threads);
  return *found;
}

}  // namespace ey::handoff
