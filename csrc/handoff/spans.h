// SPDX-License-Identifier: Apache-2.0
// When the parts of the calling thread's last moe_parts ran: for a timeline.
#pragma once

#include <cstdint>
#include <vector>

namespace ey::handoff {

struct Span {
  int64_t lane;              // -1: the caller
  int64_t begin_ns, end_ns;  // CLOCK_MONOTONIC
};

inline std::vector<Span>& spans() {
  thread_local std::vector<Span> last;
  return last;
}

}  // namespace ey::handoff
