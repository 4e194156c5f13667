// SPDX-License-Identifier: Apache-2.0
#include <mutex>

#include "stream_counters.cuh"

namespace ey::cuda::stream {
namespace {

constexpr int kSets = 64;  // of 24 KiB
constexpr int kMostDevices = 64;

__device__ Counters all_counters[kSets];

struct Owner {
  cudaStream_t stream;
  unsigned long long capture;  // 0: not captured
};

struct Device {
  Counters* counters = nullptr;
  Owner owners[kSets] = {};
  int num_owners = 0;
};

std::mutex mutex;
Device devices[kMostDevices];

}  // namespace

cudaError_t counters_of(cudaStream_t stream, Counters** counters) {
  *counters = nullptr;
  int device = 0;
  if (cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  // The per-thread default stream is another one in each thread.
  if (device >= kMostDevices || stream == cudaStreamPerThread) return cudaSuccess;
  Owner owner{stream, 0};
  if (stream != nullptr) {  // the default stream cannot be captured
    cudaStreamCaptureStatus status;
    const cudaError_t e = cudaStreamGetCaptureInfo(stream, &status, &owner.capture);
    if (e != cudaSuccess) return e;
    if (status == cudaStreamCaptureStatusNone) owner.capture = 0;
  }
  const std::lock_guard lock(mutex);
  Device& d = devices[device];
  if (d.counters == nullptr) {
    void* address = nullptr;
    if (cudaError_t e = ptx::address_of(all_counters, &address); e != cudaSuccess) return e;
    d.counters = static_cast<Counters*>(address);
  }
  int i = 0;
  while (i < d.num_owners &&
         (d.owners[i].stream != owner.stream || d.owners[i].capture != owner.capture)) {
    ++i;
  }
  if (i == kSets) return cudaSuccess;
  if (i == d.num_owners) d.owners[d.num_owners++] = owner;
  *counters = d.counters + i;
  return cudaSuccess;
}

}  // namespace ey::cuda::stream
