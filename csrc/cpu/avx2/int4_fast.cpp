// SPDX-License-Identifier: Apache-2.0
// int4 weights x 8-bit activations on AVX2; the loop is byte_tile.h's.
#include "../byte_tile.h"
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel int4_fast_avx2 = byte_kernel<ByteLanes, Int4Bytes>(packed_kernel<Int4Values>());

}  // namespace
EY_REGISTER_KERNEL(int4_fast_avx2);
}  // namespace ey::cpu
