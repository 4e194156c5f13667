// SPDX-License-Identifier: Apache-2.0
// Every instruction that C++ cannot say, wrapped once. nvcc compiles this file; g++ compiles the
// same kernels with tests/cuda_emulator/cuda_emulator.h, which has each of these names for a CPU.
// No CUDA library header is included (cuda_bf16.h alone costs seconds in every file).
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(__CUDACC__)
#include "cuda_emulator.h"
#else

#include <cuda_runtime.h>

#include <type_traits>

namespace ey::cuda::ptx {

// The block's dynamic shared memory. There is no static shared memory in these kernels.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char shared_memory[];
  return shared_memory;
}

// 16 bytes of read-only memory that this block will not read again: it stays out of L1.
__device__ __forceinline__ uint4 load16_once(const void* address) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
}

__device__ __forceinline__ float4 load_float4(const float* address) {
  return *reinterpret_cast<const float4*>(address);
}

__device__ __forceinline__ float f16_to_float(uint16_t bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

__device__ __forceinline__ uint16_t float_to_f16(float f) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}

__device__ __forceinline__ uint16_t float_to_bf16(float f) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}

// One word that the host may read at any time (pinned memory): whole or not at all.
__device__ __forceinline__ void store_for_host(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Runs kernel(args...) on the stream; what the launch itself says comes back. The arguments are
// converted to the kernel's parameter types here, as <<<>>> would.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, std::common_type_t<Parameters>... arguments) {
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                          shared_bytes, stream);
}

}  // namespace ey::cuda::ptx
#endif
