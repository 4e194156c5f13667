// SPDX-License-Identifier: Apache-2.0
// Packed weights x 8-bit activations where there is no instruction that adds four byte products to
// a dword: vpmaddubsw makes sums of two products of an unsigned and a signed byte, in words that
// saturate. fast_rows.h has the formula; integer sums are exact all the same:
//
//   4-bit codes   unsigned, code + centre: no product saturates. Words begin at -centre x sum of
//                 their q and are added with wrap-around, so what counts is that the true sum fits:
//                 64 k of int4 (32 products of 8 x 127), 32 k of mxfp4 (16 of 12 x 127) < 2^15.
//                 Then two words become a dword. 2 instructions for each dot of 4 k and lane.
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

  explicit ByteRow(const Packing& p) : values(p.group_size > 0 ? p.group_size : kGroup) {}
  int64_t runs() const { return values > kRun ? values / kRun : 1; }
  int64_t codes_at() const { return kStart + 4 * runs(); }
  int64_t record_bytes() const { return codes_at() + values; }
  int64_t at(int64_t k) const { return k / values * record_bytes(); }  // k: where a record begins
};

inline int64_t byte_row_bytes(const RowShape& s) {
  return round_up(ByteRow(s.packing).at(round_up(s.k, kGroup)), 64) + 64;
}

template <class V, class E>
struct Bytes {
  using I = typename V::I;

  template <int M>
  struct Tile {
    [[gnu::noinline]] static void run(const Stretch& s, const char* x, int64_t x_stride, float* c);
  };

  // kRuns: of a record, 1 or 2; kZeros: groups have zeros of their own
  template <int M, int kRuns, bool kZeros>
  static void groups(const Stretch& s, const char* x, int64_t x_stride, float* c);

  // What a step asks memory for: a line each, `step` bytes further every time.
  struct Ahead {
    const char *first, *second;
    int64_t step;
  };
  // acc[m][r] += dots of `count` steps, from q of token m at token[m] + at on
  template <int M, int kRegs, bool kFetch>
  [[gnu::always_inline]] static inline void multiply(const char* codes, int64_t count,
                                                     const char* const (&token)[M], int64_t at,
                                                     Ahead& ahead, I (&acc)[M][kRegs]);
};

template <class V, class E>
template <int M, int kRegs, bool kFetch>
void Bytes<V, E>::multiply(const char* codes, int64_t count, const char* const (&token)[M],
                           int64_t at, [[maybe_unused]] Ahead& ahead, I (&acc)[M][kRegs]) {
  for (; count > 0; --count, codes += kStepBytes, at += E::kStep) {
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
        I xm = V::broadcast(token[m] + at + decltype(i)::value * 4);
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
  }
}

template <class V, class E>
template <int M, int kRuns, bool kZeros>
void Bytes<V, E>::groups(const Stretch& s, const char* x, int64_t x_stride, float* c) {
  constexpr int kRegs = V::regs(M);
  constexpr int64_t kRunSteps = ByteRow::kRun / E::kStep;
  const BlockShape& shape = *s.shape;
  const ByteRow row(shape.packing);
  const ScaleType type = shape.packing.scale_type;
  const bool whole_rows = shape.packing.group_size == 0;
  const int groups_in_line = static_cast<int>(shape.groups_in_line());
  const int64_t line = s.k_begin / shape.line_k(), codes_at = row.codes_at();
  const char* head = s.block + line * shape.line_bytes();
  const char* steps =
      head + shape.line_head() + (s.k_begin - line * shape.line_k()) / E::kStep * kStepBytes;
  int part = 0;                        // the group's number in its line
  int64_t record = row.at(s.k_begin);  // where it begins in a row
  const char* token[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) token[m] = x + m * x_stride;
  alignas(64) float scale[kLanes], offset[kLanes];
  for (int lane = 0; lane < kLanes; lane += V::kLanes) V::store(scale + lane, V::set(1));

  for (int64_t k = s.k_begin; k < s.k_end; k += row.values, record += row.record_bytes()) {
    const int64_t count = (k + row.values < s.k_end ? row.values : s.k_end - k) / E::kStep;
    for (int lane = 0; lane < kLanes && !whole_rows; lane += V::kLanes) {
      const auto v = V::scales(type, head, part * kLanes + lane);
      V::store(scale + lane, V::mul(v, V::set(E::kUnit)));
      if constexpr (kZeros) {  // (centre - zero) * sum q; starts are -centre * sum q
        const auto zero = V::scales(type, head + shape.scale_bytes(), lane);
        V::store(offset + lane, V::fma(zero, V::set(1.0f / E::kCentre), V::set(-1)));
      }
    }
    Ahead ahead = {s.fetch_at(steps), s.second_at(steps), s.fetch_step()};
    for (int first = 0; first < kLanes; first += kRegs * V::kLanes) {
      const auto run = [&](int64_t begin, int64_t n, I(&acc)[M][kRegs])
                           __attribute__((always_inline)) {
                             const char* codes = steps + begin * kStepBytes + first * 4;
                             const int64_t at = record + codes_at + begin * E::kStep;
                             if (first == 0) {
                               multiply<M, kRegs, true>(codes, n, token, at, ahead, acc);
                             } else {
                               multiply<M, kRegs, false>(codes, n, token, at, ahead, acc);
                             }
                           };
      I sum[M][kRegs];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const I start = V::broadcast(token[m] + record + ByteRow::kStart);
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) sum[m][r] = E::kSigned ? V::zero() : start;
      }
      run(0, kRuns == 1 || count < kRunSteps ? count : kRunSteps, sum);
      if constexpr (!E::kSigned) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
          for (int r = 0; r < kRegs; ++r) sum[m][r] = V::sum_pairs(sum[m][r]);
        }
      }
      if (kRuns == 2 && count > kRunSteps) {
        I second[M][kRegs];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const I start = V::broadcast(token[m] + record + ByteRow::kStart + 4);
#pragma GCC unroll 4
          for (int r = 0; r < kRegs; ++r) second[m][r] = start;
        }
        run(kRunSteps, count - kRunSteps, second);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
          for (int r = 0; r < kRegs; ++r) {
            sum[m][r] = V::add_dwords(sum[m][r], V::sum_pairs(second[m][r]));
          }
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const auto scale_x = V::as_floats(V::broadcast(token[m] + record + ByteRow::kScale));
        [[maybe_unused]] auto start = V::set(0);
        if constexpr (kZeros) {
          I starts = V::sum_pairs(V::broadcast(token[m] + record + ByteRow::kStart));
          if constexpr (kRuns == 2) {
            const I words = V::broadcast(token[m] + record + ByteRow::kStart + 4);
            starts = V::add_dwords(starts, V::sum_pairs(words));
          }
          start = V::to_floats(starts);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) {
          const int lane = first + r * V::kLanes;
          float* out = c + m * kBlockRows + lane;
          auto dot = V::to_floats(sum[m][r]);
          if constexpr (kZeros) dot = V::fma(start, V::load(offset + lane), dot);
          V::store(out, V::fma(dot, V::mul(V::load(scale + lane), scale_x), V::load(out)));
        }
      }
    }
    steps += count * kStepBytes;
    if (!whole_rows && ++part == groups_in_line) {
      part = 0;
      head = steps;
      steps += shape.line_head();
    }
  }
}

template <class V, class E>
template <int M>
void Bytes<V, E>::Tile<M>::run(const Stretch& s, const char* x, int64_t x_stride, float* c) {
  const BlockShape& shape = *s.shape;
  if (!s.add) __builtin_memset(c, 0, M * kBlockRows * sizeof(float));
  if constexpr (E::kFormat != Format::kInt4) {  // groups of 32, or no runs at all
    groups<M, 1, false>(s, x, x_stride, c);
  } else {
    const bool one = ByteRow(shape.packing).runs() == 1;
    const auto of = shape.packing.zeros ? one ? groups<M, 1, true> : groups<M, 2, true>
                    : one               ? groups<M, 1, false>
                                        : groups<M, 2, false>;
    of(s, x, x_stride, c);
  }
  if (shape.packing.group_size == 0 && s.k_end == shape.padded_k()) {  // one scale for all of k
    for (int lane = 0; lane < kLanes; lane += V::kLanes) {
      const auto scale = V::scales(shape.packing.scale_type, s.block, lane);
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
  template <int i>
  static typename V::I bytes(typename V::I codes) {
    alignas(16) static constexpr int8_t kTwice[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                      12, 11, 10, 9,  8,  6,  4,  0};
    return V::look_up(kTwice, i == 0 ? V::low_nibbles(codes) : V::high_nibbles(codes));
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
  exact.row_bytes = byte_row_bytes;
  exact.load_row = load_row_by_groups<byte_load_group<E>>;
  exact.load_group = byte_load_group<E>;
  exact.multiply = multiply_bytes<V, E>;
  exact.peak = peak<ByteProducts<V, E::kSigned>, 8>;
  return exact;
}

}  // namespace
}  // namespace ey::cpu
