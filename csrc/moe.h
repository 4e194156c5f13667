// SPDX-License-Identifier: Apache-2.0
// The contract between the torch op, the registry and the kernels. Plain structs: no torch, no STL.
//
//   out[t] = sum_k topk_weights[t, k] * FFN[topk_ids[t, k]](hidden_states[t])
//   FFN[e](x) = down_e @ act(gate_e @ x + gate_bias_e, up_e @ x + up_bias_e) + down_bias_e
//            or down_e @ act(up_e @ x + up_bias_e) + down_bias_e, if act has no gate
//
// Sums and the weighted combine are in fp32; out is rounded once.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define EY_BOTH __host__ __device__
#else
#define EY_BOTH
#endif

namespace ey {

enum class DType : int32_t { kF32, kBF16, kF16 };  // of hidden states, of routing weights

enum class Format : int32_t { kFp32, kBf16, kFp16, kInt8, kInt4, kFp8, kMxfp4 };  // of weights

// Where weights lie: kRows, each matrix as torch and checkpoints have it (fp32, bf16, fp16 only),
// or kBlocks, packed for our kernels (blocks.h; every format but fp32 and fp16).
enum class Layout : int32_t { kRows, kBlocks };

// What a CPU kernel multiplies with: kExact, activations as they are (bf16 or wider), so that CPU
// and GPU differ by the order of fp32 sums only; kFast, activations quantised to 8 bits in groups
// of 128.
enum class Mode : int32_t { kExact, kFast };

enum class ScaleType : int32_t { kNone, kBf16, kFp16, kFp32, kE8m0 };  // kE8m0: 2^(byte - 127)

// How a quantised matrix is scaled: w = scale * (code - zero), one scale per row and group along k.
struct Packing {
  ScaleType scale_type;  // kNone: weights are plain numbers (bf16)
  int64_t group_size;    // 0: one group, the whole row
  bool zeros;            // a zero per group, of scale_type; else the format's own (blocks.h)
};

enum class Activation : int32_t {
  kSiluGlu,      // silu(gate) * up
  kGeluTanhGlu,  // gelu_tanh(gate) * up
  kSwigluOai,  // g = min(gate, limit), u = clamp(up, -limit, limit): (u + 1) * g * sigmoid(alpha *
               // g)
  kSiluGluClampBefore,  // silu(min(gate, limit)) * clamp(up, -limit, limit)
  kSiluGluClampAfter,   // min(silu(gate), limit) * clamp(up, -limit, limit)
  kSoftcapGlu,          // alpha * tanh(gate / alpha) * sigmoid(gate) * limit * tanh(up / limit)
  kRelu2,               // max(up, 0)^2, without a gate
};

EY_BOTH constexpr bool has_gate(Activation a) { return a != Activation::kRelu2; }

// Where one expert lies. kBlocks: gate and down are the blobs of blocks.h for w13 and w2, up is not
// used. Without a gate, gate is the up matrix. kRows: rows are contiguous along their last
// dimension (hidden_size for gate and up, intermediate_size for down); ExpertSet says how far apart
// rows are. Interleaved gate/up is up = gate + one row, with twice the row stride: no copy. Biases
// are fp32, contiguous, or null.
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
  Layout layout;
  Mode mode;
  Packing packing;  // kBlocks only
  Activation activation;
  float alpha;  // kSwigluOai; kSoftcapGlu: the gate's cap
  float limit;  // kSwigluOai, kSiluGluClamp*; kSoftcapGlu: the cap of up. May be infinite
  int64_t num_experts;
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t gate_up_row_stride;     // kRows: bytes between two gate rows, and between two up rows
  int64_t down_row_stride;        // kRows: bytes between two down rows
  const ExpertPointers* experts;  // [num_experts], in the memory of the device that computes

  // GPUs only, written by cuda::make_table.
  uint64_t* bad_id = nullptr;     // where a kernel reports an id that names no expert
  bool rows_are_aligned = false;  // every row of every expert starts at a multiple of 16 bytes
  int32_t capability = 0;         // of the device: 90 is compute capability 9.0
  // kBlocks: pairs of a token and an expert, per expert, up to which cuda_stream serves calls, and
  // beyond which the kernels of wgmma do (csrc/cuda/family_choice.cuh). Reasoned, or measured.
  float stream_pairs = 8, wgmma_pairs = 64;
};

// One call. Everything is row-major; hidden_states and out have contiguous rows.
struct MoeArgs {
  int64_t num_tokens;
  int64_t top_k;
  const void* hidden_states;  // [num_tokens, hidden_size] of hidden_dtype
  void* out;                  // [num_tokens, hidden_size] of out_dtype(*this); wholly written
  DType hidden_dtype;
  const void* topk_ids;  // [num_tokens, top_k] int32 or int64; -1 and num_experts mean "none"
  bool ids_are_int64;
  const void* topk_weights;  // [num_tokens, top_k] of weights_dtype
  DType weights_dtype;
  const ExpertSet* set;
  bool out_is_fp32 = false;  // else out has hidden_dtype. Parts of a sum are added before rounding.
};

inline constexpr DType out_dtype(const MoeArgs& a) {
  return a.out_is_fp32 ? DType::kF32 : a.hidden_dtype;
}

inline constexpr int64_t size_of(DType t) { return t == DType::kF32 ? 4 : 2; }
inline constexpr int64_t size_of(Format f) { return f == Format::kFp32 ? 4 : 2; }  // of kRows

}  // namespace ey
