// SPDX-License-Identifier: Apache-2.0
// The contract between the torch op, the registry and the kernels. Plain structs: no torch, no STL.
//
//   out[t] = sum_k topk_weights[t, k] * FFN[topk_ids[t, k]](hidden_states[t])
//   FFN[e](x) = down_e @ act(gate_e @ x + gate_bias_e, up_e @ x + up_bias_e) + down_bias_e
//
// Sums and the weighted combine are in fp32; out is rounded once.
#pragma once

#include <cstdint>

namespace ey {

enum class DType : int32_t { kF32, kBF16, kF16 };  // of hidden states, of routing weights

enum class Format : int32_t { kFp32, kBf16, kFp16 };  // of expert weights

enum class Activation : int32_t {
  kSiluGlu,      // silu(gate) * up
  kGeluTanhGlu,  // gelu_tanh(gate) * up
  kSwigluOai,  // g = min(gate, limit), u = clamp(up, -limit, limit): (u + 1) * g * sigmoid(alpha *
               // g)
};

// Where one expert lies. Rows are contiguous along their last dimension (hidden_size for gate and
// up, intermediate_size for down); ExpertSet says how far apart rows are. Interleaved gate/up is
// up = gate + one row, with twice the row stride: no copy. Biases are fp32, contiguous, or null.
struct ExpertPointers {
  const void* gate;  // null: this expert is not here, and its share of the sum is left out
  const void* up;
  const void* down;
  const float* gate_bias;  // [intermediate_size]
  const float* up_bias;    // [intermediate_size]
  const float* down_bias;  // [hidden_size]
};

// The experts of one layer on one device.
struct ExpertSet {
  Format format;
  Activation activation;
  float alpha;  // kSwigluOai only
  float limit;  // kSwigluOai only
  int64_t num_experts;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t gate_up_row_stride;     // bytes between two gate rows, and between two up rows
  int64_t down_row_stride;        // bytes between two down rows
  const ExpertPointers* experts;  // [num_experts], in the memory of the device that computes

  // GPUs only, written by cuda::make_table.
  uint64_t* bad_id = nullptr;     // where a kernel reports an id that names no expert
  bool rows_are_aligned = false;  // every row of every expert starts at a multiple of 16 bytes
};

// One call. Everything is row-major; hidden_states and out have contiguous rows.
struct MoeArgs {
  int64_t num_tokens;
  int64_t top_k;
  const void* hidden_states;  // [num_tokens, hidden_size] of hidden_dtype
  void* out;                  // [num_tokens, hidden_size] of hidden_dtype; wholly written
  DType hidden_dtype;
  const void* topk_ids;  // [num_tokens, top_k] int32 or int64; -1 and num_experts mean "none"
  bool ids_are_int64;
  const void* topk_weights;  // [num_tokens, top_k] of weights_dtype
  DType weights_dtype;
  const ExpertSet* set;
};

inline constexpr int64_t size_of(DType t) { return t == DType::kF32 ? 4 : 2; }
inline constexpr int64_t size_of(Format f) { return f == Format::kFp32 ? 4 : 2; }

}  // namespace ey
