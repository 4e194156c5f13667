// SPDX-License-Identifier: Apache-2.0
// bf16 weights on AVX-512: a bf16 is the upper half of a float.
#include "vec.h"

namespace ey::cpu {
namespace {

struct Bf16 {
  static constexpr int kSize = 2;
  static __m512 widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static __m512 load(const char* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512 load_tail(const char* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
  }
};

constexpr Kernel bf16_avx512 = kernel<Bf16>(Format::kBf16);

}  // namespace
EY_REGISTER_KERNEL(bf16_avx512);
}  // namespace ey::cpu
