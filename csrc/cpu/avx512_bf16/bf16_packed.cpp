// SPDX-License-Identifier: Apache-2.0
// Packed bf16 weights x bf16 activations: a step of two k is 2 loads and 2 dot products a token, so
// 12 tokens are 24 dots (12 cycles) against 14 loads (7 cycles).
#include "nibbles.h"

namespace ey::cpu {
namespace {

struct Plain {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr float kCentre = 0;
  static constexpr int kStep = 2, kDots = 1;
  static constexpr int pair(int) { return 0; }
  static constexpr int order(int place) { return place; }
  template <int>
  __m512i weights(__m512i codes) const {
    return codes;
  }
};

constexpr Kernel bf16_packed_avx512_bf16 = exact_kernel<Plain, multiply_directly<Plain>>(0);

}  // namespace
EY_REGISTER_KERNEL(bf16_packed_avx512_bf16);
}  // namespace ey::cpu
