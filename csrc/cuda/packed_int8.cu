// SPDX-License-Identifier: Apache-2.0
#include "formats/int8.cuh"
#include "packed.cuh"

namespace ey::cuda {

const PackedFormat kPackedInt8 = PackedKernels<Int8Blocks>::entry();

}  // namespace ey::cuda
