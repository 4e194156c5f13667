// SPDX-License-Identifier: Apache-2.0
// While one of these lives, this thread's subnormal operands keep their values.
#pragma once

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace ey::cpu {
namespace {

class KeepSubnormals {
 public:
  KeepSubnormals() {
#ifdef __SSE__
    before_ = _mm_getcsr();
    if (before_ & kZeroes) _mm_setcsr(before_ & ~kZeroes);
#endif
  }
  ~KeepSubnormals() {
#ifdef __SSE__
    if (before_ & kZeroes) _mm_setcsr(before_);
#endif
  }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
  static constexpr unsigned kZeroes = 0x0040;  // "denormals are zeros", as torch may have set it
  [[maybe_unused]] unsigned before_ = 0;
};

}  // namespace
}  // namespace ey::cpu
