// SPDX-License-Identifier: Apache-2.0
// fp16 weights on AVX-512: vcvtph2ps.
#include "vec.h"

namespace ey::cpu {
namespace {

struct Fp16 {
  static constexpr int kSize = 2;
  static __m512 load(const char* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512 load_tail(const char* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
  }
};

constexpr Kernel fp16_avx512 = kernel<Fp16>(Format::kFp16);

}  // namespace
EY_REGISTER_KERNEL(fp16_avx512);
}  // namespace ey::cpu
