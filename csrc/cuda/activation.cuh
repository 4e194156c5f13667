// SPDX-License-Identifier: Apache-2.0
// The activations of moe.h on fp32 values. A NaN stays a NaN: no fmin, which would hide it.
#pragma once

#include "../moe.h"
#include "ptx.cuh"

namespace ey::cuda {

// x limited on both sides, or above.
__device__ __forceinline__ float clamp_above(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamp(float x, float limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}

__device__ __forceinline__ float activate_ungated(float up) {  // kRelu2
  const float u = up < 0.0f ? 0.0f : up;
  return u * u;
}

// Of a kind with a gate: g * sigmoid(z) * u, since (1 + tanh(y)) / 2 = sigmoid(2 y). One body,
// which kernels have in many copies.
__device__ __forceinline__ float activate(Activation kind, float gate, float up, float alpha,
                                          float limit) {
  constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
  float g = gate, u = up, z = gate;
  if (kind == Activation::kGeluTanhGlu) {
    z = kTwoSqrt2OverPi * (gate + 0.044715f * gate * gate * gate);
  }
  if (kind == Activation::kSwigluOai) {
    g = clamp_above(gate, limit);
    u = clamp(up, limit) + 1.0f;
    z = alpha * g;
  }
  if (kind == Activation::kSiluGluClampBefore) {
    g = z = clamp_above(gate, limit);
    u = clamp(up, limit);
  }
  if (kind == Activation::kSoftcapGlu) {
    g = alpha * tanhf(gate / alpha);
    u = limit * tanhf(up / limit);
  }
  const float h = g / (1.0f + expf(-z));
  if (kind == Activation::kSiluGluClampAfter) return clamp_above(h, limit) * clamp(up, limit);
  return h * u;
}

// Of any kind.
__device__ __forceinline__ float activate_any(Activation kind, float gate, float up, float alpha,
                                              float limit) {
  return has_gate(kind) ? activate(kind, gate, up, alpha, limit) : activate_ungated(up);
}

}  // namespace ey::cuda
