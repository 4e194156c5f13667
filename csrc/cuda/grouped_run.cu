// SPDX-License-Identifier: Apache-2.0
#include "grouped_ends.cuh"
#include "grouped_run.cuh"

namespace ey::cuda::grouped {
namespace {

constexpr int kRoutingBytes = 48 * 1024;  // of prepare

}  // namespace

cudaError_t run_grouped(const Products& p, const Chunk& chunk, int64_t tokens, void* workspace,
                        cudaStream_t stream) {
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
    cudaError_t error =
        ptx::launch(prepare, dim3(unsigned(1 + rows)), dim3(kPrepareThreads),
                    size_t(set.num_experts) * 3 * sizeof(int), stream, chunk, int32_t(pairs),
                    columns, routing, x, int(tokens), int(x_stride(p, set)), p.order(format));
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

cudaError_t load_ends() {
  const cudaError_t error = ptx::allow_shared(prepare, kRoutingBytes);
  return error != cudaSuccess ? error : ptx::allow_shared(combine, 0);
}

}  // namespace ey::cuda::grouped
