// SPDX-License-Identifier: Apache-2.0
// mxfp4 (e2m1) weights on AVX2; the loop is block_kernel.h's.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel mxfp4_avx2 = packed_kernel<Mxfp4Values>();

}  // namespace
EY_REGISTER_KERNEL(mxfp4_avx2);
}  // namespace ey::cpu
