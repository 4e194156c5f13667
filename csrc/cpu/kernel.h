// SPDX-License-Identifier: Apache-2.0
// The border between the schedule (experts.cpp, written once) and the rooms (scalar/, avx2/, ...):
// a kernel is a handful of inner loops for one weight format on one instruction set.
//
// The schedule works in blocks of kBlockRows weight rows: 16 gate rows and their 16 up rows, or 32
// down rows. `rows` leaves a block's dot products in a small fp32 tile c[token][row], which stays
// in cache until `activate` or `combine` has used it.
#pragma once

#include <cstdint>

#include "../moe.h"

namespace ey::cpu {

inline constexpr int kBlockRows = 32;  // floats per token in a tile: two cache lines
inline constexpr int kGateRows = kBlockRows / 2;

// Activation rows (hidden states, h) are padded with zeros to a multiple of this many values, so
// that a loop may read whole vectors of them. Weights are never read past their row.
inline constexpr int kRowPad = 64;

// c[t][r] = sum_k w[r][k] * x[t][k] for r < num_rows
struct RowsArgs {
  const char* w;          // first weight row
  int64_t w_stride;       // bytes between rows
  int num_rows;           // <= kBlockRows
  int64_t k;              // values in a row
  const char* next;       // rows that this thread will want next (same stride), or null: prefetch
  const void* const* x;   // [num_tokens] activation rows
  int num_tokens;
  float* c;               // [num_tokens][kBlockRows]; the caller may offset it by a row
};

// h[t][i] = act(c[t][i] + gate_bias[i], c[t][kGateRows + i] + up_bias[i]) for i < num_rows
struct ActivateArgs {
  const float* c;
  int num_tokens;
  int num_rows;  // <= kGateRows
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
  const char* isa;   // the room's name, and what EXPERTYARD_ISA forces
  Format format;
  uint32_t needs;    // bits of Feature
  int rank;          // among the kernels that can run, the highest serves
  bool bf16_inputs;  // multiplies bf16 activations, so it serves bf16 models only
  int activation_size;  // bytes of one value of an activation row

  void (*load_row)(const void* from, DType dtype, int64_t n, void* to);  // pads with zeros
  void (*rows)(const RowsArgs&);
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
#define EY_REGISTER_KERNEL(kernel)                                      \
  extern const ::ey::cpu::Kernel* const ey_registered_##kernel;         \
  __attribute__((section("ey_kernels"), used, visibility("hidden")))    \
  const ::ey::cpu::Kernel* const ey_registered_##kernel = &kernel

}  // namespace ey::cpu
