// SPDX-License-Identifier: Apache-2.0
// int4 weights x 8-bit activations: the low nibbles of a step are its first four k, the high ones
// the other four. A step of eight k is 2 loads, 2 shifts, 4 masks and 4 dots a token.
#include "fast_tile.h"

namespace ey::cpu {
namespace {

struct Int4 {
  static constexpr Format kFormat = Format::kInt4;
  static constexpr int kStep = 8, kDots = 2, kCentre = 8;
  static constexpr float kUnit = 1;
  template <int i>
  __m512i bytes(__m512i codes) const {
    return _mm512_and_si512(i == 0 ? codes : _mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15));
  }
};

constexpr Kernel int4_fast_avx512_vnni = fast_kernel<Int4>();

}  // namespace
EY_REGISTER_KERNEL(int4_fast_avx512_vnni);
}  // namespace ey::cpu
