// SPDX-License-Identifier: Apache-2.0
// The gated activations of moe.h on fp32 values. A NaN stays a NaN: no fmin, which would hide it.
#pragma once

#include "../moe.h"
#include "ptx.cuh"

namespace ey::cuda {

// All are g * sigmoid(z) * u, since (1 + tanh(y)) / 2 = sigmoid(2 y): one body, which kernels have
// in many copies.
__device__ __forceinline__ float activate(Activation kind, float gate, float up, float alpha,
                                          float limit) {
  constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
  float g = gate, u = up, z = gate;
  if (kind == Activation::kGeluTanhGlu) {
    z = kTwoSqrt2OverPi * (gate + 0.044715f * gate * gate * gate);
  }
  if (kind == Activation::kSwigluOai) {
    g = gate > limit ? limit : gate;
    u = (up > limit ? limit : (up < -limit ? -limit : up)) + 1.0f;
    z = alpha * g;
  }
  return g / (1.0f + expf(-z)) * u;
}

}  // namespace ey::cuda
