// SPDX-License-Identifier: Apache-2.0
// mxfp4 (e2m1) weights in plain C++; the loop is block_kernel.h's.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel mxfp4_scalar = packed_kernel<Mxfp4Values>();

}  // namespace
EY_REGISTER_KERNEL(mxfp4_scalar);
}  // namespace ey::cpu
