// SPDX-License-Identifier: Apache-2.0
// fp32 weights on AVX-512.
#include "vec.h"

namespace ey::cpu {
namespace {

struct Fp32 {
  static constexpr int kSize = 4;
  static __m512 load(const char* p) { return _mm512_loadu_ps(p); }
  static __m512 load_tail(const char* p, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  }
};

constexpr Kernel fp32_avx512 = kernel<Fp32>(Format::kFp32);

}  // namespace
EY_REGISTER_KERNEL(fp32_avx512);
}  // namespace ey::cpu
