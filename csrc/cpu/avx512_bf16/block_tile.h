// SPDX-License-Identifier: Apache-2.0
// Packed weights x bf16 activations: codes become bf16 exactly, vdpbf16ps adds two products to each
// fp32 lane, and the sum over a group is scaled:
//   c[t][r] += scale[r] * (sum_k w[r][k] x[t][k] - (zero[r] - centre) * sum_k x[t][k])
//
// A lane is an output row, so no sum over lanes is ever taken. A step is 64 bytes of codes of each
// lane set; an expander E makes bf16 pairs of k of them, in the order that costs least, and
// activation rows are kept in that order (load_group):
//   E::kStep     k in a step                  E::kDots     dot products of a step and lane set
//   E::pair(i)   pair of x that dot i takes   E::order     k of a step by place in the row
//   e.weights<i>(codes)                       the bf16 pairs of dot i
//
// Registers of a tile of M tokens: 2 M sums, 2 codes, 2 weights, 1 activation, E's tables; with
// M = 12 that is 24 + 5 + tables of 32. Up to five tokens have too few sums to hide the latency of
// vdpbf16ps, so they keep several sums of the same thing.
#pragma once

#include "../activation.h"
#include "../avx512/blocks.h"
#include "../avx512/floats.h"
#include "../block_kernel.h"
#include "../features.h"
#include "vec.h"

namespace ey::cpu {
namespace {

template <class E>
struct Exact {
  template <int M>
  struct Tile {
    [[gnu::noinline]] static void run(const Stretch& s, const char* x, int64_t x_stride, float* c);
    [[gnu::noinline]] static void add_zeros(const Scales& zero, const Scales& scale,
                                            const char* sums, int64_t x_stride, float* c);
  };
};

template <class E>
template <int M>
void Exact<E>::Tile<M>::run(const Stretch& s, const char* x, int64_t x_stride, float* c) {
  constexpr int kChains = M <= 2 ? 4 : M <= 5 ? 2 : 1;
  constexpr int kUnroll = kChains > E::kDots ? kChains / E::kDots : 1;
  constexpr int64_t kSegment = 32 * E::kStep;  // k between two looks at what to fetch
  const BlockShape& shape = *s.shape;
  const int64_t group = shape.group(), sums_at = round_up(shape.k, kGroup) * 2;
  const int64_t fetch_step = s.fetch_step();
  const E e;

  Tokens<M> tokens(x, x_stride, s.k_begin * 2);
  const int64_t line = s.k_begin / shape.line_k();
  const char* head = s.block + line * shape.line_bytes();
  const char* steps =
      head + shape.line_head() + (s.k_begin - line * shape.line_k()) / E::kStep * kStepBytes;
  int64_t g = s.k_begin / group;
  int part = static_cast<int>(g % shape.groups_in_line());
  if (!s.add) {
#pragma GCC unroll 24
    for (int i = 0; i < M * 2; ++i) _mm512_storeu_ps(c + i * kHalfRows, _mm512_setzero_ps());
  }
  for (int64_t k = s.k_begin; k < s.k_end; ++g) {
    const int64_t end = (g + 1) * group < s.k_end ? (g + 1) * group : s.k_end;
    __m512 acc[kChains][M][2];
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) acc[i][m][0] = acc[i][m][1] = _mm512_setzero_ps();
    }
    while (k < end) {
      const int64_t stop = k + kSegment < end ? k + kSegment : end;
      const char *fetch = s.fetch_at(steps), *second = s.second_at(steps);

      const auto step = [&](auto u) __attribute__((always_inline)) {
        _mm_prefetch(fetch, _MM_HINT_T0);
        _mm_prefetch(second, _MM_HINT_T0);
        const auto set_a = _mm512_load_si512(steps), set_b = _mm512_load_si512(steps + 64);
        const auto dot = [&](auto i) __attribute__((always_inline)) {
          constexpr int kI = decltype(i)::value;
          constexpr int kChain = (decltype(u)::value * E::kDots + kI) % kChains;
          const auto w_a = e.template weights<kI>(set_a), w_b = e.template weights<kI>(set_b);
#pragma GCC unroll 12
          for (int m = 0; m < M; ++m) {
            const auto xm = tokens.broadcast(m, E::pair(kI) * 4);
            acc[kChain][m][0] = dot_bf16(acc[kChain][m][0], w_a, xm);
            acc[kChain][m][1] = dot_bf16(acc[kChain][m][1], w_b, xm);
          }
        };
        [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
          (dot(std::integral_constant<int, I>{}), ...);
        }(std::make_integer_sequence<int, E::kDots>{});
        tokens.advance(E::kStep * 2);
        fetch += fetch_step;
        second += fetch_step;
        steps += kStepBytes;
      };
      int64_t count = (stop - k) / E::kStep;
      if constexpr (kUnroll > 1) {
        for (; count >= kUnroll; count -= kUnroll) {
          [&]<int... U>(std::integer_sequence<int, U...>) __attribute__((always_inline)) {
            (step(std::integral_constant<int, U>{}), ...);
          }(std::make_integer_sequence<int, kUnroll>{});
        }
      }
      for (; count > 0; --count) step(std::integral_constant<int, 0>{});
      k = stop;
    }

    const ScaleType type = shape.packing.scale_type;
    const Scales scale = load_both(type, head + part * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int set = 0; set < 2; ++set) {
        __m512 v = acc[0][m][set];
        for (int i = 1; i < kChains; ++i) v = _mm512_add_ps(v, acc[i][m][set]);
        float* out = c + m * kBlockRows + set * kHalfRows;
        _mm512_storeu_ps(out, _mm512_fmadd_ps(v, scale.set[set], _mm512_loadu_ps(out)));
      }
    }
    if (shape.packing.zeros) {
      add_zeros(load_both(type, head + shape.scale_bytes()), scale, x + sums_at + g * sizeof(float),
                x_stride, c);
    }
    if (++part == shape.groups_in_line()) {
      part = 0;
      head += shape.line_bytes();
      steps = head + shape.line_head();
    }
  }
}

// A group's zeros, where they are not the centre.
template <class E>
template <int M>
void Exact<E>::Tile<M>::add_zeros(const Scales& zero, const Scales& scale, const char* sums,
                                  int64_t x_stride, float* c) {
  for (int set = 0; set < 2; ++set) {
    const auto offset =
        _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(E::kCentre), zero.set[set]), scale.set[set]);
    for (int m = 0; m < M; ++m) {
      float sum;
      __builtin_memcpy(&sum, sums + m * x_stride, sizeof sum);
      float* out = c + m * kBlockRows + set * kHalfRows;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(offset, _mm512_set1_ps(sum), _mm512_loadu_ps(out)));
    }
  }
}

// A row: bf16 values, padded to kGroup, each step's in E's order; then sums of groups if the
// weights have zeros.
inline int64_t exact_row_bytes(const RowShape& s) {
  const int64_t k = round_up(s.k, kGroup);
  const int64_t sums = s.packing.zeros ? k / s.packing.group_size * sizeof(float) : 0;
  return k * 2 + round_up(sums, 64) + 64;
}

template <class E>
void exact_load_group(const LoadGroupArgs& a) {
  alignas(64) float values[kGroup];
  __builtin_memcpy(values, a.from, a.n * sizeof(float));
  for (int i = a.n; i < kGroup; ++i) values[i] = 0;
  alignas(64) uint16_t place[32];
  for (int i = 0; i < 32; ++i)
    place[i] = static_cast<uint16_t>(i / E::kStep * E::kStep + E::order(i % E::kStep));
  const auto order = _mm512_load_si512(place);
  char* to = a.row + a.k_begin * 2;
  for (int i = 0; i < kGroup; i += 32) {
    const auto v = _mm512_cvtne2ps_pbh(_mm512_load_ps(values + i + 16), _mm512_load_ps(values + i));
    _mm512_storeu_si512(to + i * 2, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(v)));
  }
  if (!a.shape.packing.zeros) return;
  const int64_t group = a.shape.packing.group_size;
  auto* sums =
      reinterpret_cast<float*>(a.row + round_up(a.shape.k, kGroup) * 2) + a.k_begin / group;
  for (int64_t g = 0; g < kGroup / group; ++g) {
    auto sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < group; i += 16) {  // of the values as they are multiplied: rounded
      const auto half =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to + (g * group + i) * 2));
      sum = _mm512_add_ps(sum, widen_bf16(half));
    }
    sums[g] = _mm512_reduce_add_ps(sum);
  }
}

template <class E, int kMax>
void run_exact(const MultiplyArgs& a, const BlockShape& shape) {
  static constexpr auto table =
      tile_table<Exact<E>::template Tile>(std::make_integer_sequence<int, kMax>{});
  run_tiles<kMax>(a, shape, table.of);
}

template <class E, void (*multiply)(const MultiplyArgs&)>
constexpr Kernel exact_kernel(uint32_t needs) {
  return {.isa = "avx512_bf16",
          .format = E::kFormat,
          .layout = Layout::kBlocks,
          .mode = Mode::kExact,
          .needs = kFeatureAvx512 | kFeatureAvx512Bf16 | needs,
          .rank = 3,
          .bf16_inputs = true,
          .row_bytes = exact_row_bytes,
          .load_row = load_row_by_groups<exact_load_group<E>>,
          .load_group = exact_load_group<E>,
          .h_size = sizeof(float),
          .panel_from_tokens = 0,
          .panel_bytes = nullptr,
          .multiply = multiply,
          .activate = activate<Floats>,
          .combine = combine<Floats>,
          .store_row = store_row_fp32,
          .peak = peak<Vec, 24>,
          .read = read_lines<Vec, 1>};
}

}  // namespace
}  // namespace ey::cpu
