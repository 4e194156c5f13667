// SPDX-License-Identifier: Apache-2.0
// What the grouped products of mma (grouped.cuh) and of wgmma (hopper.cuh) have in common: their
// arguments, and what a warp does with the sums of its block of weights and a tile of pairs.
#pragma once

#include "activation.cuh"
#include "chunk.cuh"
#include "parts.cuh"
#include "routing.cuh"

namespace ey::cuda::grouped {

struct Args {
  Chunk call;
  Matrix matrix;
  Routing routing;
  bool down;               // y of w2, else h of w13
  const uint16_t* tokens;  // ordered bf16 rows: x, or h
  int token_k;             // of a row, zeros behind what there is
  const float* beside;     // what Hopper's products take beside a row of tokens
  int beside_stride;
  int pairs_per_row;  // top_k for x, 1 for h
  int order;          // of h, when it is made
  uint16_t* h;        // [pairs, h_stride]; e4m3 where products are of that
  float* h_beside;    // [pairs, h_beside_stride], written with such an h
  int h_beside_stride;
  float* y;  // [pairs, y_stride]
  int h_stride, y_stride;
  int stages, stage_bytes, tokens_at;  // of the ring; where in a stage the tokens begin
};

// Sums of w13 through the activation: done(n, h) is told of rows first_row + i / 2 of h and columns
// 8 n + 2 t + i % 2, which take the place of sums[0][n]; 0 where the tile has no such column.
// sums[j][n]: rows 4 g + 2 j of the block (elements 0, 1) and 4 g + 2 j + 1 (2, 3), columns 8 n + 2
// t, + 1.
//
// Lanes of g < 4 have gate rows, the others the up rows of the same i. Each gives its partner what
// that one lacks: the first two of the four rows are finished by g < 4, the last two by the other.
__device__ __forceinline__ int first_row(int block, int lane) {
  return block * kLaneSet + lane / 4 % 4 * 4 + (lane < 16 ? 0 : 2);
}
template <int kBlocks, class Done>
__device__ __forceinline__ void finish_h(const Args& a, const Tile& tile, int block,
                                         float (&sums)[2][kBlocks][4], int lane, Done&& done) {
  const ExpertSet& set = a.call.set;
  const ExpertPointers& expert = set.experts[tile.expert];
  const bool is_gate = lane < 16;
  const int64_t row = first_row(block, lane);
  float gate_bias[2] = {}, up_bias[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row + i >= set.intermediate_size) continue;
    if (expert.gate_bias) gate_bias[i] = expert.gate_bias[row + i];
    if (expert.up_bias) up_bias[i] = expert.up_bias[row + i];
  }
  by_parts(sums, [&](int n, float (&first)[4], const float (&last)[4]) {
    const bool any = 8 * n < tile.count;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float h = 0.0f;
      if (any) {
        const float mine = is_gate ? first[i] : last[i];
        const float other = __shfl_xor_sync(kAllLanes, is_gate ? last[i] : first[i], 16);
        const float gate = (is_gate ? mine : other) + gate_bias[i / 2];
        const float up = (is_gate ? other : mine) + up_bias[i / 2];
        if (8 * n + 2 * (lane % 4) + i % 2 < tile.count) {
          h = activate(set.activation, gate, up, set.alpha, set.limit);
        }
      }
      first[i] = h;
    }
    if (any) done(n, first);
  });
}

// Experts without a gate: the four rows of a lane are four values of h.
template <int kBlocks>
__device__ __forceinline__ void finish_ungated(const Args& a, const Tile& tile, int block,
                                               const int* pairs, float (&sums)[2][kBlocks][4],
                                               int lane) {
  const ExpertSet& set = a.call.set;
  const ExpertPointers& expert = set.experts[tile.expert];
  const int g = lane / 4, t = lane % 4;
  const int64_t row = int64_t(block) * kLanes + 4 * g;
  int places[4];
  float bias[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    places[i] = place(a.order, int(row) + i);
    if (expert.up_bias && row + i < set.intermediate_size) bias[i] = expert.up_bias[row + i];
  }
  by_parts(sums, [&](int n, const float (&first)[4], const float (&last)[4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = 8 * n + 2 * t + i % 2;
      if (column >= tile.count) continue;
      const float up = (i < 4 ? first : last)[i % 4] + bias[i / 2];
      a.h[int64_t(pairs[column]) * a.h_stride + places[i / 2]] =
          ptx::float_to_bf16(activate_ungated(up));
    }
  });
}

// The same sums of w2 to y. pairs: of the tile.
template <int kBlocks>
__device__ __forceinline__ void finish_y(const Args& a, const Tile& tile, int block,
                                         const int* pairs, float (&sums)[2][kBlocks][4], int lane) {
  const ExpertSet& set = a.call.set;
  const ExpertPointers& expert = set.experts[tile.expert];
  const int g = lane / 4, t = lane % 4;
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
      ptx::store16_global(a.y + int64_t(pairs[column]) * a.y_stride + row,
                          {sums[0][n][i] + bias[0], sums[0][n][2 + i] + bias[1],
                           sums[1][n][i] + bias[2], sums[1][n][2 + i] + bias[3]});
    }
  }
}

// To y, or as bf16 to h.
template <int kBlocks>
__device__ __forceinline__ void finish_tile(const Args& a, const Tile& tile, int block,
                                            const int* pairs, float (&sums)[2][kBlocks][4],
                                            int lane) {
  if (a.down) {
    finish_y<kBlocks>(a, tile, block, pairs, sums, lane);
    return;
  }
  if (!has_gate(a.call.set.activation)) {
    finish_ungated<kBlocks>(a, tile, block, pairs, sums, lane);
    return;
  }
  const int row = first_row(block, lane), t = lane % 4;
  const int places[2] = {place(a.order, row), place(a.order, row + 1)};
  finish_h(a, tile, block, sums, lane, [&](int n, const float (&h)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * n + 2 * t + i % 2;
      if (column >= tile.count) continue;
      a.h[int64_t(pairs[column]) * a.h_stride + places[i / 2]] = ptx::float_to_bf16(h[i]);
    }
  });
}

}  // namespace ey::cuda::grouped
