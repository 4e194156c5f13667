// SPDX-License-Identifier: Apache-2.0
// Making a Status, and three habits of every host function here: say what failed, leave the
// caller's current device as it was, and do not disturb a CUDA graph that another thread captures.
#pragma once

#include "cuda.h"
#include "ptx.cuh"

namespace ey::cuda {

inline Status cuda_failed(cudaError_t error, const char* what) {
  return failure("%s: CUDA error %d: %s", what, int(error), cudaGetErrorString(error));
}

Status check_device(int device);  // that this machine has it

class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    error_ = cudaGetDevice(&before_);
    changed_ = error_ == cudaSuccess && before_ != device;
    if (changed_) error_ = cudaSetDevice(device);
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_;
  cudaError_t error_;
};

// Allocating and freeing are refused, and break the capture, while any thread captures a graph in
// the default mode; what we allocate and free belongs to no capture.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace ey::cuda
