// SPDX-License-Identifier: Apache-2.0
// 8-bit codes -> bf16 by tables: vpermi2b looks the upper and the lower byte of 64 bf16 up at once,
// by the low 7 bits of a byte; signs are put in afterwards. Needs AVX-512 VBMI, which all CPUs with
// AVX-512 BF16 but the first (Cooper Lake) have.
//
// A step is four k. Its even bytes make the pairs of k (0,2), its odd ones (1,3), so that a byte
// and its partner are in their words already.
//
// Tiles have at most kByteTokens tokens: 16 sums + 4 tables + 4 pairs + what makes them. For each
// step that is 32 dots (16 cycles on two of four pipes) beside some 20 instructions of conversion
// on the others: as fast as weights that were converted before, and no memory is needed for them.
#pragma once

#include "block_tile.h"

namespace ey::cpu {
namespace {

inline constexpr int kByteTokens = 8;

struct ByteTable {
  alignas(64) uint8_t value[128];
};

// Bits shift .. shift + 7 of the bf16 of codes 0 .. 127.
template <class Value>
constexpr ByteTable byte_table(Value bf16_of, int shift) {
  ByteTable t{};
  for (int i = 0; i < 128; ++i) t.value[i] = static_cast<uint8_t>(bf16_of(i) >> shift);
  return t;
}

struct ByteLookup {
  __m512i table[2];
  explicit ByteLookup(const ByteTable& t)
      : table{_mm512_load_si512(t.value), _mm512_load_si512(t.value + 64)} {}
  __m512i operator()(__m512i codes) const {
    return _mm512_permutex2var_epi8(table[0], codes, table[1]);
  }
};

// D: bytes(codes, upper, lower) of each code's bf16
template <class D>
struct BytePairs : D {
  static constexpr int kStep = 4, kDots = 2;
  static constexpr int pair(int i) { return i; }
  static constexpr int order(int place) {
    constexpr int k[] = {0, 2, 1, 3};
    return k[place];
  }
  // words of a's low bytes and b's high bytes
  static __m512i merge(__m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi16(0x00FF), 0xE4);
  }
  template <int i>
  __m512i weights(__m512i codes) const {
    __m512i upper, lower;  // made for i = 0 and i = 1; the compiler does it once
    D::bytes(codes, upper, lower);
    return i == 0 ? merge(lower, _mm512_slli_epi16(upper, 8))
                  : merge(_mm512_srli_epi16(lower, 8), upper);
  }
};

template <class D>
void multiply_bytes(const MultiplyArgs& a) {
  run_exact<BytePairs<D>, kByteTokens>(a, {D::kFormat, a.w.packing, a.w.k});
}

template <class D>
constexpr Kernel byte_kernel() {
  return exact_kernel<BytePairs<D>, multiply_bytes<D>>(kFeatureAvx512Vbmi);
}

}  // namespace
}  // namespace ey::cpu
