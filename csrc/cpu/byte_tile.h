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
// A lane is an output row. E, in byte_values.h, makes bytes of a step of codes; V is a room's
// vectors: 4-byte lanes, and ByteLanes' products. Registers: see the room's lanes.h.
#pragma once

#include <immintrin.h>

#include <utility>

#include "activation.h"
#include "block_kernel.h"
#include "byte_rows.h"
#include "byte_values.h"

namespace ey::cpu {
namespace {

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

  // What a step asks memory for, the first time that it is passed: a line each, `step` bytes
  // further every time.
  struct Ahead {
    const char *first, *second;
    int64_t step;
    bool wanted;
  };
  // acc[m][r] += dots of `count` steps, from q of token m at token[m] + at on
  template <int M, int kRegs>
  [[gnu::always_inline]] static inline void multiply(const char* codes, int64_t count,
                                                     const char* const (&token)[M], int64_t at,
                                                     Ahead& ahead, I (&acc)[M][kRegs]);
};

template <class V, class E>
template <int M, int kRegs>
void Bytes<V, E>::multiply(const char* codes, int64_t count, const char* const (&token)[M],
                           int64_t at, Ahead& ahead, I (&acc)[M][kRegs]) {
  for (; count > 0; --count, codes += kStepBytes, at += E::kStep) {
    if (ahead.wanted) {
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
    Ahead ahead = {s.fetch_at(steps), s.second_at(steps), s.fetch_step(), true};
    for (int first = 0; first < kLanes; first += kRegs * V::kLanes) {
      ahead.wanted = first == 0;
      const char* codes = steps + first * 4;
      const int64_t at = record + codes_at;
      I sum[M][kRegs];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const I start = V::broadcast(token[m] + record + ByteRow::kStart);
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) sum[m][r] = E::kSigned ? V::zero() : start;
      }
      multiply(codes, kRuns == 1 || count < kRunSteps ? count : kRunSteps, token, at, ahead, sum);
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
        multiply(codes + kRunSteps * kStepBytes, count - kRunSteps, token, at + ByteRow::kRun,
                 ahead, second);
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
  exact.row_bytes = fast_row_bytes<ByteRow>;
  exact.load_row = load_row_by_groups<byte_load_group<E>>;
  exact.load_group = byte_load_group<E>;
  exact.multiply = multiply_bytes<V, E>;
  exact.peak = peak<ByteProducts<V, E::kSigned>, 8>;
  return exact;
}

}  // namespace
}  // namespace ey::cpu
