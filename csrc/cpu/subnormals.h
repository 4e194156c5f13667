// SPDX-License-Identifier: Apache-2.0
// A thread may take subnormal operands for zeros (torch.set_flush_denormal): not in a kernel whose
// weights pass through such. Two calls and no object: its destructor would want exception tables.
#pragma once

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace ey::cpu {
namespace {

// From now on this thread's subnormal operands count; returns what restore_subnormals() takes.
inline unsigned keep_subnormals() {
#ifdef __SSE__
  constexpr unsigned kZeroes = 0x0040;  // "denormals are zeros"
  const unsigned before = _mm_getcsr();
  if (before & kZeroes) _mm_setcsr(before & ~kZeroes);
  return before & kZeroes;
#else
  return 0;
#endif
}

inline void restore_subnormals([[maybe_unused]] unsigned kept) {
#ifdef __SSE__
  if (kept != 0) _mm_setcsr(_mm_getcsr() | kept);
#endif
}

}  // namespace
}  // namespace ey::cpu
