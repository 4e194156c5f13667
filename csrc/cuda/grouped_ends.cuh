// SPDX-License-Identifier: Apache-2.0
// What comes before and after the products of grouped.cuh:
//
//   prepare  block 0: pairs sorted by expert and cut into tiles of one expert; the other blocks:
//            hidden states to bf16, in the order in which the format's products take them
//   combine  out[t, j] = sum_k weights[t, k] * y[t * top_k + k, j], slots in order
#pragma once

#include "format.cuh"
#include "grouped_run.cuh"
#include "routing.cuh"

namespace ey::cuda::grouped {

constexpr int kPrepareThreads = 1024;

// Grid: 1 + as many as share the rows of x.
__global__ void __launch_bounds__(kPrepareThreads)
    prepare(const Chunk c, int32_t pairs, int32_t pairs_per_tile, const Routing r, uint16_t* x,
            int tokens, int x_stride, int order) {
  if (blockIdx.x == 0) {
    route_pairs<kPrepareThreads>(c, pairs, pairs_per_tile, r);
    return;
  }
  const int64_t hidden = c.set.hidden_size;
  for (int64_t row = blockIdx.x - 1; row < tokens; row += gridDim.x - 1) {
    for (int k = threadIdx.x; k < x_stride; k += kPrepareThreads) {
      const float value =
          k < hidden ? load_number(c.hidden_states, c.hidden_dtype, row * hidden + k) : 0.0f;
      x[row * x_stride + place(order, k)] = ptx::float_to_bf16(value);
    }
  }
}

// Grid: (tokens, ceil(hidden_size / kCombineThreads)). Shared memory: 2 words a slot.
__global__ void __launch_bounds__(kCombineThreads)
    combine(const Chunk c, const float* y, int y_stride) {
  const int64_t token = blockIdx.x;
  const int top_k = int(c.top_k);
  float* const weights = reinterpret_cast<float*>(ptx::dynamic_shared());
  int* const is_here = reinterpret_cast<int*>(weights + top_k);
  for (int k = threadIdx.x; k < top_k; k += kCombineThreads) {
    int64_t id;
    ExpertPointers expert;
    const Chosen chosen = choose(c, token * top_k + k, &id, &expert);
    is_here[k] = chosen == Chosen::kExpert;
    weights[k] = chosen == Chosen::kBadId ? refuse(c, token, id, blockIdx.y == 0)
                 : is_here[k] ? load_number(c.topk_weights, c.weights_dtype, token * top_k + k)
                              : 0.0f;
  }
  __syncthreads();  // slots are known
  const int64_t column = int64_t(blockIdx.y) * kCombineThreads + threadIdx.x;
  if (column >= c.set.hidden_size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int k = 0; k < top_k; ++k) {
    const float value = is_here[k] ? y[(token * top_k + k) * y_stride + column] : 1.0f;
    sum += weights[k] * value;
  }
  store_number(c.out, c.out_dtype, token * c.set.hidden_size + column, sum);
}

}  // namespace ey::cuda::grouped
