// SPDX-License-Identifier: Apache-2.0
// vpdpbusd: four products of unsigned and signed bytes added to each int32 lane, exactly.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ey::cpu {
namespace {

// In assembler: gcc 12 copies the sums of its own intrinsic to other registers and back, which
// halves the speed of a tile of 24. By value: it would keep a reference's target in memory.
inline __m512i dot_u8_s8(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
#ifdef EY_EMULATE_AVX512
  return ey_avx512::dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
#endif
}

// What the probes of the machine's limits need (probe.h).
struct Vec {
  using X = int8_t;
  using W = __m512i;
  using Acc = __m512i;
  static constexpr int kWidth = 64;
  static Acc zero() { return _mm512_setzero_si512(); }
  static W load_x(const X* p) { return _mm512_loadu_si512(p); }
  static void fma(Acc& acc, W w, W x) { acc = dot_u8_s8(acc, w, x); }
  static void mix(Acc& acc, const char* p) { acc = _mm512_xor_si512(acc, _mm512_loadu_si512(p)); }
};

}  // namespace
}  // namespace ey::cpu
