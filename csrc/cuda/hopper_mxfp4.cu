// SPDX-License-Identifier: Apache-2.0
#include "formats/mxfp4.cuh"
#include "hopper_format.cuh"

namespace ey::cuda::hopper {

const HopperFormat kHopperMxfp4 = HopperKernels<Mxfp4Blocks, 2>::entry();

}  // namespace ey::cuda::hopper
