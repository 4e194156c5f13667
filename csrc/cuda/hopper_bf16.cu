// SPDX-License-Identifier: Apache-2.0
#include "formats/bf16.cuh"
#include "hopper_format.cuh"

namespace ey::cuda::hopper {

const HopperFormat kHopperBf16 = HopperKernels<Bf16Blocks, 4>::entry();

}  // namespace ey::cuda::hopper
