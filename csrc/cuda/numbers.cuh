// SPDX-License-Identifier: Apache-2.0
// The number types of weights and activations as kernels see them: bits in memory, fp32 in
// registers.
#pragma once

#include "../moe.h"
#include "ptx.cuh"

namespace ey::cuda {

__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// A weight type: its bits, and how one 16-byte vector of them becomes floats.
struct Bf16 {
  uint16_t bits;
  static constexpr int kPerVector = 8;
  __device__ __forceinline__ float value() const { return float_of_bits(uint32_t(bits) << 16); }
  __device__ static __forceinline__ void unpack(uint32_t word, float* out) {
    out[0] = float_of_bits(word << 16);
    out[1] = float_of_bits(word & 0xffff0000u);
  }
};

struct Fp16 {
  uint16_t bits;
  static constexpr int kPerVector = 8;
  __device__ __forceinline__ float value() const { return ptx::f16_to_float(bits); }
  __device__ static __forceinline__ void unpack(uint32_t word, float* out) {
    out[0] = ptx::f16_to_float(uint16_t(word));
    out[1] = ptx::f16_to_float(uint16_t(word >> 16));
  }
};

struct Fp32 {
  uint32_t bits;
  static constexpr int kPerVector = 4;
  __device__ __forceinline__ float value() const { return float_of_bits(bits); }
  __device__ static __forceinline__ void unpack(uint32_t word, float* out) {
    out[0] = float_of_bits(word);
  }
};

template <class W>
__device__ __forceinline__ void unpack(uint4 v, float (&out)[W::kPerVector]) {
  constexpr int kPerWord = W::kPerVector / 4;
  W::unpack(v.x, out);
  W::unpack(v.y, out + kPerWord);
  W::unpack(v.z, out + 2 * kPerWord);
  W::unpack(v.w, out + 3 * kPerWord);
}

// Element i of an array whose type is known only at run time.
__device__ __forceinline__ float load_number(const void* array, DType type, int64_t i) {
  if (type == DType::kF32) return static_cast<const float*>(array)[i];
  const uint16_t bits = static_cast<const uint16_t*>(array)[i];
  return type == DType::kBF16 ? Bf16{bits}.value() : Fp16{bits}.value();
}

__device__ __forceinline__ void store_number(void* array, DType type, int64_t i, float value) {
  if (type == DType::kF32) {
    static_cast<float*>(array)[i] = value;
  } else {
    static_cast<uint16_t*>(array)[i] =
        type == DType::kBF16 ? ptx::float_to_bf16(value) : ptx::float_to_f16(value);
  }
}

}  // namespace ey::cuda
