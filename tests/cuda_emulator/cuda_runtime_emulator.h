// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime functions that csrc/cuda calls, for a machine that the test describes.
#pragma once

#include <map>

#include "simt.h"

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDefault = 4 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline const cudaStream_t cudaStreamPerThread = reinterpret_cast<cudaStream_t>(2);
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
inline constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
};

namespace emu {

struct Machine {
  int driver_version = 13000;             // 0: none
  cudaError_t count_error = cudaSuccess;  // of cudaGetDeviceCount
  int devices = 1;
  int major = 8, minor = 6;
  bool has_code = true;               // this build has code for that capability
  int most_shared_bytes = 99 * 1024;  // of a block: what the smallest cards give
  std::map<const void*, int> shared_bytes_of;
  int multiprocessors = 4;
  int64_t allocations_left = -1;      // then cudaErrorMemoryAllocation; < 0: without end
  std::map<void*, size_t> allocated;  // device and pinned
  int device = 0;                     // the current one
  int launch_device = -1;             // of the last kernel
  int capture_mode = cudaStreamCaptureModeGlobal;
  unsigned long long capture_id = 0;  // of every stream; 0: none is captured
  std::string failure;                // of the kernel that failed last
};
inline Machine machine;

inline cudaError_t allocate(void** p, size_t bytes) {
  if (machine.allocations_left == 0) return cudaErrorMemoryAllocation;
  if (machine.allocations_left > 0) --machine.allocations_left;
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*p, 0xff, bytes);
  machine.allocated[*p] = bytes;
  return cudaSuccess;
}

inline cudaError_t release(void* p) {
  if (p == nullptr) return cudaSuccess;
  if (machine.allocated.erase(p) == 0) return cudaErrorInvalidValue;
  std::free(p);
  return cudaSuccess;
}

}  // namespace emu

inline const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    default:
      return "an error of the emulated runtime";
  }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* v) {
  *v = emu::machine.driver_version;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = emu::machine.count_error == cudaSuccess ? emu::machine.devices : 0;
  return emu::machine.count_error;
}
inline cudaError_t cudaGetDevice(int* d) {
  *d = emu::machine.device;
  return emu::machine.count_error;
}
inline cudaError_t cudaSetDevice(int d) {
  if (emu::machine.count_error != cudaSuccess) return emu::machine.count_error;
  if (d < 0 || d >= emu::machine.devices) return cudaErrorInvalidDevice;
  emu::machine.device = d;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {"Emulated GPU", emu::machine.major, emu::machine.minor, emu::machine.multiprocessors};
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emu::machine.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emu::machine.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emu::machine.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emu::machine.most_shared_bytes;
  }
  return emu::machine.count_error;
}
inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = size_t(3) << 30;
  *total_bytes = size_t(4) << 30;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const int before = emu::machine.capture_mode;
  emu::machine.capture_mode = *mode;
  *mode = cudaStreamCaptureMode(before);
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                            unsigned long long* id) {
  *status = emu::machine.capture_id ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *id = emu::machine.capture_id;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** p, size_t bytes) { return emu::allocate(p, bytes); }
inline cudaError_t cudaFree(void* p) { return emu::release(p); }
inline cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  return emu::allocate(p, bytes);
}
inline cudaError_t cudaFreeHost(void* p) { return emu::release(p); }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
namespace ey::cuda::ptx {

template <class T>
cudaError_t address_of(const T& symbol, void** address) {
  *address = const_cast<void*>(static_cast<const void*>(&symbol));
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), int bytes) {
  if (!emu::machine.has_code) return cudaErrorNoKernelImageForDevice;
  if (bytes > emu::machine.most_shared_bytes) return cudaErrorInvalidValue;
  emu::machine.shared_bytes_of[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

// A real launch returns before the kernel runs; here it has run, and its failure is the launch's.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, std::common_type_t<Parameters>... arguments) {
  const unsigned threads = block.x * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || threads == 0 || threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  if (!emu::machine.has_code) return cudaErrorNoKernelImageForDevice;
  // More than 48 KiB must have been asked for.
  const int allowed = emu::machine.shared_bytes_of[reinterpret_cast<const void*>(kernel)];
  if (shared_bytes > size_t(std::max(allowed, 48 * 1024))) return cudaErrorInvalidValue;
  emu::machine.launch_device = emu::machine.device;
  try {
    emu::Grid(grid, block, shared_bytes, [=] { kernel(arguments...); }).run();
  } catch (const emu::Failure& failure) {
    emu::machine.failure = failure.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// One block a multiprocessor, as for the kernels here that fill its shared memory.
template <class... Parameters>
cudaError_t launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t shared_bytes, cudaStream_t stream,
                            std::common_type_t<Parameters>... arguments) {
  const unsigned blocks = grid.x * grid.y * grid.z;
  if (blocks > unsigned(emu::machine.multiprocessors)) return cudaErrorCooperativeLaunchTooLarge;
  const int before = emu::options.resident_blocks;
  emu::options.resident_blocks = int(blocks);
  const cudaError_t error = launch(kernel, grid, block, shared_bytes, stream, arguments...);
  emu::options.resident_blocks = before;
  return error;
}

}  // namespace ey::cuda::ptx
