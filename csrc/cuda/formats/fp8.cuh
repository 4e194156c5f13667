// SPDX-License-Identifier: Apache-2.0
// fp8 (e4m3) weights in blocks: byte j of a dword is w[k + j]. A quad (4 steps) is 16 k: one mma.
//
// The bits seeeemmm, put where bf16 has its sign, the low 4 bits of its exponent and the high 3 of
// its mantissa, are the same number times 2^(7 - 127), subnormals too; a product with 2^120 makes
// it exact. e4m3's NaN (0x7f, 0xff: all 7 bits set) would be +-480; only there do the 7 bits carry
// when one is added, and the carry sets bf16's whole exponent.
#pragma once

#include "../format.cuh"

namespace ey::cuda {

struct Fp8Blocks {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr bool kScaled = true;
  static constexpr int kStepK = 4, kChunkK = 64, kQuads = 1, kSlices = 1, kTokenPad = 32,
                       kOrder = 4,
                       kMostBlocks = 8;  // 64 sums a lane, and 64 of a group

  // Pairs of k: (0, 2) for half 0, (1, 3) for half 1.
  __device__ static __forceinline__ uint32_t pair(const uint32_t (&dwords)[1], int, int half) {
    const uint32_t high = half ? dwords[0] : dwords[0] << 8;  // bytes at bits 8 and 24
    const uint32_t bits = high >> 4 & 0x07f007f0u;
    const uint32_t is_nan = (bits + 0x00100010u) & 0x08000800u;
    const uint32_t all = ((high & 0x80008000u) | bits) + is_nan * 15;
    return ptx::fma_bf16x2(all, 0x7b807b80u, kBf16MinusZeros);  // * 2^120
  }
  template <bool kOrdered>
  __device__ static __forceinline__ void tokens(const char* row, int t, uint32_t (&b)[2]) {
    tokens_of_4<kOrdered>(row, t, b);
  }
};

}  // namespace ey::cuda
