// SPDX-License-Identifier: Apache-2.0
// What a packed format is to the kernels of blocks: a struct in formats/, one file each, with
//   kFormat    its name in moe.h
//   kScaled    whether sums of products are to be multiplied by scales (scale.cuh)
//   kStepK     k of one step of blocks.h
//   kChunkK    k that one stage of the ring in shared memory holds: 2 to 4 KiB of weights a block
//   kQuads     quads (4 steps, 512 bytes: 16 bytes a lane) that kSlices mma consume together
//   kSlices    m16n8k16 products of a lane's kQuads dwords of one row
//   kTokenPad  bytes between two token rows in shared memory beyond a multiple of 128, so that the
//              loads of `tokens` meet no bank conflict
//   pair       the two neighbours along mma's k of (slice, half), exact in bf16, from those dwords
//   tokens     the same k of a token: b[2 * slice + half]. row points to the first k of the quads;
//              kOrdered: values lie where place(kOrder, k) says, which spares the shuffling
//   kMostBlocks  blocks of 8 columns that a warp of the grouped kernel has sums for
//   kOrder     the run of k in which ordered values change places, for mma; for wgmma it follows
//              from kStepK
// Products are of bf16 by bf16, exact in fp32: integer codes meet activations as they are.
#pragma once

#include "../blocks.h"
#include "ptx.cuh"

namespace ey::cuda {

constexpr uint32_t kBf16Ones = 0x3f803f80u;
constexpr uint32_t kBf16MinusZeros = 0x80008000u;  // x * y + -0 is x * y, also where that is -0

// From the pairs (x0, x1) and (x2, x3): (x0, x2) and (x1, x3).
__device__ __forceinline__ uint32_t even_k(uint32_t low, uint32_t high) {
  return ptx::permute_bytes(low, high, 0x5410);
}
__device__ __forceinline__ uint32_t odd_k(uint32_t low, uint32_t high) {
  return ptx::permute_bytes(low, high, 0x7632);
}

// For formats whose dword is 4 k, with the pairs (0, 2), (1, 3).
template <bool kOrdered>
__device__ __forceinline__ void tokens_of_4(const char* row, int t, uint32_t (&b)[2]) {
  const uint2 x = ptx::load_uint2(row + 8 * t);
  b[0] = kOrdered ? x.x : even_k(x.x, x.y);
  b[1] = kOrdered ? x.y : odd_k(x.x, x.y);
}
// For formats whose dword is 8 k, with the pairs (0, 2), (4, 6), (1, 3), (5, 7).
template <bool kOrdered>
__device__ __forceinline__ void tokens_of_8(const char* row, int t, uint32_t (&b)[4]) {
  const uint4 x = ptx::load_uint4(row + 16 * t);
  b[0] = kOrdered ? x.x : even_k(x.x, x.y);
  b[1] = kOrdered ? x.y : even_k(x.z, x.w);
  b[2] = kOrdered ? x.z : odd_k(x.x, x.y);
  b[3] = kOrdered ? x.w : odd_k(x.z, x.w);
}
// Where value k of a row of ordered tokens lies. Runs of 4 and 8 k: the pairs above, one behind the
// other. Runs of 16, for formats whose dword is a pair: what a lane takes of two quads.
//
// wgmma takes tokens from shared memory as they lie: 16 k, of which lane t's weights are 2 t, 2 t +
// 1 and 8 + 2 t, 9 + 2 t. kWgmmaOrder + k of a step: where those pairs are of step t of a quad.
constexpr int kWgmmaOrder = 64;
constexpr int kLongestRun = 32;  // of any order

__host__ __device__ __forceinline__ int place_for_wgmma(int step_k, int k) {
  if (step_k == 2) return k;  // steps are pairs, two quads are 16 k
  const int run = 4 * step_k, t = k % run / step_k, i = k % step_k;
  return k - k % run + (step_k == 4 ? i % 2 * 8 + i / 2 : i % 2 * 16 + i / 4 * 8 + i / 2 % 2) +
         2 * t;
}

__host__ __device__ __forceinline__ int place(int order, int k) {
  if (order > kWgmmaOrder) return place_for_wgmma(order - kWgmmaOrder, k);
  const int i = k % order;
  return k - i +
         (order == 4   ? i % 2 * 2 + i / 2
          : order == 8 ? i % 2 * 4 + i / 2
                       : i % 8 / 2 * 4 + i / 8 * 2 + i % 2);
}

}  // namespace ey::cuda
