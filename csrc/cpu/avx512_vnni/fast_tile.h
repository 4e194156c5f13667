// SPDX-License-Identifier: Apache-2.0
// Packed weights x 8-bit activations on AVX-512 VNNI: vpdpbusd adds four products of an unsigned
// code and a signed activation to each int32 lane. fast_rows.h has the formula.
//
// A lane is an output row. A step is 64 bytes of codes of each lane set; an expander E makes bytes
// of them, four consecutive k in each lane:
//   E::kStep     k in a step, four for each dot       E::kDots     dots of a step and lane set
//   E::kCentre   what comes off every code            e.bytes<i>(codes)   of dot i
//
// Integer sums of a group become fp32 and are added to c, which is in L1, times both scales.
// Weights with one scale a row are scaled once, at the end.
//
// Registers of a tile of M tokens: 2 M sums, 2 codes, 2 bytes, 1 activation, E's tables. With M =
// 12 a group of 128 k is 768 dots (384 cycles); ending it, 24 conversions and at most 48
// multiply-adds.
#pragma once

#include "../activation.h"
#include "../avx512/blocks.h"
#include "../avx512/floats.h"
#include "../block_kernel.h"
#include "../fast_rows.h"
#include "../features.h"
#include "vec.h"

namespace ey::cpu {
namespace {

template <class E>
struct Fast {
  template <int M>
  struct Tile {
    [[gnu::noinline]] static void run(const Stretch& s, const char* x, int64_t x_stride, float* c);
    [[gnu::noinline]] static void add_zeros(const Scales& zero, const Scales& scale,
                                            const Tokens<M>& record, float* c);
  };
};

template <class E>
template <int M>
void Fast<E>::Tile<M>::run(const Stretch& s, const char* x, int64_t x_stride, float* c) {
  constexpr int kChains = M == 1 ? 4 : M <= 3 ? 2 : 1;
  constexpr int kUnroll = kChains > E::kDots ? kChains / E::kDots : 1;
  const BlockShape& shape = *s.shape;
  const FastRow row(shape.packing);
  const int64_t line_k = shape.line_k();
  const bool whole_rows = shape.packing.group_size == 0;  // one scale for all of k
  const ScaleType type = shape.packing.scale_type;
  const int groups_in_line = static_cast<int>(shape.groups_in_line());
  const E e;

  Tokens<M> tokens(x, x_stride, row.at(s.k_begin));
  const int64_t line = s.k_begin / line_k;
  const char* head = s.block + line * shape.line_bytes();
  const char* steps =
      head + shape.line_head() + (s.k_begin - line * line_k) / E::kStep * kStepBytes;
  int part = static_cast<int>(s.k_begin / row.values % groups_in_line);
  const int64_t fetch_step = s.fetch_step();
  if (!s.add) {
#pragma GCC unroll 12
    for (int i = 0; i < M * 2; ++i) _mm512_storeu_ps(c + i * kHalfRows, _mm512_setzero_ps());
  }

  for (int64_t k = s.k_begin; k < s.k_end; k += row.values) {
    const Tokens<M> record = tokens;
    __m512i acc[kChains][M][2];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      acc[0][m][0] = acc[0][m][1] = record.broadcast(m, FastRow::kStart);
#pragma GCC unroll 4
      for (int i = 1; i < kChains; ++i) acc[i][m][0] = acc[i][m][1] = _mm512_setzero_si512();
    }
    const char *fetch = s.fetch_at(steps), *second = s.second_at(steps);

    const auto step = [&](auto u) __attribute__((always_inline)) {
      _mm_prefetch(fetch, _MM_HINT_T0);
      _mm_prefetch(second, _MM_HINT_T0);
      const auto set_a = _mm512_load_si512(steps), set_b = _mm512_load_si512(steps + 64);
      const auto dot = [&](auto i) __attribute__((always_inline)) {
        constexpr int kI = decltype(i)::value;
        constexpr int kChain = (decltype(u)::value * E::kDots + kI) % kChains;
        const auto w_a = e.template bytes<kI>(set_a), w_b = e.template bytes<kI>(set_b);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
          const auto xm = tokens.broadcast(m, FastRow::kCodes + kI * 4);
          acc[kChain][m][0] = dot_u8_s8(acc[kChain][m][0], w_a, xm);
          acc[kChain][m][1] = dot_u8_s8(acc[kChain][m][1], w_b, xm);
        }
      };
      [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (dot(std::integral_constant<int, I>{}), ...);
      }(std::make_integer_sequence<int, E::kDots>{});
      tokens.advance(E::kStep);
      steps += kStepBytes;
      fetch += fetch_step;
      second += fetch_step;
    };
    int64_t count = (k + row.values < s.k_end ? row.values : s.k_end - k) / E::kStep;
    if constexpr (kUnroll > 1) {
      for (; count >= kUnroll; count -= kUnroll) {
        [&]<int... U>(std::integer_sequence<int, U...>) __attribute__((always_inline)) {
          (step(std::integral_constant<int, U>{}), ...);
        }(std::make_integer_sequence<int, kUnroll>{});
      }
    }
    for (; count > 0; --count) step(std::integral_constant<int, 0>{});
    tokens.advance(FastRow::kCodes);

    const auto add_to_c = [&](auto scale) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const auto scale_x = _mm512_castsi512_ps(record.broadcast(m, FastRow::kScale));
#pragma GCC unroll 2
        for (int set = 0; set < 2; ++set) {
          auto sum = acc[0][m][set];
#pragma GCC unroll 4
          for (int i = 1; i < kChains; ++i) sum = _mm512_add_epi32(sum, acc[i][m][set]);
          float* out = c + m * kBlockRows + set * kHalfRows;
          const auto v = scale(set, _mm512_cvtepi32_ps(sum));
          _mm512_storeu_ps(out, _mm512_fmadd_ps(v, scale_x, _mm512_loadu_ps(out)));
        }
      }
    };
    if (whole_rows) {
      add_to_c([](int, __m512 v) __attribute__((always_inline)) { return v; });
      continue;
    }
    Scales scale = load_both(type, head + part * kLanes);
    for (auto& v : scale.set) {
      if constexpr (E::kUnit != 1) v = _mm512_mul_ps(v, _mm512_set1_ps(E::kUnit));
    }
    add_to_c([&](int set, __m512 v)
                 __attribute__((always_inline)) { return _mm512_mul_ps(v, scale.set[set]); });
    if (shape.packing.zeros)
      add_zeros(load_both(type, head + shape.scale_bytes()), scale, record, c);
    if (++part == groups_in_line) {
      part = 0;
      head += shape.line_bytes();
      steps = head + shape.line_head();
    }
  }
  if (whole_rows && s.k_end == shape.padded_k()) {
    const Scales scale = load_both(type, head);
    for (int m = 0; m < M; ++m) {
      for (int set = 0; set < 2; ++set) {
        float* out = c + m * kBlockRows + set * kHalfRows;
        _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_loadu_ps(out), scale.set[set]));
      }
    }
  }
}

// A group's zeros, where they are not the centre: (centre - zero) * sum q, and start is
// -centre * sum q.
template <class E>
template <int M>
void Fast<E>::Tile<M>::add_zeros(const Scales& zero, const Scales& scale, const Tokens<M>& record,
                                 float* c) {
  for (int set = 0; set < 2; ++set) {
    const auto by_centre = _mm512_mul_ps(zero.set[set], _mm512_set1_ps(1.0f / E::kCentre));
    const auto offset = _mm512_mul_ps(_mm512_sub_ps(by_centre, _mm512_set1_ps(1)), scale.set[set]);
    for (int m = 0; m < M; ++m) {
      const auto start = _mm512_cvtepi32_ps(record.broadcast(m, FastRow::kStart));
      const auto scale_x = _mm512_castsi512_ps(record.broadcast(m, FastRow::kScale));
      float* out = c + m * kBlockRows + set * kHalfRows;
      _mm512_storeu_ps(
          out, _mm512_fmadd_ps(_mm512_mul_ps(start, scale_x), offset, _mm512_loadu_ps(out)));
    }
  }
}

template <class E>
void fast_load_group(const LoadGroupArgs& a) {
  const FastRow row(a.shape.packing);
  alignas(64) float values[kGroup];
  alignas(64) int8_t q[kGroup];
  __builtin_memcpy(values, a.from, a.n * sizeof(float));
  for (int i = a.n; i < kGroup; ++i) values[i] = 0;
  auto largest = _mm512_setzero_ps();
  __mmask16 finite = 0xFFFF;
  for (int i = 0; i < kGroup; i += 16) {
    const auto v = _mm512_abs_ps(_mm512_load_ps(values + i));
    finite &= _mm512_cmp_ps_mask(v, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    largest = _mm512_max_ps(largest, v);
  }
  // What is not finite has no integer: a scale of NaN brings it to the token's output.
  const float most = finite == 0xFFFF ? _mm512_reduce_max_ps(largest) : __builtin_nanf("");
  const auto inverse = _mm512_set1_ps(most > 0 ? 127 / most : 0);
  for (int i = 0; i < kGroup; i += 16) {
    const auto rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(values + i), inverse));
    _mm_store_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(rounded));
  }
  const float scale = most / 127;
  char* to = a.row + row.at(a.k_begin);
  for (int64_t g = 0; g < kGroup; g += row.values, to += row.record_bytes()) {
    auto sum = _mm256_setzero_si256();
    for (int64_t i = g; i < g + row.values; i += 32) {
      const auto codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(q + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + FastRow::kCodes + i - g), codes);
      const auto part =
          dot_u8_s8(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_castsi256_si512(codes));
      sum = _mm256_add_epi32(sum, _mm512_castsi512_si256(part));
    }
    const auto half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    const auto pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    const int32_t start =
        -E::kCentre * _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xB1)));
    __builtin_memcpy(to + FastRow::kScale, &scale, sizeof scale);
    __builtin_memcpy(to + FastRow::kStart, &start, sizeof start);
  }
}

template <class E>
void multiply_fast(const MultiplyArgs& a) {
  static constexpr auto table =
      tile_table<Fast<E>::template Tile>(std::make_integer_sequence<int, kTileM>{});
  run_tiles<kTileM>(a, {E::kFormat, a.w.packing, a.w.k}, table.of);
}

template <class E>
constexpr Kernel fast_kernel() {
  return {.isa = "avx512_vnni",
          .format = E::kFormat,
          .layout = Layout::kBlocks,
          .mode = Mode::kFast,
          .needs = kFeatureAvx512 | kFeatureAvx512Vnni,
          .rank = 3,
          .bf16_inputs = false,
          .row_bytes = fast_row_bytes<>,
          .load_row = load_row_by_groups<fast_load_group<E>>,
          .load_group = fast_load_group<E>,
          .h_size = sizeof(float),
          .panel_from_tokens = 0,
          .panel_bytes = nullptr,
          .multiply = multiply_fast<E>,
          .activate = activate<Floats>,
          .combine = combine<Floats>,
          .store_row = store_row_fp32,
          .peak = peak<Vec, 24>,
          .read = read_lines<Vec, 1>};
}

}  // namespace
}  // namespace ey::cpu
