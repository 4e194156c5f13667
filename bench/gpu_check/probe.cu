// SPDX-License-Identifier: Apache-2.0
// Rates of a card, for gpu_check: reading memory, mma.sync with operands in registers, and on
// Hopper wgmma with one operand in registers and the other in shared memory. A negative result is
// minus a cudaError_t.
#include <cuda_runtime.h>

#include <cstdint>

#if EXPERTYARD_HOPPER
#include "wgmma.cuh"
#endif

namespace {

__global__ void read(const uint4* memory, size_t n, uint32_t* sink) {
  uint32_t sum = 0;
  const size_t stride = size_t(gridDim.x) * blockDim.x;
  size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {
    uint4 v[4];
    for (int j = 0; j < 4; ++j) v[j] = __ldcs(memory + i + j * stride);
    for (int j = 0; j < 4; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < n; i += stride) sum ^= memory[i].x;
  if (sum == 0x12345678) *sink = sum;  // keeps the loads
}

constexpr int kAccumulators = 8, kRounds = 4096;

__global__ void multiply(float* sink) {
  float d[kAccumulators][4] = {};
  const uint32_t a = 0x3f803f80u + threadIdx.x, b = 0x3f003f00u + threadIdx.x;
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, "
          "{%5, %5}, {%0, %1, %2, %3};"
          : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
          : "r"(a), "r"(b));
    }
  }
  float sum = 0;
  for (int i = 0; i < kAccumulators; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  if (sum == 12345.0f) *sink = sum;
}

#if EXPERTYARD_HOPPER
constexpr int kWgmmaThreads = 256, kWgmmaRounds = 1024, kPanelBytes = 128 * 128;

// As csrc/cuda/hopper.cuh does it: two warpgroups, 64 rows x 128 columns each at a time.
__global__ void __launch_bounds__(kWgmmaThreads, 1) multiply_wgmma(float* sink) {
  namespace ptx = ey::cuda::ptx;
  char* const panel = ptx::dynamic_shared();
  for (int i = threadIdx.x; i < kPanelBytes / 4;
       i += kWgmmaThreads) {  // numbers around 1, no zeros
    reinterpret_cast<uint32_t*>(panel)[i] = 0x3f803f80u ^ (i * 2654435761u & 0x807f807fu);
  }
  ptx::fence_for_async();
  __syncthreads();
  float d[16][4] = {};
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = 0x3f803f80u ^ ((threadIdx.x + i) * 40503u & 0x807f807fu);
  for (int round = 0; round < kWgmmaRounds; ++round) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::wgmma_bf16(d, a, ptx::token_matrix(panel + 32 * i), true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  float sum = 0;
  for (int n = 0; n < 16; ++n) sum += d[n][0] + d[n][1] + d[n][2] + d[n][3];
  if (sum == 12345.0f) *sink = sum;
}
#endif

int blocks() {
  int device = 0, n = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
  return n;
}

// The fastest of several runs, in seconds.
template <class Launch>
double seconds(Launch launch) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  double best = 1e30;
  for (int i = 0; i < 10; ++i) {
    cudaEventRecord(begin);
    launch();
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i > 1 && ms / 1e3 < best) best = ms / 1e3;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? best : -double(error);
}

}  // namespace

extern "C" double read_seconds(const void* memory, size_t bytes) {
  uint32_t* sink = nullptr;
  if (cudaError_t e = cudaMalloc(&sink, 4); e != cudaSuccess) return -double(e);
  const double s = seconds(
      [&] { read<<<blocks() * 4, 512>>>(static_cast<const uint4*>(memory), bytes / 16, sink); });
  cudaFree(sink);
  return s;
}

extern "C" double mma_sync_flops() {
  float* sink = nullptr;
  if (cudaError_t e = cudaMalloc(&sink, 4); e != cudaSuccess) return -double(e);
  constexpr int kThreads = 512;
  const int n = blocks() * 2;
  const double s = seconds([&] { multiply<<<n, kThreads>>>(sink); });
  cudaFree(sink);
  const double flops = 2.0 * 16 * 8 * 16 * kAccumulators * kRounds * (kThreads / 32) * n;
  return s > 0 ? flops / s : s;
}

#if EXPERTYARD_HOPPER
extern "C" double wgmma_flops() {
  float* sink = nullptr;
  if (cudaError_t e = cudaMalloc(&sink, 4); e != cudaSuccess) return -double(e);
  const int n = blocks() * 4;  // two of them fit a multiprocessor
  const double s = seconds([&] { multiply_wgmma<<<n, kWgmmaThreads, kPanelBytes>>>(sink); });
  cudaFree(sink);
  const double flops = 2.0 * 64 * 128 * 16 * 4 * kWgmmaRounds * (kWgmmaThreads / 128) * n;
  return s > 0 ? flops / s : s;
}
#endif
