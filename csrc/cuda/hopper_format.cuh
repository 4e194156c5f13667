// SPDX-License-Identifier: Apache-2.0
// What each packed format's file for Hopper (hopper_*.cu) offers to hopper.cu.
#pragma once

#include "hopper.cuh"

namespace ey::cuda::hopper {

struct HopperFormat {
  Format format;
  bool zeros;
  int stage_bytes;  // tokens, quads and floats, without heads
  cudaError_t (*launch)(const Args& args, unsigned grid, int shared_bytes, cudaStream_t stream);
  cudaError_t (*load)(int most_shared_bytes);
};

extern const HopperFormat kHopperBf16, kHopperInt8, kHopperFp8, kHopperInt4, kHopperMxfp4,
    kHopperInt4Zeros;

// The numbers: a kernel each, ascending, that applies scales after so many slices of 16 k. At most
// 4: the weights of more would not fit in registers.
template <class F, int kFirst, int... kMore>
struct HopperKernels {
  static cudaError_t launch(const Args& args, unsigned grid, int shared_bytes,
                            cudaStream_t stream) {
    const int slices = (args.matrix.group_mask + 1) * ChunkShape<F>::kQuadK / 16;  // of a group
    auto kernel = experts_wgmma<F, kFirst>;
    ((kernel = kMore <= slices ? experts_wgmma<F, kMore> : kernel), ...);
    return ptx::launch(kernel, dim3(grid), dim3(kThreads), size_t(shared_bytes), stream, args);
  }
  static cudaError_t load(int bytes) {
    cudaError_t error = ptx::allow_shared(experts_wgmma<F, kFirst>, bytes);
    ((error = error != cudaSuccess ? error : ptx::allow_shared(experts_wgmma<F, kMore>, bytes)),
     ...);
    return error;
  }

  static constexpr HopperFormat entry() {
    return {F::kFormat, Tokens<F>::kFloats > 0,
            Stage<F>::kTokenBytes + kBlocks * ChunkShape<F>::kQuadBytes + Stage<F>::kFloatBytes,
            launch, load};
  }
};

}  // namespace ey::cuda::hopper
