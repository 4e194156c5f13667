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
  extern __shared__ __align__(1024) char shared_memory[];
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

__device__ __forceinline__ void store_float4(float* address, float4 value) {
  *reinterpret_cast<float4*>(address) = value;
}

// To global memory, in one piece: left alone, the compiler may store sums one by one.
__device__ __forceinline__ void store16_global(float* address, float4 value) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_uint4(const void* address) {
  return *reinterpret_cast<const uint4*>(address);
}

__device__ __forceinline__ uint2 load_uint2(const void* address) {
  return *reinterpret_cast<const uint2*>(address);
}

__device__ __forceinline__ uint32_t load_uint(const void* address) {
  return *reinterpret_cast<const uint32_t*>(address);
}

// Starts a copy of 16 bytes from global to shared memory; not valid: 16 zero bytes, and from is not
// read. The bytes are there for this thread after commit and wait, for others after a barrier too.
__device__ __forceinline__ void copy16_async(void* shared, const void* from, bool valid) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// The same for bytes that this multiprocessor will copy again soon: they go through its L1.
__device__ __forceinline__ void copy16_async_cached(void* shared, const void* from, bool valid) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kOpen of this thread's groups are under way, the newest ones.
template <int kOpen>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// The same for a number that is known only at run time; more than 7 open ones count as 7.
__device__ __forceinline__ void copy_wait_for(int open) {
  switch (open) {
    case 0:
      return copy_wait<0>();
    case 1:
      return copy_wait<1>();
    case 2:
      return copy_wait<2>();
    case 3:
      return copy_wait<3>();
    case 4:
      return copy_wait<4>();
    case 5:
      return copy_wait<5>();
    case 6:
      return copy_wait<6>();
    default:
      return copy_wait<7>();
  }
}

// d[16 x 8] += a[16 x 16] * b[16 x 8], bf16 pairs in, fp32 out, one matrix a warp. With g = lane /
// 4 and t = lane % 4, each pair two neighbours along k, the lower one in the lower half:
//   a0 (row g, k 2t)  a1 (row g + 8, k 2t)  a2 (row g, k 2t + 8)  a3 (row g + 8, k 2t + 8)
//   b0 (k 2t, column g)  b1 (k 2t + 8, column g)
//   d[0] (row g, column 2t)  d[1] (g, 2t + 1)  d[2] (g + 8, 2t)  d[3] (g + 8, 2t + 1)
__device__ __forceinline__ void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// a * b + c on both halves of bf16 pairs, each rounded once; subnormal numbers are kept.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Byte i of the result is byte (selector >> 4 i & 7) of low, high.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// A counter in global memory that blocks of one grid share. What was written before an add (by this
// thread, or by others that it has met in a barrier) is there for whoever has seen the count.
__device__ __forceinline__ void add_release(uint32_t* counter, uint32_t n) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(n) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t n;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(n) : "l"(counter) : "memory");
  return n;
}

// A value that another multiprocessor has written during this launch: past L1.
__device__ __forceinline__ float load_shared_float(const float* address) { return __ldcg(address); }

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

// Lets the kernel use this much dynamic shared memory, on the current device. Loads it.
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), int bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Where a __device__ variable lies on the current device.
template <class T>
cudaError_t address_of(const T& symbol, void** address) {
  return cudaGetSymbolAddress(address, symbol);
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

// The same with all blocks of the grid running side by side, or none: they may wait for each other.
template <class... Parameters>
cudaError_t launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t shared_bytes, cudaStream_t stream,
                            std::common_type_t<Parameters>... arguments) {
  void* pointers[] = {&arguments...};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                                     shared_bytes, stream);
}

}  // namespace ey::cuda::ptx
#endif
