// SPDX-License-Identifier: Apache-2.0
// int4 weights in blocks: byte j of a dword has w[k + j] in its low nibble and w[k + 4 + j] in its
// high one, as code 0 .. 15. A quad (4 steps) is 32 k: two mma.
//
// A nibble q under the exponent of 128 is bf16 128 + q; minus 136 it is q - 8, exactly. With zeros
// in the packed weights, w = scale * (q - zero) = scale * ((q - 8) - (zero - 8)): see scale.cuh.
#pragma once

#include "../format.cuh"

namespace ey::cuda {

struct Int4Blocks {
  static constexpr Format kFormat = Format::kInt4;
  static constexpr bool kScaled = true;
  static constexpr int kStepK = 8, kChunkK = 128, kQuads = 1, kSlices = 2, kTokenPad = 64,
                       kOrder = 8,
                       kMostBlocks = 8;  // 64 sums a lane, and 64 of a group

  // Pairs of k: (0, 2), (4, 6) of slice 0, (1, 3), (5, 7) of slice 1.
  __device__ static __forceinline__ uint32_t pair(const uint32_t (&dwords)[1], int slice,
                                                  int half) {
    const uint32_t nibbles = dwords[0] >> (8 * slice + 4 * half) & 0x000f000fu;
    return ptx::fma_bf16x2(nibbles | 0x43004300u, kBf16Ones, 0xc308c308u);  // - 136
  }
  template <bool kOrdered>
  __device__ static __forceinline__ void tokens(const char* row, int t, uint32_t (&b)[4]) {
    tokens_of_8<kOrdered>(row, t, b);
  }
};

}  // namespace ey::cuda
