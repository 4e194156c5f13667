// SPDX-License-Identifier: Apache-2.0
// What host code needs to know of the current device to size a launch, asked once.
#pragma once

#include "ptx.cuh"

namespace ey::cuda {

struct Limits {
  int multiprocessors;
  int shared_bytes;  // that a block may have
  int capability;    // 90 is 9.0
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
  int major = 0, minor = 0;
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  out->capability = 10 * major + minor;
  return error;
}

}  // namespace ey::cuda
