// SPDX-License-Identifier: Apache-2.0
// The experts layer as dot products, one warp a weight row:
//
//   gate_up_rows  h[p, i] = act(gate_e[i] . x[t], up_e[i] . x[t])    p = t * top_k + k, e = ids[p]
//   down_rows     out[t, j] = sum_k weights[t, k] * (down_e[j] . h[p] + down_bias_e[j])
//
// Serves any size, stride and alignment and needs no tensor cores: the kernel for few tokens, and
// the one that the faster ones are compared with. Sums and h are fp32; each output element is
// written by one warp that adds the experts in slot order, so results do not depend on the
// schedule.
#pragma once

#include "activation.cuh"
#include "choice.cuh"
#include "numbers.cuh"
#include "warp.cuh"

namespace ey::cuda::rows {

constexpr int kWarps = 8;  // of one block, each with a row of its own
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSm =
    4;  // 64 registers a thread: 32 warps, with 2 to 4 KiB of loads in flight each
constexpr int kStage = 2048;  // values of x in shared memory at a time: 8 KiB

__device__ __forceinline__ float sum_of_warp(float v) {
  for (int distance = 16; distance > 0; distance /= 2) {
    v += __shfl_xor_sync(kAllLanes, v, distance);
  }
  return v;
}

// Vectors of x in shared memory, 4 floats of each vector side by side ("pieces"), so that the
// 16-byte loads of neighbouring lanes meet no bank conflict.
template <class W>
struct StagedX {
  static constexpr int kPieces = W::kPerVector / 4;
  static constexpr int kPiece = kStage / kPieces;  // floats
  float* base;
  __device__ __forceinline__ static int place(int i) {
    return i % W::kPerVector / 4 * kPiece + i / W::kPerVector * 4 + i % 4;
  }
  __device__ __forceinline__ float4 four(int vector, int piece) const {
    return ptx::load_float4(base + piece * kPiece + vector * 4);
  }
  __device__ __forceinline__ float one(int i) const { return base[place(i)]; }
};

// Vectors of a row of h in global memory.
template <class W>
struct RowOfH {
  static constexpr int kPieces = W::kPerVector / 4;
  const float* base;
  __device__ __forceinline__ float4 four(int vector, int piece) const {
    return ptx::load_float4(base + vector * W::kPerVector + piece * 4);
  }
  __device__ __forceinline__ float one(int i) const { return base[i]; }
};

// sums[r] += this lane's share of rows[r][0:n] . x[0:n]
template <class W, int R, class X>
__device__ __forceinline__ void add_dots(const W* const (&rows)[R], X x, int n, int lane,
                                         float (&sums)[R]) {
  uintptr_t addresses = 0;
  for (int r = 0; r < R; ++r) addresses |= reinterpret_cast<uintptr_t>(rows[r]);
  const int vectors = addresses % 16 == 0 ? n / W::kPerVector : 0;
#pragma unroll 4 / R  // 4 vectors of 16 bytes in flight a lane
  for (int v = lane; v < vectors; v += 32) {
    uint4 packed[R];
    for (int r = 0; r < R; ++r) packed[r] = ptx::load16_once(rows[r] + v * W::kPerVector);
    float4 xs[X::kPieces];
    for (int piece = 0; piece < X::kPieces; ++piece) xs[piece] = x.four(v, piece);
    for (int r = 0; r < R; ++r) {
      float w[W::kPerVector];
      unpack<W>(packed[r], w);
      for (int piece = 0; piece < X::kPieces; ++piece) {
        sums[r] += w[4 * piece] * xs[piece].x + w[4 * piece + 1] * xs[piece].y +
                   w[4 * piece + 2] * xs[piece].z + w[4 * piece + 3] * xs[piece].w;
      }
    }
  }
  for (int i = vectors * W::kPerVector + lane; i < n; i += 32) {  // the tail, or an unaligned row
    const float xi = x.one(i);
    for (int r = 0; r < R; ++r) sums[r] += rows[r][i].value() * xi;
  }
}

template <class W>
__device__ __forceinline__ const W* row_of(const void* matrix, int64_t row_stride, int64_t row) {
  return reinterpret_cast<const W*>(static_cast<const char*>(matrix) + row * row_stride);
}

// h is [pairs, h_stride], h_stride a multiple of 8.
// Grid: (pairs of the chunk, ceil(intermediate_size / kWarps)). Pairs vary fastest, so the blocks
// that run together read the same few rows of each expert: from DRAM once, from L2 thereafter.
template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gate_up_rows(const Chunk c, float* h, int64_t h_stride) {
  const int64_t pair = blockIdx.x;
  int64_t id;
  ExpertPointers expert;
  if (choose(c, pair, &id, &expert) != Chosen::kExpert) return;  // the whole block, or none of it

  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.y) * kWarps + threadIdx.x / 32;
  const bool has_row = row < c.set.intermediate_size;
  const int64_t hidden_size = c.set.hidden_size;
  const int64_t x_begin = pair / c.top_k * hidden_size;
  const W* const gate = row_of<W>(expert.gate, c.set.gate_up_row_stride, row);
  const W* const up = row_of<W>(expert.up, c.set.gate_up_row_stride, row);

  const StagedX<W> x{reinterpret_cast<float*>(ptx::dynamic_shared())};
  float sums[2] = {0.0f, 0.0f};
  for (int64_t begin = 0; begin < hidden_size; begin += kStage) {
    const int n = int(hidden_size - begin < kStage ? hidden_size - begin : kStage);
    if (begin > 0) __syncthreads();  // everyone is done with the stage before
    for (int i = threadIdx.x; i < n; i += kThreads) {
      x.base[StagedX<W>::place(i)] =
          load_number(c.hidden_states, c.hidden_dtype, x_begin + begin + i);
    }
    __syncthreads();  // the stage is whole
    if (has_row) {
      const W* const rows[2] = {gate + begin, up + begin};
      add_dots(rows, x, n, lane, sums);
    }
  }
  if (!has_row) return;  // a whole warp: the shuffles below have all their lanes

  float gate_sum = sum_of_warp(sums[0]);
  float up_sum = sum_of_warp(sums[1]);
  if (lane == 0) {
    if (expert.gate_bias) gate_sum += expert.gate_bias[row];
    if (expert.up_bias) up_sum += expert.up_bias[row];
    h[pair * h_stride + row] =
        activate_any(c.set.activation, gate_sum, up_sum, c.set.alpha, c.set.limit);
  }
}

// Grid: (tokens of the chunk, ceil(hidden_size / kWarps)).
template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    down_rows(const Chunk c, const float* h, int64_t h_stride) {
  const int64_t token = blockIdx.x;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.y) * kWarps + threadIdx.x / 32;
  if (row >= c.set.hidden_size) return;

  float sum = 0.0f;
  for (int64_t k = 0; k < c.top_k; ++k) {
    const int64_t pair = token * c.top_k + k;
    int64_t id;
    ExpertPointers expert;
    const Chosen chosen = choose(c, pair, &id, &expert);
    if (chosen == Chosen::kNone) continue;
    if (chosen == Chosen::kBadId) {
      sum += refuse(c, token, id, row == 0 && lane == 0);
      continue;
    }
    const W* const rows[1] = {row_of<W>(expert.down, c.set.down_row_stride, row)};
    float dot[1] = {0.0f};
    add_dots(rows, RowOfH<W>{h + pair * h_stride}, int(c.set.intermediate_size), lane, dot);
    float value = sum_of_warp(dot[0]);
    if (expert.down_bias) value += expert.down_bias[row];
    sum += load_number(c.topk_weights, c.weights_dtype, pair) * value;
  }
  if (lane == 0) store_number(c.out, c.out_dtype, token * c.set.hidden_size + row, sum);
}

}  // namespace ey::cuda::rows
