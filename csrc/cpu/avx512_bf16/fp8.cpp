// SPDX-License-Identifier: Apache-2.0
// fp8 e4m3 weights x bf16 activations. Every e4m3 value is a bf16: vpermi2b looks the upper and the
// lower byte of 64 of them up at once, by the code without its sign. Needs AVX-512 VBMI, which all
// CPUs with AVX-512 BF16 but the first (Cooper Lake) have.
#include "bytes.h"

namespace ey::cpu {
namespace {

constexpr uint16_t bf16_of_e4m3(int code) {  // code without sign
  const int e = code >> 3, m = code & 7;
  if (code == 0x7F) return 0x7FC0;
  float v = static_cast<float>(e == 0 ? m : 8 + m);  // times 2^(max(e, 1) - 10)
  for (int i = e == 0 ? 1 : e; i < 10; ++i) v /= 2;
  for (int i = 10; i < e; ++i) v *= 2;
  return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, v) >> 16);
}

struct Bytes {
  alignas(64) uint8_t value[128];
};
constexpr Bytes bytes_of_e4m3(int shift) {
  Bytes b{};
  for (int i = 0; i < 128; ++i) b.value[i] = static_cast<uint8_t>(bf16_of_e4m3(i) >> shift);
  return b;
}
constexpr Bytes kUpper = bytes_of_e4m3(8), kLower = bytes_of_e4m3(0);

struct Fp8 : ByteOrder {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr float kCentre = 0;
  static constexpr int kDots = 2;
  static constexpr int pair(int i) { return i; }

  __m512i upper[2] = {_mm512_load_si512(kUpper.value), _mm512_load_si512(kUpper.value + 64)};
  __m512i lower[2] = {_mm512_load_si512(kLower.value), _mm512_load_si512(kLower.value + 64)};

  __m512i upper_bytes(__m512i codes) const {
    const auto magnitude = _mm512_permutex2var_epi8(upper[0], codes, upper[1]);
    // magnitude | codes & 0x80
    return _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(-128), 0xF8);
  }
  __m512i lower_bytes(__m512i codes) const {
    return _mm512_permutex2var_epi8(lower[0], codes, lower[1]);
  }
  // words of a's low bytes and b's high bytes
  static __m512i merge(__m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi16(0x00FF), 0xE4);
  }
  void pairs(__m512i codes, __m512i& even, __m512i& odd) const {
    const auto up = upper_bytes(codes), low = lower_bytes(codes);
    even = merge(low, _mm512_slli_epi16(up, 8));
    odd = merge(_mm512_srli_epi16(low, 8), up);
  }
  template <int i>
  __m512i weights(__m512i codes) const {
    __m512i even, odd;
    pairs(codes, even, odd);  // both are made for i = 0; the compiler does it once
    return i == 0 ? even : odd;
  }
};

constexpr Kernel fp8_avx512_bf16 =
    exact_kernel<Fp8, multiply_bytes<Fp8>>(kFeatureAvx512Vbmi, byte_panel_bytes);

}  // namespace
EY_REGISTER_KERNEL(fp8_avx512_bf16);
}  // namespace ey::cpu
