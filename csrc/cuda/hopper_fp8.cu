// SPDX-License-Identifier: Apache-2.0
#include "formats/fp8.cuh"
#include "hopper_format.cuh"

namespace ey::cuda::hopper {

const HopperFormat kHopperFp8 = HopperKernels<Fp8Blocks, 4>::entry();

}  // namespace ey::cuda::hopper
