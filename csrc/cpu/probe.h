// SPDX-License-Identifier: Apache-2.0
// The two loops behind limits.h, for whatever vectors a room has. The results are kept alive by an
// asm that claims to look at them, so that the compiler cannot leave the work out.
#pragma once

#include "kernel.h"

namespace ey::cpu {
namespace {

template <class T>
inline void keep(T& value) {
  asm volatile("" : : "r"(&value) : "memory");
}

// Accumulators of a tile: enough independent chains to hide the latency of a multiply-add.
template <class V, int kChains>
int64_t peak(int64_t steps) {
  alignas(64) typename V::X zeros[64] = {};
  keep(zeros);
  const auto x = V::load_x(zeros);
  const auto w = static_cast<typename V::W>(x);
  typename V::Acc acc[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) {
    acc[i] = V::zero();
    keep(acc[i]);  // or equal chains would become one
  }
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) V::fma(acc[i], w, x);
  }
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) keep(acc[i]);
  return steps * kChains * V::kWidth * 2;
}

// Reads every cache line of [p, p + bytes) once, whole, fetching 2 KB ahead.
template <class V, int kPerLine>
void read_lines(const char* p, int64_t bytes) {
  typename V::Acc sum[kPerLine];
#pragma GCC unroll 16
  for (int i = 0; i < kPerLine; ++i) sum[i] = V::zero();
  for (int64_t at = 0; at + 64 <= bytes; at += 64) {
    __builtin_prefetch(p + at + 2048);
#pragma GCC unroll 16
    for (int i = 0; i < kPerLine; ++i) V::mix(sum[i], p + at + i * (64 / kPerLine));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kPerLine; ++i) keep(sum[i]);
}

}  // namespace
}  // namespace ey::cpu
