// SPDX-License-Identifier: Apache-2.0
// CUDA C++ for g++: the words of the language, the wrapped instructions of csrc/cuda/ptx.cuh and
// the few runtime functions that csrc/cuda calls, over simt.h and a machine that a test describes.
#pragma once

#include <cfloat>
#include <cmath>
#include <limits>
#include <type_traits>

#include "simt.h"

#define __global__
#define __device__
#define __host__
// always: a planted bug must not be lost to the same function of another file
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (emu::current->index)
#define blockIdx (emu::current->block->index)
#define blockDim (emu::grid->block_dim)
#define gridDim (emu::grid->grid_dim)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncthreads() { emu::barrier(0, int(emu::current->block->threads.size())); }

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  int nothing = 0;
  emu::meet(mask, nothing, "__syncwarp", [](int**) {});
}

template <class T>
T shuffle(uint32_t mask, T value, int from, const char* name) {
  struct Shuffle {
    T given, taken;
    int from;
  } mine{value, value, from};
  emu::meet(mask, mine, name, [mask](Shuffle** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) {
        if (!(mask >> lanes[lane]->from & 1))
          emu::grid->fail("shuffle from a lane not in the mask");
        lanes[lane]->taken = lanes[lanes[lane]->from]->given;
      }
    }
  });
  return mine.taken;
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int xor_lane) {
  return shuffle(mask, value, emu::current->lane ^ xor_lane, "__shfl_xor_sync");
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance) {
  const int from = emu::current->lane - distance;
  return shuffle(mask, value, from < 0 ? emu::current->lane : from, "__shfl_up_sync");
}

inline uint32_t __ballot_sync(uint32_t mask, bool mine) {
  struct Vote {
    bool mine;
    uint32_t all;
  } vote{mine, 0};
  emu::meet(mask, vote, "__ballot_sync", [mask](Vote** lanes) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) all |= uint32_t(lanes[lane]->mine) << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (mask >> lane & 1) lanes[lane]->all = all;
    }
  });
  return vote.all;
}

inline uint32_t __match_any_sync(uint32_t mask, int mine) {
  struct Match {
    int mine;
    uint32_t same;
  } match{mine, 0};
  emu::meet(mask, match, "__match_any_sync", [mask](Match** lanes) {
    for (int a = 0; a < 32; ++a) {
      for (int b = 0; b < 32; ++b) {
        if ((mask >> a & 1) && (mask >> b & 1) && lanes[a]->mine == lanes[b]->mine) {
          lanes[a]->same |= 1u << b;
        }
      }
    }
  });
  return match.same;
}

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(uint32_t bits) { return bits ? std::countr_zero(bits) + 1 : 0; }

// Fibers do not run at the same time, so a plain addition is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

namespace ey::cuda::ptx {

template <class T>
inline const T* aligned(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) {
    emu::grid->fail(std::string(what) + ": the address is not a multiple of " +
                    std::to_string(sizeof(T)));
  }
  return static_cast<const T*>(address);
}

inline char* dynamic_shared() { return emu::current->block->shared->data(); }

// Loads are where a warp stalls and others overtake it.
inline void preemption_point() {
  if (emu::grid->chance(8)) emu::grid->yield();
}

inline uint4 load16_once(const void* address) {
  preemption_point();
  return *aligned<uint4>(address, "load16_once");
}
inline float4 load_float4(const float* address) { return *aligned<float4>(address, "load_float4"); }

inline void store_float4(float* address, float4 value) {
  *const_cast<float4*>(aligned<float4>(address, "store_float4")) = value;
}
inline void store16_global(float* address, float4 value) { store_float4(address, value); }

inline uint4 load_uint4(const void* address) { return *aligned<uint4>(address, "load_uint4"); }

inline uint2 load_uint2(const void* address) { return *aligned<uint2>(address, "load_uint2"); }
inline uint32_t load_uint(const void* address) { return *aligned<uint32_t>(address, "load_uint"); }

// Notes 16 bytes of shared memory that wgmma may read only after this thread's fence_for_async.
inline void written_by_threads(const char* to) {
  emu::Block& block = *emu::current->block;
  if (block.unfenced.empty()) return;
  const auto piece = uint32_t(to - block.shared->data()) / 16;
  block.unfenced[piece] = emu::current->linear;
  emu::current->written.push_back(piece);
}

// The destination is poisoned now and written at the wait, so reading it too early shows.
inline void copy_async(void* shared, const void* from, bool valid, unsigned bytes) {
  preemption_point();
  char* const to = static_cast<char*>(shared);
  const emu::SharedMemory& memory = *emu::current->block->shared;
  if (to < memory.data() || to + bytes > memory.data() + memory.bytes()) {
    emu::grid->fail("copy_async: the destination is not in shared memory");
  }
  for (const void* p : {static_cast<const void*>(shared), valid ? from : shared}) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) {
      emu::grid->fail("copy_async: an address is not a multiple of its bytes");
    }
  }
  std::memset(to, 0xff, bytes);
  emu::current->uncommitted.push_back(
      {to, static_cast<const char*>(from), bytes, valid ? bytes : 0u});
}
inline void copy16_async(void* shared, const void* from, bool valid) {
  copy_async(shared, from, valid, 16);
}

inline void copy_commit() {
  emu::current->groups.push_back(std::move(emu::current->uncommitted));
  emu::current->uncommitted.clear();
}

inline void copy16_async_cached(void* shared, const void* from, bool valid) {
  copy16_async(shared, from, valid);
}

inline void copy_wait_for(int open) {
  if (open < 0) emu::grid->fail("copy_wait_for: a negative number");
  auto& groups = emu::current->groups;
  while (int(groups.size()) > std::min(open, 7)) {
    for (const emu::AsyncCopy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.from_bytes);
      std::memset(copy.to + copy.from_bytes, 0, copy.bytes - copy.from_bytes);
      written_by_threads(copy.to);
    }
    groups.erase(groups.begin());
  }
}

template <int kOpen>
void copy_wait() {
  copy_wait_for(kOpen);
}

inline float bf16_to_float(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

inline void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
    float* d;
  } mine{{a0, a1, a2, a3}, {b0, b1}, d};
  emu::meet(0xffffffffu, mine, "mma_bf16", [](Fragments** lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
          a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] =
              bf16_to_float(lanes[lane]->a[i] >> 16 * half & 0xffff);
        }
        for (int i = 0; i < 2; ++i) {
          b[2 * t + i * 8 + half][g] = bf16_to_float(lanes[lane]->b[i] >> 16 * half & 0xffff);
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2] += sum;
      }
    }
  });
}

inline float f16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const float mantissa = float(bits & 1023);
  float f;
  if (exponent == 31) {
    f = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    f = std::ldexp(mantissa, -24);
  } else {
    f = std::ldexp(1024.0f + mantissa, exponent - 25);
  }
  return bits >> 15 ? -f : f;
}

inline uint16_t float_to_f16(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  if (std::isnan(f)) return 0x7fff;
  const float a = std::fabs(f);
  if (a == 0.0f) return sign;
  if (a >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(a, &exponent);  // a = m * 2^exponent, m in [0.5, 1)
  const int last_bit = std::max(exponent - 11, -24);
  const float steps = std::nearbyint(std::ldexp(a, -last_bit));  // ties to even
  // A carry into the next exponent comes out right by itself.
  const int biased = last_bit == -24 ? 0 : last_bit + 24;
  return uint16_t(sign | (biased * 1024 + int(steps)));
}

inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if (std::isnan(f)) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int half = 0; half < 32; half += 16) {
    // A product of two bf16 is exact in fp32, and in fp64 so is its sum with a third here.
    const double sum =
        double(bf16_to_float(a >> half & 0xffff)) * bf16_to_float(b >> half & 0xffff) +
        bf16_to_float(c >> half & 0xffff);
    d |= uint32_t(float_to_bf16(float(sum))) << half;
  }
  return d;
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

inline void add_release(uint32_t* counter, uint32_t n) {
  preemption_point();
  *counter += n;
  emu::grid->changed();
  preemption_point();
}
inline uint32_t load_acquire(const uint32_t* counter) {
  emu::grid->polled();
  emu::grid->yield();
  return *counter;
}
inline float load_shared_float(const float* address) { return *address; }

inline void store_for_host(uint64_t* address, uint64_t value) { *address = value; }

}  // namespace ey::cuda::ptx

#include "cuda_runtime_emulator.h"
