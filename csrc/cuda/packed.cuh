// SPDX-License-Identifier: Apache-2.0
// What each packed format's file (packed_*.cu) offers to the host side of the kernels of blocks.
// One file a format, so that they compile side by side and alone.
#pragma once

#include "grouped.cuh"
#include "stream.cuh"

namespace ey::cuda {

struct PackedFormat {
  Format format;
  int chunk_k, chunk_bytes;  // of a chunk's quads, without heads
  int token_bytes;           // of a token's row in a stage
  int order;                 // of ordered tokens (format.cuh)
  int most_columns;          // of a grouped tile
  bool (*matrix_of)(const ExpertSet& set, int64_t k, int64_t num_blocks, Matrix* matrix);
  cudaError_t (*stream)(int blocks, const stream::Args& args, unsigned grid, int shared_bytes,
                        cudaStream_t stream);
  cudaError_t (*load_stream)(int most_shared_bytes);  // the kernels, onto the current device
  // columns of a tile: up to kFewColumns, or up to most_columns
  cudaError_t (*grouped)(int columns, const grouped::Args& args, dim3 grid, int shared_bytes,
                         cudaStream_t stream);
  cudaError_t (*load_grouped)(int most_shared_bytes);
};

extern const PackedFormat kPackedBf16, kPackedInt8, kPackedFp8, kPackedInt4, kPackedMxfp4;
inline const PackedFormat* const kPackedFormats[] = {&kPackedBf16, &kPackedInt8, &kPackedFp8,
                                                     &kPackedInt4, &kPackedMxfp4};

inline const PackedFormat* packed_format(Format format) {
  for (const PackedFormat* f : kPackedFormats) {
    if (f->format == format) return f;
  }
  return nullptr;
}

// Both matrices of an expert; false where the format's kernels cannot cut them into chunks.
inline bool make_matrices(const ExpertSet& set, const PackedFormat& format, Matrix (&m)[2]) {
  const int64_t w13 = w13_blocks(set.intermediate_size, has_gate(set.activation));
  return format.matrix_of(set, set.hidden_size, w13, &m[0]) &&
         format.matrix_of(set, set.intermediate_size, w2_blocks(set.hidden_size), &m[1]);
}

template <class F>
struct PackedKernels {
  static constexpr int kFew = grouped::kFewColumns / 8, kMost = F::kMostBlocks;

  static cudaError_t stream(int blocks, const stream::Args& args, unsigned grid, int shared_bytes,
                            cudaStream_t stream) {
    return ptx::launch_together(
        blocks == 1 ? stream::experts_stream<F, 1> : stream::experts_stream<F, 2>, dim3(grid),
        dim3(stream::kThreads), size_t(shared_bytes), stream, args);
  }
  static cudaError_t load_stream(int bytes) {
    const cudaError_t error = ptx::allow_shared(stream::experts_stream<F, 1>, bytes);
    return error != cudaSuccess ? error : ptx::allow_shared(stream::experts_stream<F, 2>, bytes);
  }

  static cudaError_t grouped(int columns, const grouped::Args& args, dim3 grid, int shared_bytes,
                             cudaStream_t stream) {
    const auto kernel = columns <= grouped::kFewColumns ? grouped::experts_grouped<F, kFew>
                                                        : grouped::experts_grouped<F, kMost>;
    return ptx::launch(kernel, grid, dim3(grouped::kThreads), size_t(shared_bytes), stream, args);
  }
  static cudaError_t load_grouped(int bytes) {
    const cudaError_t error = ptx::allow_shared(grouped::experts_grouped<F, kFew>, bytes);
    return error != cudaSuccess ? error
                                : ptx::allow_shared(grouped::experts_grouped<F, kMost>, bytes);
  }

  static constexpr PackedFormat entry() {
    return {F::kFormat,
            F::kChunkK,
            ChunkShape<F>::kQuadBytes,
            ChunkShape<F>::kTokenBytes,
            F::kOrder,
            8 * kMost,
            matrix_of<F>,
            stream,
            load_stream,
            grouped,
            load_grouped};
  }
};

}  // namespace ey::cuda
