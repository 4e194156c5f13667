// SPDX-License-Identifier: Apache-2.0
// The host side that the grouped kernels of mma (grouped.cu) and of wgmma (hopper.cu) share: what
// lies in the workspace, and the launches. What they differ in is a Products.
#pragma once

#include "grouped_ends.cuh"
#include "limits.cuh"
#include "packed.cuh"

namespace ey::cuda::grouped {

constexpr int64_t kMostTopK = 1024;       // combine's slots in shared memory
constexpr int kRoutingBytes = 48 * 1024;  // of prepare

struct Products {
  int64_t x_run, h_run;  // rows of x, of h are so long: whole runs of every order
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
  return round_up(w13_blocks(set.intermediate_size) * kLaneSet, p.h_run);
}
inline int64_t y_stride(const ExpertSet& set) { return w2_blocks(set.hidden_size) * kLanes; }

// One after the other in the workspace, each from a multiple of 256 bytes.
struct Parts {
  int64_t x, h, y, sorted, tile_list, num_tiles, end;
  Parts(const Products& p, const ExpertSet& set, int64_t tokens, int64_t pairs) {
    x = 0;
    h = x + round_up(tokens * x_stride(p, set) * 2, 256);
    y = h + round_up(pairs * h_stride(p, set) * 2, 256);
    sorted = y + round_up(pairs * y_stride(set) * 4, 256);
    tile_list = sorted + round_up(pairs * int64_t(sizeof(int32_t)), 256);
    num_tiles = tile_list + round_up(pairs * int64_t(sizeof(Tile)), 256);
    end = num_tiles + 256;
  }
};

// Whether the kernels before and after the products serve a call; m: of its matrices.
inline bool ends_serve(const MoeArgs& args, Matrix (&m)[2]) {
  const ExpertSet& set = *args.set;
  const PackedFormat* const format = packed_format(set.format);
  return set.layout == Layout::kBlocks && format != nullptr &&
         set.num_experts <= kMostRoutedExperts && args.top_k <= kMostTopK &&
         set.hidden_size <= kMostGridY * kCombineThreads && make_matrices(set, *format, m);
}

inline cudaError_t run_grouped(const Products& p, const Chunk& chunk, int64_t tokens,
                               void* workspace, cudaStream_t stream) {
  const ExpertSet& set = chunk.set;
  const PackedFormat& format = *packed_format(set.format);
  const int64_t pairs = tokens * chunk.top_k;
  const Parts parts(p, set, tokens, pairs);
  char* const bytes = static_cast<char*>(workspace);
  Limits limit{};
  if (cudaError_t e = limits(&limit); e != cudaSuccess) return e;

  Matrix m[2];
  make_matrices(set, format, m);
  const Routing routing{reinterpret_cast<int32_t*>(bytes + parts.num_tiles),
                        reinterpret_cast<Tile*>(bytes + parts.tile_list),
                        reinterpret_cast<int32_t*>(bytes + parts.sorted)};
  auto* const x = reinterpret_cast<uint16_t*>(bytes + parts.x);
  auto* const h = reinterpret_cast<uint16_t*>(bytes + parts.h);
  auto* const y = reinterpret_cast<float*>(bytes + parts.y);
  if (pairs > 0) {
    const int columns = p.columns(format, m, pairs / (set.num_experts + 1) + 1, limit);
    const int64_t rows = tokens < 4 * limit.multiprocessors ? tokens : 4 * limit.multiprocessors;
    cudaError_t error = ptx::launch(prepare, dim3(unsigned(1 + rows)), dim3(kPrepareThreads),
                                    size_t(set.num_experts) * 3 * sizeof(int), stream, chunk,
                                    int32_t(pairs), columns, routing, x, int(tokens),
                                    int(x_stride(p, set)), p.order(format));
    if (error != cudaSuccess) return error;

    Args a{};
    a.call = chunk;
    a.routing = routing;
    a.order = p.order(format);
    a.h = h;
    a.y = y;
    a.h_stride = int(h_stride(p, set));
    a.y_stride = int(y_stride(set));
    for (const bool down : {false, true}) {
      a.down = down;
      a.matrix = m[down];
      a.tokens = down ? h : x;
      a.token_k = down ? a.h_stride : int(x_stride(p, set));
      a.pairs_per_row = down ? 1 : int(chunk.top_k);
      error = p.launch(format, a, columns, pairs, limit, stream);
      if (error != cudaSuccess) return error;
    }
  }
  const dim3 grid(unsigned(tokens),
                  unsigned((set.hidden_size + kCombineThreads - 1) / kCombineThreads));
  return ptx::launch(combine, grid, dim3(kCombineThreads), size_t(chunk.top_k) * 8, stream, chunk,
                     static_cast<const float*>(y), int(y_stride(set)));
}

}  // namespace ey::cuda::grouped
