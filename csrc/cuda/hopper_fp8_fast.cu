// SPDX-License-Identifier: Apache-2.0
#include "hopper_fast_launch.cuh"

namespace ey::cuda::hopper {

cudaError_t launch_fast(const Args& args, unsigned grid, int shared_bytes, cudaStream_t stream) {
  return ptx::launch(experts_wgmma_fast<Fp8FastBlocks>, dim3(grid), dim3(kThreads),
                     size_t(shared_bytes), stream, args);
}

cudaError_t launch_prepare_e4m3(const grouped::Prepare& p, cudaStream_t stream) {
  return ptx::launch(prepare_e4m3<Fp8FastBlocks>, dim3(p.grid), dim3(kPrepareThreads),
                     size_t(p.shared_bytes), stream, p.call, p.pairs, p.columns, p.routing,
                     static_cast<uint8_t*>(p.x), p.beside, p.tokens, p.x_stride);
}

cudaError_t load_fast(int most_shared_bytes) {
  const cudaError_t error = ptx::allow_shared(experts_wgmma_fast<Fp8FastBlocks>, most_shared_bytes);
  return error != cudaSuccess
             ? error
             : ptx::allow_shared(prepare_e4m3<Fp8FastBlocks>, grouped::kRoutingBytes);
}

}  // namespace ey::cuda::hopper
