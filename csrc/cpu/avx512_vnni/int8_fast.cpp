// SPDX-License-Identifier: Apache-2.0
// int8 weights x 8-bit activations: codes are bytes already. A step of four k is 2 loads and 2 dots
// a token: with 12 tokens 24 dots (12 cycles) against 14 loads (7 cycles).
#include "fast_tile.h"

namespace ey::cpu {
namespace {

struct Int8 {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kStep = 4, kDots = 1, kCentre = 128;
  static constexpr float kUnit = 1;
  template <int>
  __m512i bytes(__m512i codes) const {
    return codes;
  }
};

constexpr Kernel int8_fast_avx512_vnni = fast_kernel<Int8>();

}  // namespace
EY_REGISTER_KERNEL(int8_fast_avx512_vnni);
}  // namespace ey::cpu
