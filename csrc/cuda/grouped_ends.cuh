// SPDX-License-Identifier: Apache-2.0
// What comes before and after the products of grouped.cuh:
//
//   prepare  block 0: pairs sorted by expert and cut into tiles of one expert; the other blocks:
//            hidden states to bf16, in the order in which the format's products take them
//   sum_groups  of each row of ordered values, sums of groups of k, for zeros (scale.cuh) on Hopper
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

// A thread for each 32 k. The first ones of a group have its sum, the others and those behind the
// row zero. Orders change places within 32 k at most.
constexpr int kSumThreads = 256;
__global__ void __launch_bounds__(kSumThreads)
    sum_groups(const uint16_t* rows, int64_t count, int stride, int group_k, float* sums,
               int sums_stride) {
  const int64_t part = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (part >= count * sums_stride) return;
  const int k = int(part % sums_stride) * kPartK;
  float sum = 0.0f;
  if (k % group_k == 0) {
    const uint16_t* const row = rows + part / sums_stride * stride;
    const int end = k + group_k < stride ? k + group_k : stride;
    for (int i = k; i < end; i += Bf16::kPerVector) {
      float v[Bf16::kPerVector];
      unpack<Bf16>(ptx::load_uint4(row + i), v);
#pragma unroll
      for (const float x : v) sum += x;
    }
  }
  sums[part] = sum;
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
