// SPDX-License-Identifier: Apache-2.0
#include "formats/int8.cuh"
#include "hopper_format.cuh"

namespace ey::cuda::hopper {

const HopperFormat kHopperInt8 = HopperKernels<Int8Blocks, 2, 4>::entry();

}  // namespace ey::cuda::hopper
