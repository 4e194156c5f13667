// SPDX-License-Identifier: Apache-2.0
// The experts layer of packed weights for many tokens, on tensor cores:
//
//   prepare          pairs by expert, hidden states in the order of the products (grouped_ends.cuh)
//   experts_grouped  gate and up: h[p, i] = act(gate_e[i] . x[t], up_e[i] . x[t]), rounded to bf16
//   experts_grouped  down: y[p, j] = down_e[j] . h[p] + down_bias_e[j], fp32
//   combine          out[t, j] = sum_k weights[t, k] * y[t * top_k + k, j] (grouped_ends.cuh)
//
// A block of threads multiplies kWarps blocks of weights, one a warp, with one tile of pairs.
// Tokens are gathered by the copies themselves, once for all warps. Each warp has 32 rows x all
// columns of the tile in registers: that halves what it reads of tokens from shared memory for a
// product, against 16 rows, and leaves room for a group's sums beside the sums.
#pragma once

#include "activation.cuh"
#include "chunk.cuh"
#include "routing.cuh"

namespace ey::cuda::grouped {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kFewColumns = 16;

struct Args {
  Chunk call;
  Matrix matrix;
  Routing routing;
  bool down;               // y of w2, else h of w13
  const uint16_t* tokens;  // ordered bf16 rows: x, or h
  int token_k;             // of a row, zeros behind what there is
  int pairs_per_row;       // top_k for x, 1 for h
  int order;               // of h, when it is made
  uint16_t* h;             // [pairs, h_stride]
  float* y;                // [pairs, y_stride]
  int h_stride, y_stride;
  int stages, stage_bytes, tokens_at;  // of the ring; where in a stage the tokens begin
};

// Grid: (tiles, at most; ceil(blocks of an expert / kWarps)). Tiles vary fastest: blocks that run
// together read the same few weights of each expert, from DRAM once.
template <class F, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1) experts_grouped(const __grid_constant__ Args a) {
  if (int(blockIdx.x) >= *a.routing.num_tiles) return;
  const Tile tile = a.routing.tiles[blockIdx.x];
  const ExpertSet& set = a.call.set;
  const ExpertPointers& expert = set.experts[tile.expert];
  const Matrix& m = a.matrix;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int block = int(blockIdx.y) * kWarps + warp;
  const bool has_block = block < m.num_blocks;
  const char* const weights = static_cast<const char*>(a.down ? expert.down : expert.gate);
  char* const ring = ptx::dynamic_shared();
  int* const pairs = reinterpret_cast<int*>(ring + a.stages * a.stage_bytes);  // of the tile
  for (int i = thread; i < tile.count; i += kThreads) pairs[i] = a.routing.sorted[tile.first + i];
  __syncthreads();  // the pairs are known

  const int my_weights = warp * (m.head_bytes * m.lines_in_chunk + ChunkShape<F>::kQuadBytes);
  const auto copy = [&](int chunk, char* stage) {
    if (chunk < m.num_chunks) {
      if (has_block) {
        copy_chunk<F>(m, weights + block * m.block_bytes, chunk, stage + my_weights, lane);
      }
      constexpr int kPieces = ChunkShape<F>::kPieces;
      for (int i = thread; i < tile.count * kPieces; i += kThreads) {
        const int column = i / kPieces, piece = i % kPieces;
        const int k = chunk * F::kChunkK + piece * 8;
        const int64_t row = pairs[column] / a.pairs_per_row;
        ptx::copy16_async(stage + a.tokens_at + column * ChunkShape<F>::kTokenBytes + piece * 16,
                          k < a.token_k ? a.tokens + row * a.token_k + k : a.tokens, k < a.token_k);
      }
    }
    ptx::copy_commit();  // also when empty: groups are counted
  };

  float sums[2][kBlocks][4] = {};
  int read = 0, write = a.stages - 1;
  for (int chunk = 0; chunk < a.stages - 1; ++chunk) copy(chunk, ring + chunk * a.stage_bytes);
  for (int chunk = 0; chunk < m.num_chunks; ++chunk) {
    ptx::copy_wait_for(a.stages - 2);
    __syncthreads();  // this stage is whole, and nobody reads the one before any more
    copy(chunk + a.stages - 1, ring + write * a.stage_bytes);
    write = write + 1 == a.stages ? 0 : write + 1;
    const char* const stage = ring + read * a.stage_bytes;
    read = read + 1 == a.stages ? 0 : read + 1;
    if (has_block) {
      multiply_chunk<F, kBlocks, true>(m, stage + my_weights, stage + a.tokens_at, tile.count, lane,
                                       sums);
    }
  }
  ptx::copy_wait_for(0);
  if (!has_block) return;

  const int g = lane / 4, t = lane % 4;
  if (a.down) {
    const int64_t row = int64_t(block) * kLanes + 4 * g;
    float bias[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (expert.down_bias && row + i < set.hidden_size) bias[i] = expert.down_bias[row + i];
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + 2 * t + i;
        if (column >= tile.count) continue;
        ptx::store_float4(a.y + int64_t(pairs[column]) * a.y_stride + row,
                          {sums[0][n][i] + bias[0], sums[0][n][2 + i] + bias[1],
                           sums[1][n][i] + bias[2], sums[1][n][2 + i] + bias[3]});
      }
    }
  } else {
    // Lanes of g < 4 have gate rows, the others the up rows of the same i. Each gives its partner
    // what that one lacks: the first two of the four rows are finished by g < 4, the last two by
    // the other.
    const bool has_gate = g < 4;
    const int64_t row = int64_t(block) * kLaneSet + g % 4 * 4 + (has_gate ? 0 : 2);
    float gate_bias[2] = {}, up_bias[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + i >= set.intermediate_size) continue;
      if (expert.gate_bias) gate_bias[i] = expert.gate_bias[row + i];
      if (expert.up_bias) up_bias[i] = expert.up_bias[row + i];
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if (8 * n >= tile.count) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float mine = has_gate ? sums[0][n][i] : sums[1][n][i];
        const float other =
            __shfl_xor_sync(kAllLanes, has_gate ? sums[1][n][i] : sums[0][n][i], 16);
        const int column = 8 * n + 2 * t + i % 2;
        if (column >= tile.count) continue;
        const float gate = (has_gate ? mine : other) + gate_bias[i / 2];
        const float up = (has_gate ? other : mine) + up_bias[i / 2];
        a.h[int64_t(pairs[column]) * a.h_stride + place(a.order, int(row) + i / 2)] =
            ptx::float_to_bf16(activate(set.activation, gate, up, set.alpha, set.limit));
      }
    }
  }
}

}  // namespace ey::cuda::grouped
