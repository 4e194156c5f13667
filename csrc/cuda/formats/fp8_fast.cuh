// SPDX-License-Identifier: Apache-2.0
// fp8 (e4m3) weights that meet e4m3 activations on Hopper: byte j of a dword is w[k + j], which is
// what a register of wgmma's A operand holds of a row. A quad (4 steps) is 16 k, half of a product;
// weights and tokens keep their order. A chunk is a group of activations, 128 k.
#pragma once

#include "../format.cuh"

namespace ey::cuda {

struct Fp8FastBlocks {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr bool kScaled = true;
  static constexpr int kStepK = 4, kChunkK = 128, kQuads = 2, kTokenPad = 0;
};

}  // namespace ey::cuda
