// SPDX-License-Identifier: Apache-2.0
#include "grouped_ends.cuh"
#include "grouped_run.cuh"

namespace ey::cuda::grouped {

cudaError_t prepare_bf16(const Prepare& p, cudaStream_t stream) {
  auto* const x = static_cast<uint16_t*>(p.x);
  const cudaError_t error =
      ptx::launch(prepare, dim3(p.grid), dim3(kPrepareThreads), size_t(p.shared_bytes), stream,
                  p.call, p.pairs, p.columns, p.routing, x, p.tokens, p.x_stride, p.order);
  if (error != cudaSuccess || p.beside_stride == 0) return error;
  return sum_groups_of(x, p.tokens, p.x_stride, p.group_k, p.beside, p.beside_stride, stream);
}

cudaError_t sum_groups_of(const uint16_t* rows, int64_t count, int stride, int group_k, float* sums,
                          int sums_stride, cudaStream_t stream) {
  const int64_t blocks = (count * sums_stride + kSumThreads - 1) / kSumThreads;
  return ptx::launch(sum_groups, dim3(unsigned(blocks)), dim3(kSumThreads), 0, stream, rows, count,
                     stride, group_k, sums, sums_stride);
}

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
  p.matrices(set, m);
  const Routing routing{reinterpret_cast<int32_t*>(bytes + parts.num_tiles),
                        reinterpret_cast<Tile*>(bytes + parts.tile_list),
                        reinterpret_cast<int32_t*>(bytes + parts.sorted)};
  void* const x = bytes + parts.x;
  auto* const h = reinterpret_cast<uint16_t*>(bytes + parts.h);
  auto* const x_floats = reinterpret_cast<float*>(bytes + parts.x_floats);
  auto* const h_floats = reinterpret_cast<float*>(bytes + parts.h_floats);
  auto* const y = reinterpret_cast<float*>(bytes + parts.y);
  if (pairs > 0) {
    const int columns = p.columns(format, m, pairs / (set.num_experts + 1) + 1, limit);
    const int64_t rows = tokens < 4 * limit.multiprocessors ? tokens : 4 * limit.multiprocessors;
    const int strides[2] = {int(x_stride(p, set)), int(h_stride(p, set))};
    const int group_k = m[0].group_mask * kPartK + kPartK;  // of 4-bit weights, a chunk's at most
    const int beside[2] = {int(p.floats(set, strides[0])), int(p.floats(set, strides[1]))};
    Prepare first{};
    first.call = chunk;
    first.pairs = int32_t(pairs);
    first.columns = columns;
    first.routing = routing;
    first.x = x;
    first.beside = x_floats;
    first.tokens = int(tokens);
    first.x_stride = strides[0];
    first.beside_stride = beside[0];
    first.order = p.order(format);
    first.group_k = group_k;
    first.grid = unsigned(1 + rows);
    first.shared_bytes = int(set.num_experts * 3 * int64_t(sizeof(int)));
    cudaError_t error = p.prepare(first, stream);
    if (error != cudaSuccess) return error;

    Args a{};
    a.call = chunk;
    a.routing = routing;
    a.order = p.order(format);
    a.h = h;
    a.y = y;
    a.h_stride = strides[1];
    a.h_beside = h_floats;
    a.h_beside_stride = beside[1];
    a.y_stride = int(y_stride(set));
    for (const bool down : {false, true}) {
      a.down = down;
      a.matrix = m[down];
      a.tokens = static_cast<const uint16_t*>(down ? h : x);
      a.token_k = strides[down];
      a.beside = down ? h_floats : x_floats;
      a.beside_stride = beside[down];
      a.pairs_per_row = down ? 1 : int(chunk.top_k);
      if (down && beside[1] > 0 && p.value_bytes == 2) {
        error = sum_groups_of(h, pairs, strides[1], group_k, h_floats, beside[1], stream);
        if (error != cudaSuccess) return error;
      }
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
  cudaError_t error = ptx::allow_shared(prepare, kRoutingBytes);
  if (error == cudaSuccess) error = ptx::allow_shared(sum_groups, 0);
  return error != cudaSuccess ? error : ptx::allow_shared(combine, 0);
}

}  // namespace ey::cuda::grouped
