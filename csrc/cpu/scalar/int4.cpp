// SPDX-License-Identifier: Apache-2.0
// int4 weights in plain C++; the loop is block_kernel.h's.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel int4_scalar = packed_kernel<Int4Values>();

}  // namespace
EY_REGISTER_KERNEL(int4_scalar);
}  // namespace ey::cpu
