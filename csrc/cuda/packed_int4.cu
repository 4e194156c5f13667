// SPDX-License-Identifier: Apache-2.0
#include "formats/int4.cuh"
#include "packed.cuh"

namespace ey::cuda {

const PackedFormat kPackedInt4 = PackedKernels<Int4Blocks>::entry();

}  // namespace ey::cuda
