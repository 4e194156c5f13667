// SPDX-License-Identifier: Apache-2.0
// The gated activations of moe.h on fp32 values. A NaN stays a NaN: no fmin, which would hide it.
#pragma once

#include "../moe.h"
#include "ptx.cuh"

namespace ey::cuda {

__device__ __forceinline__ float activate(Activation kind, float gate, float up, float alpha,
                                          float limit) {
  switch (kind) {
    case Activation::kSiluGlu:
      return gate / (1.0f + expf(-gate)) * up;
    case Activation::kGeluTanhGlu: {
      constexpr float kSqrt2OverPi = 0.7978845608028654f;
      const float inner = kSqrt2OverPi * (gate + 0.044715f * gate * gate * gate);
      return 0.5f * gate * (1.0f + tanhf(inner)) * up;
    }
    case Activation::kSwigluOai: {
      const float g = gate > limit ? limit : gate;
      const float u = up > limit ? limit : (up < -limit ? -limit : up);
      return (u + 1.0f) * g / (1.0f + expf(-alpha * g));
    }
  }
  return 0.0f;
}

}  // namespace ey::cuda
