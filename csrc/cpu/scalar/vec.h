// SPDX-License-Identifier: Apache-2.0
// Plain C++: the readable truth, and what runs on a CPU that has none of the other rooms' features.
// A "vector" is one float; fp32 throughout.
#pragma once

#include <cmath>

#include "../fp32_kernel.h"

namespace ey::cpu {
namespace {

struct Vec {
  using X = float;
  using W = float;
  using Acc = float;
  static constexpr int kWidth = 1;
  static constexpr int kChains = 8;  // of multiply-adds, to measure the peak
  static constexpr int kMaxTokens = 2;
  static constexpr int rows(int) { return 4; }

  static Acc zero() { return 0; }
  static float load_x(const X* p) { return *p; }
  static void fma(Acc& acc, W w, float x) { acc += w * x; }
  static void mix(Acc& acc, const char* p) { acc += *reinterpret_cast<const float*>(p); }
  static float sum(Acc a) { return a; }
  static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
  }
};

struct Floats {
  using V = float;
  using H = float;
  static constexpr int kWidth = 1;
  static V load(const float* p) { return *p; }
  static void store(float* p, V v) { *p = v; }
  static void store_h(H* p, V v) { *p = v; }
  static V set(float v) { return v; }
  static V add(V a, V b) { return a + b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V min(V a, V b) { return a < b ? a : b; }  // b if either is NaN
  static V max(V a, V b) { return a > b ? a : b; }
  static V round(V a) { return std::nearbyint(a); }
  static V scale(V a, V n) { return a * std::exp2(n); }
};

template <class Weights>
constexpr Kernel kernel(Format format) {
  return fp32_kernel<Vec, Floats, Weights>("scalar", 0, 0, format);
}

inline uint16_t load_16(const char* p) {
  uint16_t v;
  __builtin_memcpy(&v, p, sizeof v);  // a tensor in a file may lie at an odd address
  return v;
}

}  // namespace
}  // namespace ey::cpu
