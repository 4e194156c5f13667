// SPDX-License-Identifier: Apache-2.0
// mxfp4 weights x 8-bit activations on AVX-512 without VNNI; the loop is byte_tile.h's.
#include "../byte_tile.h"
#include "lanes.h"

namespace ey::cpu {
namespace {

constexpr Kernel mxfp4_fast_avx512 =
    byte_kernel<ByteLanes, Mxfp4Bytes>(packed_kernel<Mxfp4Values>());

}  // namespace
EY_REGISTER_KERNEL(mxfp4_fast_avx512);
}  // namespace ey::cpu
