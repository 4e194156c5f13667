// SPDX-License-Identifier: Apache-2.0
// mxfp4 weights in blocks: e2m1 codes (sign, 2 bits of exponent, 1 of mantissa), byte j of a dword
// with w[k + j] in its low nibble and w[k + 4 + j] in its high one. A quad (4 steps) is 32 k: two
// mma.
//
// The bits seem, put where bf16 has its sign, the low 2 bits of its exponent and the high one of
// its mantissa, are the same number times 2^(1 - 127), 0.5 too; a product with 2^126 makes it
// exact.
#pragma once

#include "../format.cuh"

namespace ey::cuda {

struct Mxfp4Blocks {
  static constexpr Format kFormat = Format::kMxfp4;
  static constexpr bool kScaled = true;
  static constexpr int kStepK = 8, kChunkK = 128, kQuads = 1, kSlices = 2, kTokenPad = 64,
                       kOrder = 8,
                       kMostBlocks = 8;  // 64 sums a lane, and 64 of a group

  // Pairs of k: (0, 2), (4, 6) of slice 0, (1, 3), (5, 7) of slice 1.
  __device__ static __forceinline__ uint32_t pair(const uint32_t (&dwords)[1], int slice,
                                                  int half) {
    const uint32_t nibbles = dwords[0] >> (8 * slice + 4 * half);
    const uint32_t bits = (nibbles << 12 & 0x80008000u) | (nibbles << 6 & 0x01c001c0u);
    return ptx::fma_bf16x2(bits, 0x7e807e80u, kBf16MinusZeros);  // * 2^126
  }
  template <bool kOrdered>
  __device__ static __forceinline__ void tokens(const char* row, int t, uint32_t (&b)[4]) {
    tokens_of_8<kOrdered>(row, t, b);
  }
};

}  // namespace ey::cuda
