// SPDX-License-Identifier: Apache-2.0
// What a lane does to the sums of all columns of its tile, in instructions for a few of them.
//
// Registers have no index at run time. Unrolled over 128 columns, the activation alone is 64 copies
// of itself for a lane: half a megabyte of instructions, which no cache holds and which take ptxas
// most of its time. Here a part of the columns is done, all sums move up by a part, the first ones
// to the end, and the same instructions do the next: a move for each sum and part, against some 40
// instructions for a value of h.
#pragma once

#include "ptx.cuh"

namespace ey::cuda {

constexpr int kPartBlocks = 4;  // of 8 columns

__device__ __forceinline__ void move(const float (&from)[4], float (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = from[i];
}

// body(n, s0, s1) for each block n of columns: its sums[0][n] and sums[1][n], which it may change.
// Afterwards sums lie where they lay.
template <int kBlocks, class Body>
__device__ __forceinline__ void by_parts(float (&sums)[2][kBlocks][4], Body&& body) {
  constexpr int kPart = kBlocks < kPartBlocks ? kBlocks : kPartBlocks;
  static_assert(kBlocks % kPart == 0);
#pragma unroll 1
  for (int first = 0; first < kBlocks; first += kPart) {
#pragma unroll
    for (int n = 0; n < kPart; ++n) body(first + n, sums[0][n], sums[1][n]);
    if constexpr (kBlocks == kPart) break;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float done[kPart][4];
#pragma unroll
      for (int n = 0; n < kPart; ++n) move(sums[j][n], done[n]);
#pragma unroll
      for (int n = kPart; n < kBlocks; ++n) move(sums[j][n], sums[j][n - kPart]);
#pragma unroll
      for (int n = 0; n < kPart; ++n) move(done[n], sums[j][kBlocks - kPart + n]);
    }
  }
}

}  // namespace ey::cuda
