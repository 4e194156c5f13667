// SPDX-License-Identifier: Apache-2.0
// mxfp4 weights x 8-bit activations in plain C++.
#include "fast.h"

namespace ey::cpu {
namespace {

constexpr Kernel mxfp4_fast_scalar = fast_kernel<Mxfp4Codes>();

}  // namespace
EY_REGISTER_KERNEL(mxfp4_fast_scalar);
}  // namespace ey::cpu
