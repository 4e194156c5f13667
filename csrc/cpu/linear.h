// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../moe.h"
#include "../status.h"
#include "kernel.h"

namespace ey {

// A format and its packing as the integers that an operator of torch takes.
struct LinearPacking {
  Format format;
  Packing packing;

  int64_t encode() const {
    return static_cast<int64_t>(format) | static_cast<int64_t>(packing.scale_type) << 8 |
           static_cast<int64_t>(packing.zeros) << 16;
  }
  static LinearPacking decode(int64_t code, int64_t group_size) {
    return {.format = static_cast<Format>(code & 0xFF),
            .packing = {.scale_type = static_cast<ScaleType>(code >> 8 & 0xFF),
                        .group_size = group_size,
                        .zeros = (code >> 16 & 1) != 0}};
  }
};

}  // namespace ey

namespace ey::cpu {

// out[t, n] = sum_k weight[n, k] * input[t, k]; sums in fp32, rounded once.
struct LinearArgs {
  int64_t num_tokens, in_features, out_features;
  const void* input;  // [num_tokens, in_features] of dtype
  void* out;          // [num_tokens, out_features] of dtype; wholly written
  DType dtype;
  Format format;
  Packing packing;
  const void* weight;  // blob of blocks.h, laid out as w2
};

Status linear(const Kernel& kernel, const LinearArgs& args, int max_threads);

}  // namespace ey::cpu
