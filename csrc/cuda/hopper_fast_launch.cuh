// SPDX-License-Identifier: Apache-2.0
// What hopper_fp8_fast.cu, which is compiled for sm_90a alone, offers to hopper_fast.cu.
#pragma once

#include "grouped_run.cuh"
#include "hopper_fast.cuh"

namespace ey::cuda::hopper {

cudaError_t launch_fast(const Args& args, unsigned grid, int shared_bytes, cudaStream_t stream);
cudaError_t launch_prepare_e4m3(const grouped::Prepare& p, cudaStream_t stream);
cudaError_t load_fast(int most_shared_bytes);

}  // namespace ey::cuda::hopper
