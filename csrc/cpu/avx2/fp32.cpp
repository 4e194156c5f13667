// SPDX-License-Identifier: Apache-2.0
// fp32 weights on AVX2.
#include "vec.h"

namespace ey::cpu {
namespace {

struct Fp32 {
  static constexpr int kSize = 4;
  static __m256 load(const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static __m256 load_tail(const char* p, int n) {
    alignas(32) float tail[8] = {};
    __builtin_memcpy(tail, p, n * sizeof(float));
    return _mm256_load_ps(tail);
  }
};

constexpr Kernel fp32_avx2 = kernel<Fp32>(Format::kFp32);

}  // namespace
EY_REGISTER_KERNEL(fp32_avx2);
}  // namespace ey::cpu
