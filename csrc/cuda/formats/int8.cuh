// SPDX-License-Identifier: Apache-2.0
// int8 weights in blocks: byte j of a dword is w[k + j] + 128. A quad (4 steps) is 16 k: one mma.
//
// A byte b = 128 h + l becomes bf16 in two exact terms: 128 + l by putting l's 7 bits under the
// exponent of 128, and -256 or -128 (h clear or set) by flipping one exponent bit of -256. Their
// sum is b - 128.
#pragma once

#include "../format.cuh"

namespace ey::cuda {

struct Int8Blocks {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr bool kScaled = true;
  static constexpr int kStepK = 4, kChunkK = 64, kQuads = 1, kSlices = 1, kTokenPad = 32,
                       kOrder = 4,
                       kMostBlocks = 8;  // 64 sums a lane, and 64 of a group

  // Pairs of k: (0, 2) for half 0, (1, 3) for half 1.
  __device__ static __forceinline__ uint32_t pair(const uint32_t (&dwords)[1], int, int half) {
    const uint32_t bytes = dwords[0] >> 8 * half;
    const uint32_t low = (bytes & 0x007f007fu) | 0x43004300u;   // 128 + l
    const uint32_t high = (bytes & 0x00800080u) ^ 0xc380c380u;  // -256, or -128
    return ptx::fma_bf16x2(low, kBf16Ones, high);
  }
  template <bool kOrdered>
  __device__ static __forceinline__ void tokens(const char* row, int t, uint32_t (&b)[2]) {
    tokens_of_4<kOrdered>(row, t, b);
  }
};

}  // namespace ey::cuda
