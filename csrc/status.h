// SPDX-License-Identifier: Apache-2.0
// What a native function that can fail returns: success, or one sentence for the user.
#pragma once

#include <cstdio>

namespace ey {

struct Status {
  bool ok = true;
  char what[480] = "";
};

template <class... Args>
Status failure(const char* format, Args... args) {
  Status status;
  status.ok = false;
  std::snprintf(status.what, sizeof status.what, format, args...);
  return status;
}

}  // namespace ey
