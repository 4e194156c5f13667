// SPDX-License-Identifier: Apache-2.0
// int4 weights x 8-bit activations in plain C++.
#include "fast.h"

namespace ey::cpu {
namespace {

constexpr Kernel int4_fast_scalar = fast_kernel<Int4Codes>();

}  // namespace
EY_REGISTER_KERNEL(int4_fast_scalar);
}  // namespace ey::cpu
