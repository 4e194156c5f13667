// SPDX-License-Identifier: Apache-2.0
// fp8 e4m3 weights on AVX2; the loop is block_kernel.h's.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel fp8_avx2 = packed_kernel<Fp8Values>();

}  // namespace
EY_REGISTER_KERNEL(fp8_avx2);
}  // namespace ey::cpu
