// SPDX-License-Identifier: Apache-2.0
// int8 weights x 8-bit activations on AVX-512 without VNNI; the loop is byte_tile.h's.
#include "../byte_tile.h"
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel int8_fast_avx512 = byte_kernel<ByteLanes, Int8Bytes>(packed_kernel<Int8Values>());

}  // namespace
EY_REGISTER_KERNEL(int8_fast_avx512);
}  // namespace ey::cpu
