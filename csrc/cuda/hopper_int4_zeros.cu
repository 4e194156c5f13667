// SPDX-License-Identifier: Apache-2.0
#include "formats/int4_zeros.cuh"
#include "hopper_format.cuh"

namespace ey::cuda::hopper {

template <>
struct Tokens<Int4ZerosBlocks> {
  static constexpr int kBytes = 2, kFloats = 4;  // sums of 32 k
};

const HopperFormat kHopperInt4Zeros = HopperKernels<Int4ZerosBlocks, 2, 4>::entry();

}  // namespace ey::cuda::hopper
