// SPDX-License-Identifier: Apache-2.0
// What each packed format's file for Hopper (hopper_*.cu) offers to hopper.cu.
#pragma once

#include "hopper.cuh"

namespace ey::cuda::hopper {

// Scales are applied at the latest after so many slices of 16 k: the weights of more would not fit
// in registers.
constexpr int kMostSlicesInGroup = 4;

struct HopperFormat {
  Format format;
  int stage_bytes;  // tokens and quads, without heads
  cudaError_t (*launch)(const Args& args, unsigned grid, int shared_bytes, cudaStream_t stream);
  cudaError_t (*load)(int most_shared_bytes);
};

extern const HopperFormat kHopperBf16, kHopperInt8, kHopperFp8, kHopperInt4, kHopperMxfp4;

// kSlices: each number of slices in a group that the format has a kernel for.
template <class F, int... kSlices>
struct HopperKernels {
  static int slices_in_group(const Matrix& m) {
    const int slices = (m.group_mask + 1) * ChunkShape<F>::kQuadK / 16;
    return slices < kMostSlicesInGroup ? slices : kMostSlicesInGroup;
  }

  static cudaError_t launch(const Args& args, unsigned grid, int shared_bytes,
                            cudaStream_t stream) {
    cudaError_t error = cudaErrorInvalidConfiguration;
    const int slices = slices_in_group(args.matrix);
    ((slices == kSlices ? void(error = ptx::launch(experts_wgmma<F, kSlices>, dim3(grid),
                                                   dim3(kThreads), size_t(shared_bytes), stream,
                                                   args))
                        : void()),
     ...);
    return error;
  }
  static cudaError_t load(int bytes) {
    cudaError_t error = cudaSuccess;
    ((error = error != cudaSuccess ? error : ptx::allow_shared(experts_wgmma<F, kSlices>, bytes)),
     ...);
    return error;
  }

  static constexpr HopperFormat entry() {
    return {F::kFormat, Stage<F>::kTokenBytes + kBlocks * ChunkShape<F>::kQuadBytes, launch, load};
  }
};

}  // namespace ey::cuda::hopper
