// SPDX-License-Identifier: Apache-2.0
// Packed weights x 8-bit activations where there is no instruction that adds four byte products to
// a dword: vpmaddubsw makes sums of two products of an unsigned and a signed byte, in words that
// saturate. fast_rows.h has the formula; integer sums are exact all the same:
//
//   4-bit codes   unsigned and small: E::kRunDots products fit into a word before two words are
//                 added into a dword. 2 instructions for each dot of 4 k and lane.
//   8-bit codes   signed: |w| x (x with w's sign), 2 x 128 x 127 < 2^15. A word holds one of them:
//                 4 instructions.
//
// A lane is an output row. E, an expander, makes bytes of a step of codes:
//   E::kStep, E::kDots           k in a step; dots of four k
//   E::kSigned, E::kCentre       whether bytes are signed integers; what comes off unsigned ones
//   E::bytes<i>(codes)           of dot i
// V is a room's vectors: 4-byte lanes, and ByteLanes' products.
#pragma once

#include <immintrin.h>

#include <utility>

#include "activation.h"
#include "block_kernel.h"
#include "fast_rows.h"

namespace ey::cpu {
namespace {

template <class V, class E>
struct Bytes {
  template <int M>
  struct Tile {
    [[gnu::noinline]] static void run(const Stretch& s, const char* x, int64_t x_stride, float* c);
  };

  // What a step asks memory for: a line each, `step` bytes further every time.
  struct Ahead {
    const char *first, *second;
    int64_t step;
  };
  // sum[m][r] += dots of `count` steps; codes: the first one's, for kRegs vectors of lanes
  template <int M, int kRegs, bool kFetch>
  [[gnu::always_inline]] static inline void multiply(const char* codes, int64_t count,
                                                     const char* const (&q)[M], Ahead ahead,
                                                     typename V::I (&sum)[M][kRegs]);
};

template <class V, class E>
template <int M, int kRegs, bool kFetch>
void Bytes<V, E>::multiply(const char* codes, int64_t count, const char* const (&q)[M],
                           [[maybe_unused]] Ahead ahead, typename V::I (&sum)[M][kRegs]) {
  using I = typename V::I;
  int64_t x_at = 0;
  const auto step = [&](I(&acc)[M][kRegs]) __attribute__((always_inline)) {
    if constexpr (kFetch) {
      __builtin_prefetch(ahead.first);
      __builtin_prefetch(ahead.second);
      ahead.first += ahead.step;
      ahead.second += ahead.step;
    }
    I dwords[kRegs];
#pragma GCC unroll 4
    for (int r = 0; r < kRegs; ++r) dwords[r] = V::load_dwords(codes + r * V::kLanes * 4);
    const auto dot = [&](auto i) __attribute__((always_inline)) {
      I w[kRegs];
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) w[r] = E::template bytes<decltype(i)::value>(dwords[r]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        I xm = V::broadcast(q[m] + x_at + decltype(i)::value * 4);
        V::in_order(xm);
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) {
          if constexpr (E::kSigned) {
            const I words = V::products(V::magnitudes(w[r]), V::signed_by(xm, w[r]));
            acc[m][r] = V::add_dwords(acc[m][r], V::sum_pairs(words));
          } else {
            acc[m][r] = V::add_words(acc[m][r], V::products(w[r], xm));
          }
          V::in_order(acc[m][r]);
        }
      }
    };
    [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
      (dot(std::integral_constant<int, J>{}), ...);
    }(std::make_integer_sequence<int, E::kDots>{});
    codes += kStepBytes;
    x_at += E::kStep;
  };
  if constexpr (E::kSigned) {
    for (; count > 0; --count) step(sum);
  } else {
    constexpr int kRun = E::kRunDots / E::kDots;  // steps whose products fit into a word
    while (count > 0) {
      I acc[M][kRegs];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) acc[m][r] = V::zero();
      }
      if (count >= kRun) {
#pragma GCC unroll 4
        for (int i = 0; i < kRun; ++i) step(acc);
      } else {
        for (int64_t i = 0; i < count; ++i) step(acc);
      }
      count -= kRun;
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) {
          sum[m][r] = V::add_dwords(sum[m][r], V::sum_pairs(acc[m][r]));
        }
      }
    }
  }
}

template <class V, class E>
template <int M>
void Bytes<V, E>::Tile<M>::run(const Stretch& s, const char* x, int64_t x_stride, float* c) {
  constexpr int kRegs = V::regs(M);
  const BlockShape& shape = *s.shape;
  const FastRow row(shape.packing);
  const ScaleType type = shape.packing.scale_type;
  const bool whole_rows = shape.packing.group_size == 0;  // one scale for all of k: scaled at last
  if (!s.add) __builtin_memset(c, 0, M * kBlockRows * sizeof(float));

  for (int64_t k = s.k_begin; k < s.k_end; k += row.values) {
    const int64_t line = k / shape.line_k();
    const int64_t part = whole_rows ? 0 : k / row.values % shape.groups_in_line();
    const char* head = s.block + line * shape.line_bytes();
    const char* steps =
        head + shape.line_head() + (k - line * shape.line_k()) / E::kStep * kStepBytes;
    const int64_t count = (k + row.values < s.k_end ? row.values : s.k_end - k) / E::kStep;
    const char *record[M], *q[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      record[m] = x + m * x_stride + row.at(k);
      q[m] = record[m] + FastRow::kCodes;
    }
    const Ahead ahead = {s.fetch_at(steps), s.second_at(steps), s.fetch_step()};
    for (int first = 0; first < kLanes; first += kRegs * V::kLanes) {
      typename V::I sum[M][kRegs];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) {
          sum[m][r] = E::kSigned ? V::zero() : V::broadcast(record[m] + FastRow::kStart);
        }
      }
      if (first == 0) {
        multiply<M, kRegs, true>(steps, count, q, ahead, sum);
      } else {
        multiply<M, kRegs, false>(steps + first * 4, count, q, ahead, sum);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) {
        const int lane = first + r * V::kLanes;
        auto scale = V::set(1), offset = V::set(0);
        if (!whole_rows) {
          scale = V::mul(V::scales(type, head, static_cast<int>(part) * kLanes + lane),
                         V::set(E::kUnit));
        }
        if (shape.packing.zeros) {  // (centre - zero) * sum q; start is -centre * sum q
          const auto zero = V::scales(type, head + shape.scale_bytes(), lane);
          offset = V::fma(zero, V::set(1.0f / E::kCentre), V::set(-1));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          float* out = c + m * kBlockRows + lane;
          auto dot = V::to_floats(sum[m][r]);
          if (shape.packing.zeros) {
            dot = V::fma(V::to_floats(V::broadcast(record[m] + FastRow::kStart)), offset, dot);
          }
          const auto scale_x = V::as_floats(V::broadcast(record[m] + FastRow::kScale));
          V::store(out, V::fma(dot, V::mul(scale, scale_x), V::load(out)));
        }
      }
    }
  }
  if (whole_rows && s.k_end == shape.padded_k()) {
    for (int lane = 0; lane < kLanes; lane += V::kLanes) {
      const auto scale = V::scales(type, s.block, lane);
      for (int m = 0; m < M; ++m) {
        float* out = c + m * kBlockRows + lane;
        V::store(out, V::mul(V::load(out), scale));
      }
    }
  }
}

// Codes of 4 bits and the integers that they stand for, plus kCentre, times 1 / kUnit.
template <class V>
struct Int4Bytes {
  static constexpr Format kFormat = Format::kInt4;
  static constexpr int kStep = 8, kDots = 2, kCentre = 8;
  static constexpr float kUnit = 1;
  static constexpr bool kSigned = false;
  static constexpr int kRunDots = 8;  // 8 x 2 x 15 x 127 < 2^15
  template <int i>
  static typename V::I bytes(typename V::I codes) {
    return i == 0 ? V::low_nibbles(codes) : V::high_nibbles(codes);
  }
};

// Twice an e2m1 value is an integer from -12 to 12.
template <class V>
struct Mxfp4Bytes {
  static constexpr Format kFormat = Format::kMxfp4;
  static constexpr int kStep = 8, kDots = 2, kCentre = 12;
  static constexpr float kUnit = 0.5f;
  static constexpr bool kSigned = false;
  static constexpr int kRunDots = 4;  // 4 x 2 x 24 x 127 < 2^15
  template <int i>
  static typename V::I bytes(typename V::I codes) {
    const auto twice = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return V::look_up(twice, i == 0 ? V::low_nibbles(codes) : V::high_nibbles(codes));
  }
};

template <class V>
struct Int8Bytes {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kStep = 4, kDots = 1, kCentre = 128;
  static constexpr float kUnit = 1;
  static constexpr bool kSigned = true;
  template <int i>
  static typename V::I bytes(typename V::I codes) {
    return V::flip(codes, 0x80808080u);
  }
};

// A group of values as fast_rows.h has it, with the instructions of AVX2.
template <class E>
void byte_load_group(const LoadGroupArgs& a) {
  const FastRow row(a.shape.packing);
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
  for (int64_t g = 0; g < kGroup; g += row.values, to += row.record_bytes()) {
    auto sums = _mm256_setzero_si256();
    for (int64_t i = g; i < g + row.values; i += 32) {
      const auto q = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + FastRow::kCodes + i - g), q);
      const auto pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    const auto half =
        _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const auto pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    const int32_t start =
        -E::kCentre * _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xB1)));
    __builtin_memcpy(to + FastRow::kScale, &scale, sizeof scale);
    __builtin_memcpy(to + FastRow::kStart, &start, sizeof start);
  }
}

template <class V, class E>
void multiply_bytes(const MultiplyArgs& a) {
  static constexpr auto table =
      tile_table<Bytes<V, E>::template Tile>(std::make_integer_sequence<int, V::kMaxTokens>{});
  run_tiles<V::kMaxTokens>(a, {E::kFormat, a.w.packing, a.w.k}, table.of);
}

// The multiply-add whose peak is this kernel's: see probe.h.
template <class V, bool kSigned>
struct ByteProducts {
  using X = char;
  using W = typename V::I;
  using Acc = typename V::I;
  static constexpr int kWidth = V::kLanes * 4;
  static Acc zero() { return V::zero(); }
  static W load_x(const X* p) { return V::load_dwords(p); }
  static void fma(Acc& acc, W w, W x) {
    V::in_order(w);  // or products of the same operands would be made once for all
    const auto words = V::products(w, kSigned ? V::signed_by(x, w) : x);
    acc = kSigned ? V::add_dwords(acc, V::sum_pairs(words)) : V::add_words(acc, words);
  }
};

// `exact`: the room's kernel of the same format, whose reads and activation function serve too.
template <class V, template <class> class Expander>
constexpr Kernel byte_kernel(Kernel exact) {
  using E = Expander<V>;
  exact.mode = Mode::kFast;
  exact.row_bytes = fast_row_bytes;
  exact.load_row = load_row_by_groups<byte_load_group<E>>;
  exact.load_group = byte_load_group<E>;
  exact.multiply = multiply_bytes<V, E>;
  exact.peak = peak<ByteProducts<V, E::kSigned>, 8>;
  return exact;
}

}  // namespace
}  // namespace ey::cpu
