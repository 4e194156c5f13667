// SPDX-License-Identifier: Apache-2.0
#include "formats/bf16.cuh"
#include "packed.cuh"

namespace ey::cuda {

const PackedFormat kPackedBf16 = PackedKernels<Bf16Blocks>::entry();

}  // namespace ey::cuda
