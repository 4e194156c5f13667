// SPDX-License-Identifier: Apache-2.0
// int8 weights on AVX-512; the loop is block_kernel.h's.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel int8_avx512 = packed_kernel<Int8Values>();

}  // namespace
EY_REGISTER_KERNEL(int8_avx512);
}  // namespace ey::cpu
