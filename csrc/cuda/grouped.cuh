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

#include "grouped_epilogue.cuh"

namespace ey::cuda::grouped {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kFewColumns = 16;

// Grid: (tiles, at most; ceil(blocks of an expert / kWarps)). Tiles vary fastest: blocks that run
// together read the same few weights of each expert, from DRAM once.
template <class F, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1) experts_grouped(const __grid_constant__ Args a) {
  if (int(blockIdx.x) >= *a.routing.num_tiles) return;
  const Tile tile = a.routing.tiles[blockIdx.x];
  const ExpertPointers& expert = a.call.set.experts[tile.expert];
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

  finish_tile<kBlocks>(a, tile, block, pairs, sums, lane);
}

}  // namespace ey::cuda::grouped
