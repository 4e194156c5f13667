// SPDX-License-Identifier: Apache-2.0
// What kernels of Layout::kRows have in common: how `multiply` becomes either
//   rows          straight from the weights' own rows: few tokens, memory is the limit
//   pack, panel   a block is re-ordered once into a panel in cache, then used for all tokens of the
//                 expert: many tokens, arithmetic is the limit
#pragma once

#include "convert.h"
#include "kernel.h"

namespace ey::cpu {
namespace {

// c[t][r] = sum_k w[r][k] * x[t][k] for r < num_rows
struct RowsArgs {
  const char* w;         // first weight row
  int64_t w_stride;      // bytes between rows
  int num_rows;          // <= kHalfRows
  int64_t k;             // values in a row
  const char* next;      // rows that this thread will want next (same stride), or null: prefetch
  const void* const* x;  // [num_tokens] activation rows
  int num_tokens;
  float* c;  // [num_tokens][kBlockRows]; the caller may offset it by a row
};

// Re-orders num_rows (<= kHalfRows) rows of k weights into one half of a panel; missing rows:
// zeros.
struct PackArgs {
  const char* w;
  int64_t w_stride;
  int num_rows;
  int64_t k;
  char* panel;  // of panel_bytes(k)
  int half;     // 0 or 1
};

// c[t][r] (+)= sum_k panel[r][k] * x[t][k] for all kBlockRows rows
struct PanelArgs {
  const char* panel;
  int64_t k;
  const void* const* x;  // [num_tokens] activation rows
  int64_t x_offset;      // bytes into each row where this panel's k begins
  int num_tokens;
  bool add;  // to c, or over it
  float* c;
  // Rows that this thread will pack next, to be prefetched meanwhile: two halves, or null.
  const char* next[2];
  int64_t next_stride;
};

inline constexpr int64_t kPanelK = 2048;  // weights of a row in one panel: 128 KB of L2 in bf16

// Rows start a cache line apart from a power of two, or they would share sets of the L1.
template <int kSize>
int64_t padded_row_bytes(const RowShape& s) {
  return round_up(s.k, kRowPad) * kSize + 64;
}

template <void (*rows)(const RowsArgs&)>
void multiply_rows(const MultiplyArgs& a) {
  for (int half = 0; half < 2; ++half) {
    rows({.w = a.w.row[half],
          .w_stride = a.w.row_stride,
          .num_rows = a.w.num_rows[half],
          .k = a.w.k,
          .next = a.last ? a.w.next_row[half] : nullptr,
          .x = a.x,
          .num_tokens = a.num_tokens,
          .c = a.c + half * kHalfRows});
  }
}

template <int kSize, void (*pack)(const PackArgs&), void (*panel)(const PanelArgs&)>
void multiply_panels(const MultiplyArgs& a) {
  const Weights& w = a.w;
  const bool filled = a.panel_filled && w.k <= kPanelK;
  for (int64_t k = 0; k < w.k; k += kPanelK) {
    const int64_t length = w.k - k < kPanelK ? w.k - k : kPanelK;
    for (int half = 0; half < 2 && !filled; ++half) {
      pack({.w = w.row[half] + k * kSize,
            .w_stride = w.row_stride,
            .num_rows = w.num_rows[half],
            .k = length,
            .panel = a.panel,
            .half = half});
    }
    // What is packed next: these rows' next stretch, or (at the end) the next block.
    PanelArgs args = {.panel = a.panel,
                      .k = length,
                      .x = a.x,
                      .x_offset = k * kSize,
                      .num_tokens = a.num_tokens,
                      .add = k > 0,
                      .c = a.c,
                      .next = {nullptr, nullptr},
                      .next_stride = w.row_stride};
    for (int half = 0; half < 2; ++half) {
      if (k + length < w.k) {
        args.next[half] = w.row[half] + (k + length) * kSize;
      } else if (a.last) {
        args.next[half] = w.next_row[half];
      }
    }
    panel(args);
  }
}

}  // namespace
}  // namespace ey::cpu
