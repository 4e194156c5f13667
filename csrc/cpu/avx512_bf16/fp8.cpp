// SPDX-License-Identifier: Apache-2.0
// fp8 e4m3 weights x bf16 activations: every e4m3 value is a bf16. The tables are indexed by the
// code without its sign.
#include "bytes.h"

namespace ey::cpu {
namespace {

constexpr uint32_t bf16_of_e4m3(int code) {
  const int e = code >> 3, m = code & 7;
  if (code == 0x7F) return 0x7FC0;
  float v = static_cast<float>(e == 0 ? m : 8 + m);  // times 2^(max(e, 1) - 10)
  for (int i = e == 0 ? 1 : e; i < 10; ++i) v /= 2;
  for (int i = 10; i < e; ++i) v *= 2;
  return __builtin_bit_cast(uint32_t, v) >> 16;
}
constexpr ByteTable kUpper = byte_table(bf16_of_e4m3, 8);
constexpr ByteTable kLower = byte_table(bf16_of_e4m3, 0);

struct Fp8 {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr float kCentre = 0;

  ByteLookup upper_of{kUpper}, lower_of{kLower};

  void bytes(__m512i codes, __m512i& upper, __m512i& lower) const {
    // magnitude | codes & sign
    upper = _mm512_ternarylogic_epi32(upper_of(codes), codes, _mm512_set1_epi8(-128), 0xF8);
    lower = lower_of(codes);
  }
};

constexpr Kernel fp8_avx512_bf16 = byte_kernel<Fp8>();

}  // namespace
EY_REGISTER_KERNEL(fp8_avx512_bf16);
}  // namespace ey::cpu
