// SPDX-License-Identifier: Apache-2.0
// int4 weights on AVX-512; the loop is block_kernel.h's.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel int4_avx512 = packed_kernel<Int4Values>();

}  // namespace
EY_REGISTER_KERNEL(int4_avx512);
}  // namespace ey::cpu
