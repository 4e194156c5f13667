// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together.
#pragma once

#include "ptx.cuh"

namespace ey::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ int sum_of_lanes_before(int mine, int lane) {
  int sum = mine;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  return sum - mine;
}

}  // namespace ey::cuda
