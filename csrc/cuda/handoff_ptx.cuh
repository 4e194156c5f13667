// SPDX-License-Identifier: Apache-2.0
// What ptx.cuh is for all kernels, for those of the hand-off: words that GPU and host share.
#pragma once

#include "ptx.cuh"

#if !defined(__CUDACC__)
#include "handoff_emulator.h"
#else

namespace ey::cuda::ptx {

__device__ __forceinline__ uint32_t exchange(uint32_t* word, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.exch.b32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(word), "r"(value)
               : "memory");
  return before;
}

// Adds, and returns what was there; orders what this thread did before and does after.
__device__ __forceinline__ uint32_t fetch_add(uint32_t* word, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(word), "r"(value)
               : "memory");
  return before;
}

// Of a word that the host writes or reads. What this thread has written, or has seen in a barrier,
// is there for a host that sees the value; what the host wrote before the value is there for us.
__device__ __forceinline__ void store_release_system(uint32_t* word, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// What the host has written during this launch.
__device__ __forceinline__ float load_host_float(const float* address) {
  float value;
  asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_uint4(void* address, uint4 value) {
  *reinterpret_cast<uint4*>(address) = value;
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

__device__ __forceinline__ void sleep(uint32_t ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }

}  // namespace ey::cuda::ptx
#endif
