// SPDX-License-Identifier: Apache-2.0
// The border between the schedule (experts.cpp, written once) and the rooms (scalar/, avx2/, ...):
// a kernel is a handful of inner loops for one weight format on one instruction set.
//
// The schedule works in blocks of two halves of kHalfRows weight rows: 16 gate rows and their 16 up
// rows, or 32 down rows. A block's dot products are left in a small fp32 tile c[token][row], which
// stays in cache until `activate` or `combine` has used it. There are two ways to them:
//   rows          straight from the weights' own rows: few tokens, memory is the limit
//   pack, panel   a block is re-ordered once into a panel in cache, then used for all tokens of the
//                 expert: many tokens, arithmetic is the limit. Optional.
#pragma once

#include <cstdint>

#include "../moe.h"

namespace ey::cpu {

inline constexpr int kBlockRows = 32;  // floats per token in a tile: two cache lines
inline constexpr int kHalfRows = kBlockRows / 2;

// Activation rows (hidden states, h) are padded with zeros to a multiple of this many values, so
// that a loop may read whole vectors of them. Weights are never read past their row.
inline constexpr int kRowPad = 64;

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

// h[t][i] = act(c[t][i] + gate_bias[i], c[t][kHalfRows + i] + up_bias[i]) for i < num_rows
struct ActivateArgs {
  const float* c;
  int num_tokens;
  int num_rows;            // <= kHalfRows
  const float* gate_bias;  // null: none
  const float* up_bias;
  Activation activation;
  float alpha;
  float limit;
  char* h;           // first row's first value, of the kernel's activation type
  int64_t h_stride;  // bytes between rows
};

// strip[token[t]][r] += weight[t] * (c[t][r] + bias[r]) for r < num_rows
struct CombineArgs {
  const float* c;
  int num_tokens;
  int num_rows;
  const float* bias;  // null: none
  const int32_t* token;
  const float* weight;
  float* strip;  // [tokens][kBlockRows]
};

struct Kernel {
  const char* isa;  // the room's name, and what EXPERTYARD_ISA forces
  Format format;
  uint32_t needs;       // bits of Feature
  int rank;             // among the kernels that can run, the highest serves
  bool bf16_inputs;     // multiplies bf16 activations, so it serves bf16 models only
  int activation_size;  // bytes of one value of an activation row

  void (*load_row)(const void* from, DType dtype, int64_t n, void* to);  // pads with zeros
  void (*rows)(const RowsArgs&);
  int pack_from_tokens;  // tokens of one expert from which packing pays; 0: there is no pack
  int64_t (*panel_bytes)(int64_t k);
  void (*pack)(const PackArgs&);
  void (*panel)(const PanelArgs&);
  void (*activate)(const ActivateArgs&);
  void (*combine)(const CombineArgs&);
  void (*store_row)(const float* from, int64_t n, DType dtype, void* to);

  // Probes of the machine's limits (limits.h): multiply-adds in registers, counted in FLOPs; and a
  // plain read of memory.
  int64_t (*peak)(int64_t steps);
  void (*read)(const char* p, int64_t bytes);
};

// Kernels are found through a linker section: no constructor runs, so no instruction of a room's
// instruction set is executed before the CPU has been asked.
#define EY_REGISTER_KERNEL(kernel)                              \
  extern const ::ey::cpu::Kernel* const ey_registered_##kernel; \
  __attribute__((section("ey_kernels"), used))                  \
  const ::ey::cpu::Kernel* const ey_registered_##kernel = &kernel

}  // namespace ey::cpu
