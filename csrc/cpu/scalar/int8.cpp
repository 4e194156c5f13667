// SPDX-License-Identifier: Apache-2.0
// int8 weights in plain C++; the loop is block_kernel.h's.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel int8_scalar = packed_kernel<Int8Values>();

}  // namespace
EY_REGISTER_KERNEL(int8_scalar);
}  // namespace ey::cpu
