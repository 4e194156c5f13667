// SPDX-License-Identifier: Apache-2.0
// mxfp4 weights x 8-bit activations: twice an e2m1 value is an integer from -12 to 12, so vpshufb
// looks it up, 12 added, as an unsigned byte; the half goes into the scale.
#include "fast_tile.h"

namespace ey::cpu {
namespace {

struct Mxfp4 {
  static constexpr Format kFormat = Format::kMxfp4;
  static constexpr int kStep = 8, kDots = 2, kCentre = 12;
  static constexpr float kUnit = 0.5f;
  __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  template <int i>
  __m512i bytes(__m512i codes) const {
    const auto index = i == 0 ? codes : _mm512_srli_epi16(codes, 4);
    return _mm512_shuffle_epi8(table, _mm512_and_si512(index, _mm512_set1_epi8(15)));
  }
};

constexpr Kernel mxfp4_fast_avx512_vnni = fast_kernel<Mxfp4>();

}  // namespace
EY_REGISTER_KERNEL(mxfp4_fast_avx512_vnni);
}  // namespace ey::cpu
