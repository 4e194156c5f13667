// SPDX-License-Identifier: Apache-2.0
// What host code needs to know of the current device to size a launch, asked once.
#pragma once

#include "ptx.cuh"

namespace ey::cuda {

struct Limits {
  int multiprocessors;
  int shared_bytes;  // that a block may have
};

// Of the current device.
inline cudaError_t limits(Limits* out) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&out->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error =
        cudaDeviceGetAttribute(&out->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return error;
}

}  // namespace ey::cuda
