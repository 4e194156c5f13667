// SPDX-License-Identifier: Apache-2.0
// int4 weights x activations rounded to 8 bits on AVX2: multiplied in fp32.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel int4_fast_avx2 = rounded(packed_kernel<Int4Values>());

}  // namespace
EY_REGISTER_KERNEL(int4_fast_avx2);
}  // namespace ey::cpu
