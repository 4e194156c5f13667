// SPDX-License-Identifier: Apache-2.0
#include "formats/int4.cuh"
#include "hopper_format.cuh"

namespace ey::cuda::hopper {

const HopperFormat kHopperInt4 = HopperKernels<Int4Blocks, 2, 4>::entry();

}  // namespace ey::cuda::hopper
