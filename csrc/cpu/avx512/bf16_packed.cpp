// SPDX-License-Identifier: Apache-2.0
// Packed bf16 weights on AVX-512; the loop is block_kernel.h's.
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel bf16_packed_avx512 = packed_kernel<Bf16Values>();

}  // namespace
EY_REGISTER_KERNEL(bf16_packed_avx512);
}  // namespace ey::cpu
