// SPDX-License-Identifier: Apache-2.0
// The border between the schedule (experts.cpp, written once) and the rooms (scalar/, avx2/, ...):
// a kernel is a handful of inner loops for one weight format on one instruction set.
//
// The schedule works in blocks of two halves of kHalfRows weight rows: 16 gate rows and their 16 up
// rows, or 32 down rows (or up rows, where there is no gate). `multiply` leaves a block's dot
// products in a small fp32 tile c[token][row], which stays in cache until `activate` or `combine`
// has used it.
#pragma once

#include <cstdint>

#include "../blocks.h"
#include "../moe.h"

namespace ey::cpu {

inline constexpr int kBlockRows = kLanes;  // floats per token in a tile: two cache lines
inline constexpr int kHalfRows = kLaneSet;

// Activation rows (hidden states, h) are padded with zeros to a multiple of this many values, so
// that a loop may read whole vectors of them. Weights are never read past their row.
inline constexpr int kRowPad = 64;

// Packed weights: activation rows are made in groups of this many values (8-bit activations share a
// scale in a group), and padded to whole groups.
inline constexpr int kGroup = 128;

// How far ahead memory is asked for when it is read once: some tens of cache lines in flight.
inline constexpr int64_t kAhead = 4096;

// A row of activations of `k` values; its bytes are the kernel's own affair.
struct RowShape {
  int64_t k;
  Packing packing;  // of the weights that it meets
};

// One row of hidden states -> one activation row.
struct LoadRowArgs {
  const void* from;
  DType dtype;
  RowShape shape;
  char* row;
};

// Values k_begin .. k_begin + n - 1 (n <= kGroup, k_begin a multiple of it) of an activation row;
// missing ones up to a whole group become zeros.
struct LoadGroupArgs {
  const float* from;
  int n;
  int64_t k_begin;
  RowShape shape;
  char* row;
};

// One block of weights, and what this thread reads after it (null: nothing known).
struct Weights {
  int64_t k;
  // Layout::kRows: both halves' first rows
  const char* row[2];
  int num_rows[2];
  const char* next_row[2];
  int64_t row_stride;
  // Layout::kBlocks
  const char* block;
  const char* next_block;
  Packing packing;
};

// c[t][r] = sum_k w[r][k] * x[t][k]. Rows that the block does not have are left as they are
// (kRows) or become zero (kBlocks).
struct MultiplyArgs {
  Weights w;
  const void* const* x;  // [num_tokens] activation rows; kBlocks: row_bytes() apart
  int num_tokens;
  float* c;            // [num_tokens][kBlockRows]
  char* panel;         // of panel_bytes(): a place to re-order the block; kept from tile to tile
  bool panel_filled;   // an earlier tile of the same block has filled it
  bool many_tokens;    // re-ordering pays: this expert's tokens are at least panel_from_tokens
  bool last;           // tile of this block: the next block may be fetched meanwhile
  bool x_is_new;       // rows that this thread has not read lately
  const char* next_x;  // the next block's first rows, if those are new; else null
};

// h[t][i] = act(c[t][i] + gate_bias[i], c[t][kHalfRows + i] + up_bias[i]) for i < num_rows, or
// act(c[t][i] + up_bias[i]) without a gate
struct ActivateArgs {
  const float* c;
  int num_tokens;
  int num_rows;            // <= kHalfRows; <= kBlockRows without a gate
  const float* gate_bias;  // null: none
  const float* up_bias;
  Activation activation;
  float alpha;
  float limit;
  char* h;  // first row's first value: the kernel's activation value, or float (load_group)
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
  Layout layout;
  Mode mode;
  uint32_t needs;    // bits of Feature
  int rank;          // among the kernels that can run, the highest serves
  bool bf16_inputs;  // multiplies bf16 activations, so it serves bf16 models only

  int64_t (*row_bytes)(const RowShape&);  // a multiple of 64
  void (*load_row)(const LoadRowArgs&);
  // null: `activate` writes values of h_size bytes straight into h's rows
  void (*load_group)(const LoadGroupArgs&);
  int h_size;

  int panel_from_tokens;                  // 0: no panel
  int64_t (*panel_bytes)(int64_t max_k);  // null: none
  void (*multiply)(const MultiplyArgs&);
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
