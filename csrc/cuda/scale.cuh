// SPDX-License-Identifier: Apache-2.0
// Scales and zeros of packed weights as fp32, for the 4 rows of a lane.
//
//   sum_k scale * (code - zero) * x[k] = scale * (sum_k (code - middle) * x[k]
//                                                 - (zero - middle) * sum_k x[k])
// with middle = 8 for int4, what its `pair` subtracts; so without zeros the second term is not
// there.
#pragma once

#include "numbers.cuh"

namespace ey::cuda {

constexpr float kInt4Middle = 8.0f;

__device__ __forceinline__ float e8m0_value(uint32_t byte) {
  return float_of_bits(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : byte << 23);
}

// 4 neighbours from a 16-byte (fp32) or 8-byte (16-bit types) aligned place.
__device__ __forceinline__ void load_scales(const char* from, ScaleType type, float (&out)[4]) {
  if (type == ScaleType::kFp32) {
    const float4 v = ptx::load_float4(reinterpret_cast<const float*>(from));
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    return;
  }
  const uint2 v = ptx::load_uint2(from);
  if (type == ScaleType::kBf16) {
    Bf16::unpack(v.x, out);
    Bf16::unpack(v.y, out + 2);
  } else {
    Fp16::unpack(v.x, out);
    Fp16::unpack(v.y, out + 2);
  }
}

// 2 of them: scales of rows row, row + 1, which is even.
__device__ __forceinline__ void load_scale_pair(const char* from, int row, ScaleType type,
                                                float (&out)[2]) {
  if (type == ScaleType::kFp32) {
    const uint2 v = ptx::load_uint2(from + 4 * row);
    out[0] = float_of_bits(v.x), out[1] = float_of_bits(v.y);
    return;
  }
  const uint32_t v = ptx::load_uint(from + 2 * row);
  if (type == ScaleType::kBf16) {
    Bf16::unpack(v, out);
  } else {
    Fp16::unpack(v, out);
  }
}

__device__ __forceinline__ void load_e8m0(const char* from, float (&out)[4]) {
  const uint32_t v = ptx::load_uint(from);
  for (int i = 0; i < 4; ++i) out[i] = e8m0_value(v >> 8 * i & 0xff);
}

}  // namespace ey::cuda
