// SPDX-License-Identifier: Apache-2.0
// int8 weights x 8-bit activations in plain C++.
#include "fast.h"

namespace ey::cpu {
namespace {

constexpr Kernel int8_fast_scalar = fast_kernel<Int8Codes>();

}  // namespace
EY_REGISTER_KERNEL(int8_fast_scalar);
}  // namespace ey::cpu
