// SPDX-License-Identifier: Apache-2.0
// bf16 weights on AVX2: a bf16 is the upper half of a float.
#include "vec.h"

namespace ey::cpu {
namespace {

struct Bf16 {
  static constexpr int kSize = 2;
  static __m256 widen(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static __m256 load(const char* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256 load_tail(const char* p, int n) { return widen(load_tail_16(p, n)); }
};

constexpr Kernel bf16_avx2 = kernel<Bf16>(Format::kBf16);

}  // namespace
EY_REGISTER_KERNEL(bf16_avx2);
}  // namespace ey::cpu
