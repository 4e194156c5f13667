// SPDX-License-Identifier: Apache-2.0
// 4-bit codes -> bf16 by a table: vpermw looks 32 words up at once by their low 5 bits, of which
// the fifth belongs to the next code; the table holds every value twice, so it does not matter.
//
// Shifting a dword right by 4 i brings code i to the bottom of its low word and code i + 4 to the
// bottom of its high word: with the layout's byte order, the pairs of k (0,2) (4,6) (1,3) (5,7).
#pragma once

#include "block_tile.h"

namespace ey::cpu {
namespace {

struct Table {
  alignas(64) uint16_t value[32];
};

template <class Value>
constexpr Table table_of(Value value) {
  Table t{};
  for (int i = 0; i < 32; ++i) {
    t.value[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value(i % 16)) >> 16);
  }
  return t;
}

template <Format format, int centre_of_codes, const Table& kTable>
struct Nibbles {
  static constexpr Format kFormat = format;
  static constexpr float kCentre = centre_of_codes;
  static constexpr int kStep = 8, kDots = 4;
  static constexpr int pair(int i) { return i; }
  static constexpr int order(int place) {
    constexpr int k[] = {0, 2, 4, 6, 1, 3, 5, 7};
    return k[place];
  }

  __m512i table = _mm512_load_si512(kTable.value);
  template <int i>
  __m512i weights(__m512i codes) const {
    const auto index = i == 0 ? codes : _mm512_srli_epi32(codes, 4 * i);
    return _mm512_permutexvar_epi16(index, table);
  }
};

template <class E>
void multiply_directly(const MultiplyArgs& a) {
  run_exact<E, kTileM>(a, {E::kFormat, a.w.packing, a.w.k});
}

}  // namespace
}  // namespace ey::cpu
