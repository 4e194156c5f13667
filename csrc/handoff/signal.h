// SPDX-License-Identifier: Apache-2.0
// A counter that threads wait for, with a time-out: they spin for a bounded time, then sleep.
#pragma once

#include <atomic>
#include <cstdint>

namespace ey::handoff {

int64_t now_ns();  // CLOCK_MONOTONIC, as Python's time.perf_counter_ns

class Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();  // value + 1, and wake every sleeper
  // Returns once value() differs: true; or after timeout_ns nanoseconds: false. Spins for
  // at most spin_ns of them.
  bool wait_while(uint32_t value, int64_t timeout_ns, int64_t spin_ns);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace ey::handoff
