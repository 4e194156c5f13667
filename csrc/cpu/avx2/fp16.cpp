// SPDX-License-Identifier: Apache-2.0
// fp16 weights on AVX2 with F16C.
#include "vec.h"

namespace ey::cpu {
namespace {

struct Fp16 {
  static constexpr int kSize = 2;
  static __m256 load(const char* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256 load_tail(const char* p, int n) { return _mm256_cvtph_ps(load_tail_16(p, n)); }
};

constexpr Kernel fp16_avx2 = kernel<Fp16>(Format::kFp16);

}  // namespace
EY_REGISTER_KERNEL(fp16_avx2);
}  // namespace ey::cpu
