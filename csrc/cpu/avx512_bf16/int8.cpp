// SPDX-License-Identifier: Apache-2.0
// int8 weights x bf16 activations: integers of 8 bits are bf16 exactly. The tables hold magnitudes
// 0 .. 127; -128, which only the checkpoints of others have, is looked up as 0 and mended.
#include "bytes.h"

namespace ey::cpu {
namespace {

constexpr uint32_t bf16_of_integer(int v) {
  return __builtin_bit_cast(uint32_t, static_cast<float>(v)) >> 16;
}
constexpr ByteTable kUpper = byte_table(bf16_of_integer, 8);
constexpr ByteTable kLower = byte_table(bf16_of_integer, 0);

struct Int8 {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr float kCentre = 128;

  ByteLookup upper_of{kUpper}, lower_of{kLower};

  void bytes(__m512i codes, __m512i& upper, __m512i& lower) const {
    const auto sign = _mm512_set1_epi8(-128);
    const auto value = _mm512_xor_si512(codes, sign);
    const auto magnitude = _mm512_abs_epi8(value);  // of -128: 128, index 0
    const auto found = upper_of(magnitude);
    const auto mended = _mm512_mask_mov_epi8(found, _mm512_movepi8_mask(magnitude),
                                             _mm512_set1_epi8(bf16_of_integer(128) >> 8));
    upper = _mm512_ternarylogic_epi32(mended, value, sign, 0xF8);  // mended | value & sign
    lower = lower_of(magnitude);
  }
};

constexpr Kernel int8_avx512_bf16 = byte_kernel<Int8>();

}  // namespace
EY_REGISTER_KERNEL(int8_avx512_bf16);
}  // namespace ey::cpu
