// SPDX-License-Identifier: Apache-2.0
// int4 with a zero a group for the kernels on Hopper, which take the sums of tokens from memory.
// The kernels of mma (int4.cuh) make them as they go.
#pragma once

#include "int4.cuh"

namespace ey::cuda {

struct Int4ZerosBlocks : Int4Blocks {};

}  // namespace ey::cuda
