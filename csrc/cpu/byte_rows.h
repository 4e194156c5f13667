// SPDX-License-Identifier: Apache-2.0
// Activation rows for byte_tile.h: 8-bit integers and their scales, and what sums in words begin
// at.
#pragma once

#include <immintrin.h>

#include "fast_rows.h"
#include "kernel.h"

namespace ey::cpu {
namespace {

// An activation row is records, each of `values` k: as wide as a group of the weights, at most
// kGroup. scale and q as in fast_rows.h; a run is what two words hold the products of:
//
//   scale fp32 | start int16 [runs][2] | q int8 [values]
//
// start[i] = -centre * sum of q[k] over the run's k with k / 2 % 2 = i, the ones that meet in a
// word. 0 for signed weights.
struct ByteRow {
  static constexpr int64_t kRun = 64, kScale = 0, kStart = 4;
  int64_t values;  // of a record

  explicit ByteRow(const Packing& p) : values(record_values(p)) {}
  int64_t runs() const { return values > kRun ? values / kRun : 1; }
  int64_t codes_at() const { return kStart + 4 * runs(); }
  int64_t record_bytes() const { return codes_at() + values; }
  int64_t at(int64_t k) const { return k / values * record_bytes(); }  // k: where a record begins
};

// Two words: `times` x the sum of q[k] with k / 2 even, and odd. n: a multiple of 32.
inline int32_t starts(const int8_t* q, int64_t n, int times) {
  auto sums = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 32) {
    const auto v = _mm256_load_si256(reinterpret_cast<const __m256i*>(q + i));
    sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(_mm256_set1_epi8(1), v));
  }
  const auto half = _mm_add_epi16(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  const auto quarter = _mm_add_epi16(half, _mm_shuffle_epi32(half, 0x4E));
  const auto dword = _mm_add_epi16(quarter, _mm_shuffle_epi32(quarter, 0xB1));
  return _mm_cvtsi128_si32(_mm_mullo_epi16(dword, _mm_set1_epi16(static_cast<int16_t>(times))));
}

// A group of values as fast_rows.h has it, with the instructions of AVX2.
template <class E>
void byte_load_group(const LoadGroupArgs& a) {
  const ByteRow row(a.shape.packing);
  alignas(32) float values[kGroup];
  alignas(32) int8_t codes[kGroup];
  __builtin_memcpy(values, a.from, a.n * sizeof(float));
  for (int i = a.n; i < kGroup; ++i) values[i] = 0;
  const auto magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  auto largest = _mm256_setzero_ps(), finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  for (int i = 0; i < kGroup; i += 8) {
    const auto v = _mm256_and_ps(_mm256_load_ps(values + i), magnitude);
    finite = _mm256_and_ps(finite, _mm256_cmp_ps(v, _mm256_set1_ps(__builtin_inff()), _CMP_LT_OQ));
    largest = _mm256_max_ps(largest, v);
  }
  alignas(32) float parts[8];
  _mm256_store_ps(parts, largest);
  float most = 0;
  for (const float part : parts) most = part > most ? part : most;
  // What is not finite has no integer: a scale of NaN brings it to the token's output.
  if (_mm256_movemask_ps(finite) != 0xFF) most = __builtin_nanf("");
  const auto inverse = _mm256_set1_ps(most > 0 ? 127 / most : 0);
  const auto rounded = [&](int i) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(values + i), inverse));
  };
  for (int i = 0; i < kGroup; i += 32) {
    const auto low = _mm256_packs_epi32(rounded(i), rounded(i + 8));
    const auto high = _mm256_packs_epi32(rounded(i + 16), rounded(i + 24));
    const auto order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing goes half by half
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes + i),
                       _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
  }
  const float scale = most / 127;
  char* to = a.row + row.at(a.k_begin);
  const int64_t run = row.values < ByteRow::kRun ? row.values : ByteRow::kRun;
  for (int64_t g = 0; g < kGroup; g += row.values, to += row.record_bytes()) {
    __builtin_memcpy(to + ByteRow::kScale, &scale, sizeof scale);
    __builtin_memcpy(to + row.codes_at(), codes + g, row.values);
    for (int64_t r = 0; r < row.values; r += run) {
      const int32_t start = E::kSigned ? 0 : starts(codes + g + r, run, -E::kCentre);
      __builtin_memcpy(to + ByteRow::kStart + r / run * 4, &start, sizeof start);
    }
  }
}

}  // namespace
}  // namespace ey::cpu
