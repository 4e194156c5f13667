// SPDX-License-Identifier: Apache-2.0
#include "features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ey::cpu {
namespace {

#if defined(__x86_64__)
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Leaf(unsigned leaf, unsigned sub) { __get_cpuid_count(leaf, sub, &a, &b, &c, &d); }
};

bool bit(unsigned reg, int n) { return reg >> n & 1; }

uint64_t registers_saved_by_os() {
  uint32_t lo, hi;
  asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return uint64_t{hi} << 32 | lo;
}

uint32_t detect() {
  const Leaf l1(1, 0);
  const bool osxsave = bit(l1.c, 27), fma = bit(l1.c, 12), f16c = bit(l1.c, 29);
  if (!osxsave) return 0;
  const uint64_t saved = registers_saved_by_os();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xE6;  // SSE + AVX; and opmask + both halves of zmm
  const Leaf l7(7, 0);
  uint32_t out = 0;
  if ((saved & kYmm) == kYmm && bit(l7.b, 5) && fma && f16c) out |= kFeatureAvx2;
#ifdef EY_EMULATE_AVX512  // tests/cpu_emulator: any CPU with AVX2 runs all rooms
  if (out & kFeatureAvx2) {
    out |= kFeatureAvx512 | kFeatureAvx512Vbmi | kFeatureAvx512Vnni | kFeatureAvx512Bf16;
  }
  return out;
#endif
  const bool f = bit(l7.b, 16), dq = bit(l7.b, 17), bw = bit(l7.b, 30), vl = bit(l7.b, 31);
  if (!(out & kFeatureAvx2) || (saved & kZmm) != kZmm || !(f && dq && bw && vl)) return out;
  out |= kFeatureAvx512;
  if (bit(l7.c, 1)) out |= kFeatureAvx512Vbmi;
  if (bit(l7.c, 11)) out |= kFeatureAvx512Vnni;
  if (l7.a >= 1 && bit(Leaf(7, 1).a, 5)) out |= kFeatureAvx512Bf16;
  return out;
}
#else
uint32_t detect() { return 0; }
#endif

}  // namespace

uint32_t features() {
  static const uint32_t bits = detect();
  return bits;
}

}  // namespace ey::cpu
