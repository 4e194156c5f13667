// SPDX-License-Identifier: Apache-2.0
// mxfp4 weights x activations rounded to 8 bits on AVX2: multiplied in fp32.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel mxfp4_fast_avx2 = rounded(packed_kernel<Mxfp4Values>());

}  // namespace
EY_REGISTER_KERNEL(mxfp4_fast_avx2);
}  // namespace ey::cpu
