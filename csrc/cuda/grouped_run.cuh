// SPDX-License-Identifier: Apache-2.0
// The host side that the grouped kernels of mma (grouped.cu) and of wgmma (hopper.cu) share: what
// lies in the workspace, and the launches. What they differ in is a Products.
#pragma once

#include "family.cuh"
#include "limits.cuh"
#include "packed.cuh"

namespace ey::cuda::grouped {

constexpr int64_t kMostTopK = 1024;  // combine's slots in shared memory
constexpr int kCombineThreads = 256;
constexpr int kPartK = 32;                // of sum_groups
constexpr int kRoutingBytes = 48 * 1024;  // of shared memory, of what sorts the pairs

// The first launch: pairs sorted, and x as the products take it.
struct Prepare {
  Chunk call;
  int32_t pairs, columns;  // of a tile
  Routing routing;
  void* x;
  float* beside;
  int tokens, x_stride, beside_stride, order, group_k;
  unsigned grid;
  int shared_bytes;
};
cudaError_t prepare_bf16(const Prepare& p, cudaStream_t stream);
// Of each row of ordered bf16 values, sums of groups along k, each at the place of its first 32.
cudaError_t sum_groups_of(const uint16_t* rows, int64_t count, int stride, int group_k, float* sums,
                          int sums_stride, cudaStream_t stream);

struct Products {
  int64_t x_run, h_run;  // rows of x, of h are so long: whole runs of every order
  int value_bytes;       // of x and h: bf16, e4m3
  // of both weight matrices; false: there are no kernels for them
  bool (*matrices)(const ExpertSet& set, Matrix (&m)[2]);
  int64_t (*floats)(const ExpertSet& set, int64_t stride);  // beside a row of x, of h
  cudaError_t (*prepare)(const Prepare& p, cudaStream_t stream);
  // pairs of a tile, for experts that have that many
  int (*columns)(const PackedFormat& format, const Matrix (&m)[2], int64_t share,
                 const Limits& limit);
  int (*order)(const PackedFormat& format);
  cudaError_t (*launch)(const PackedFormat& format, Args& args, int columns, int64_t pairs,
                        const Limits& limit, cudaStream_t stream);
};

inline int64_t x_stride(const Products& p, const ExpertSet& set) {
  return round_up(set.hidden_size, p.x_run);
}
inline int64_t h_stride(const Products& p, const ExpertSet& set) {
  const bool gated = has_gate(set.activation);
  return round_up(w13_blocks(set.intermediate_size, gated) * w13_rows(gated), p.h_run);
}
inline int64_t y_stride(const ExpertSet& set) { return w2_blocks(set.hidden_size) * kLanes; }

// One after the other in the workspace, each from a multiple of 256 bytes.
struct Parts {
  int64_t x, h, y, x_floats, h_floats, sorted, tile_list, num_tiles, end;
  Parts(const Products& p, const ExpertSet& set, int64_t tokens, int64_t pairs) {
    x = 0;
    h = x + round_up(tokens * x_stride(p, set) * p.value_bytes, 256);
    y = h + round_up(pairs * h_stride(p, set) * p.value_bytes, 256);
    x_floats = y + round_up(pairs * y_stride(set) * 4, 256);
    h_floats = x_floats + round_up(tokens * p.floats(set, x_stride(p, set)) * 4, 256);
    sorted = h_floats + round_up(pairs * p.floats(set, h_stride(p, set)) * 4, 256);
    tile_list = sorted + round_up(pairs * int64_t(sizeof(int32_t)), 256);
    num_tiles = tile_list + round_up(pairs * int64_t(sizeof(Tile)), 256);
    end = num_tiles + 256;
  }
};

// Whether the kernels before and after the products serve a call; m: of its matrices.
inline bool ends_serve(const Products& p, const MoeArgs& args, Matrix (&m)[2]) {
  const ExpertSet& set = *args.set;
  return set.layout == Layout::kBlocks && packed_format(set.format) != nullptr &&
         set.num_experts <= kMostRoutedExperts && args.top_k <= kMostTopK &&
         set.hidden_size <= kMostGridY * kCombineThreads && p.matrices(set, m);
}

inline bool own_matrices(const ExpertSet& set, Matrix (&m)[2]) {
  return make_matrices(set, *packed_format(set.format), m);
}
inline int64_t no_floats(const ExpertSet&, int64_t) { return 0; }

cudaError_t run_grouped(const Products& p, const Chunk& chunk, int64_t tokens, void* workspace,
                        cudaStream_t stream);
cudaError_t load_ends();  // the kernels before and after the products

}  // namespace ey::cuda::grouped
