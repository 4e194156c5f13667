// SPDX-License-Identifier: Apache-2.0
#include "formats/fp8.cuh"
#include "packed.cuh"

namespace ey::cuda {

const PackedFormat kPackedFp8 = PackedKernels<Fp8Blocks>::entry();

}  // namespace ey::cuda
