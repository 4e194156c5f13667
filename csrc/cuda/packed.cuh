// SPDX-License-Identifier: Apache-2.0
// What each packed format's file (packed_*.cu) offers to the host side of the kernels of blocks. One
// file a format, so that they compile side by side and alone.
#pragma once

#include "stream.cuh"

namespace ey::cuda {

struct PackedFormat {
  Format format;
  int chunk_k, chunk_bytes;  // of a chunk's quads, without heads
  int token_bytes;           // of a token's row in a stage
  bool (*matrix_of)(const ExpertSet& set, int64_t k, int64_t num_blocks, Matrix* matrix);
  cudaError_t (*stream)(int blocks, const stream::Args& args, unsigned grid, int shared_bytes,
                        cudaStream_t stream);
  cudaError_t (*load)(int most_shared_bytes);  // the kernels, onto the current device
};

extern const PackedFormat kPackedBf16, kPackedInt8, kPackedFp8, kPackedInt4, kPackedMxfp4;

inline const PackedFormat* packed_format(Format format) {
  for (const PackedFormat* f :
       {&kPackedBf16, &kPackedInt8, &kPackedFp8, &kPackedInt4, &kPackedMxfp4}) {
    if (f->format == format) return f;
  }
  return nullptr;
}

template <class F>
struct PackedKernels {
  static cudaError_t stream(int blocks, const stream::Args& args, unsigned grid, int shared_bytes,
                            cudaStream_t stream) {
    return ptx::launch_together(
        blocks == 1 ? stream::experts_stream<F, 1> : stream::experts_stream<F, 2>, dim3(grid),
        dim3(stream::kThreads), size_t(shared_bytes), stream, args);
  }
  static cudaError_t load(int most_shared_bytes) {
    cudaError_t error = ptx::allow_shared(stream::experts_stream<F, 1>, most_shared_bytes);
    if (error == cudaSuccess) {
      error = ptx::allow_shared(stream::experts_stream<F, 2>, most_shared_bytes);
    }
    return error;
  }
  static constexpr PackedFormat entry() {
    return {F::kFormat,        F::kChunkK, ChunkShape<F>::kQuadBytes, ChunkShape<F>::kTokenBytes,
            matrix_of<F>, stream, load};
  }
};

}  // namespace ey::cuda
