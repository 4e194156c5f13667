// SPDX-License-Identifier: Apache-2.0
// The words of csrc/cuda/handoff_ptx.cuh for g++, and the runtime functions of handoff.cu. The host
// side is a real thread: a kernel that waits for it sleeps in real time, and is not taken for one
// that hangs.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "streams_emulator.h"

namespace ey::cuda::ptx {

inline uint32_t exchange(uint32_t* word, uint32_t value) {
  preemption_point();
  const uint32_t before = *word;
  *word = value;
  preemption_point();
  return before;
}

inline uint32_t fetch_add(uint32_t* word, uint32_t value) {
  preemption_point();
  const uint32_t before = *word;
  *word += value;
  preemption_point();
  return before;
}

inline void store_release_system(uint32_t* word, uint32_t value) {
  preemption_point();
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
  // the host reads what is there now, before any other thread goes on
  std::this_thread::sleep_for(std::chrono::microseconds(500));
}
inline uint32_t load_acquire_system(const uint32_t* word) {
  emu::grid->yield();
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
inline float load_host_float(const float* address) {
  preemption_point();
  return *address;
}
inline void store_uint4(void* address, uint4 value) {
  preemption_point();
  *const_cast<uint4*>(aligned<uint4>(address, "store_uint4")) = value;
}

inline uint64_t nanoseconds() {
  return uint64_t(std::chrono::steady_clock::now().time_since_epoch().count());
}
inline void sleep(uint32_t ns) {
  std::this_thread::sleep_for(std::chrono::nanoseconds(ns));
  emu::grid->changed();  // the host may have done something meanwhile
  emu::grid->yield();
}

}  // namespace ey::cuda::ptx
