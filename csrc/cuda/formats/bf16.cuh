// SPDX-License-Identifier: Apache-2.0
// bf16 weights in blocks: a dword is the pair w[k], w[k + 1], as mma wants it. A quad (4 steps) is
// 8 k, so one mma takes two quads.
#pragma once

#include "../format.cuh"

namespace ey::cuda {

struct Bf16Blocks {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr bool kScaled = false;
  static constexpr int kStepK = 2, kChunkK = 64, kQuads = 2, kSlices = 1, kTokenPad = 16,
                       kOrder = 16,
                       kMostBlocks = 16;  // 128 sums a lane, and no others

  __device__ static __forceinline__ uint32_t pair(const uint32_t (&dwords)[2], int, int half) {
    return dwords[half];
  }
  // k 2t, 2t + 1 and 8 + 2t, 9 + 2t of 16
  template <bool kOrdered>
  __device__ static __forceinline__ void tokens(const char* row, int t, uint32_t (&b)[2]) {
    if constexpr (kOrdered) {
      const uint2 x = ptx::load_uint2(row + 8 * t);
      b[0] = x.x;
      b[1] = x.y;
    } else {
      b[0] = ptx::load_uint(row + 4 * t);
      b[1] = ptx::load_uint(row + 16 + 4 * t);
    }
  }
};

}  // namespace ey::cuda
