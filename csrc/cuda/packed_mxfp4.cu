// SPDX-License-Identifier: Apache-2.0
#include "formats/mxfp4.cuh"
#include "packed.cuh"

namespace ey::cuda {

const PackedFormat kPackedMxfp4 = PackedKernels<Mxfp4Blocks>::entry();

}  // namespace ey::cuda
