// SPDX-License-Identifier: Apache-2.0
// int8 weights x activations rounded to 8 bits on AVX2: multiplied in fp32.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel int8_fast_avx2 = rounded(packed_kernel<Int8Values>());

}  // namespace
EY_REGISTER_KERNEL(int8_fast_avx2);
}  // namespace ey::cpu
