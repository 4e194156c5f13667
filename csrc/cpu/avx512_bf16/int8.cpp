// SPDX-License-Identifier: Apache-2.0
// int8 weights x bf16 activations. Few tokens: the two nibbles of a code are looked up in two
// tables of bf16, (low) and 16 (high) - 128, and both products are added: twice the dots, no
// conversion.
#include "bytes.h"
#include "nibbles.h"

namespace ey::cpu {
namespace {

constexpr Table kLow = table_of([](int code) { return static_cast<float>(code); });
constexpr Table kHigh = table_of([](int code) { return static_cast<float>(16 * code - 128); });

struct Int8 : ByteOrder {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr float kCentre = 128;
  static constexpr int kDots = 4;
  static constexpr int pair(int i) { return i / 2; }

  __m512i low = _mm512_load_si512(kLow.value), high = _mm512_load_si512(kHigh.value);
  template <int i>
  __m512i weights(__m512i codes) const {
    const auto index = i == 0 ? codes : _mm512_srli_epi32(codes, 4 * i);
    return _mm512_permutexvar_epi16(index, i % 2 ? high : low);
  }

  // An integer of 8 bits is a bf16: its fp32 bits end in 16 zeros.
  static __m512i number(__m512i codes, int j) {
    const auto code = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * j), _mm512_set1_epi32(0xFF));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(128))));
  }
  static __m512i pair_of(__m512i codes, int j) {
    return _mm512_or_si512(_mm512_srli_epi32(number(codes, j), 16), number(codes, j + 2));
  }
  void pairs(__m512i codes, __m512i& even, __m512i& odd) const {
    even = pair_of(codes, 0);
    odd = pair_of(codes, 1);
  }
};

constexpr Kernel int8_avx512_bf16 = exact_kernel<Int8, multiply_bytes<Int8>>(0, byte_panel_bytes);

}  // namespace
EY_REGISTER_KERNEL(int8_avx512_bf16);
}  // namespace ey::cpu
