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
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (emu::current->index)
#define blockIdx (emu::current->block->index)
#define blockDim (emu::grid->block_dim)
#define gridDim (emu::grid->grid_dim)

struct uint2 {
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
T __shfl_xor_sync(uint32_t mask, T value, int xor_lane) {
  struct Shuffle {
    T given, taken;
    int from;
  } mine{value, value, emu::current->lane ^ xor_lane};
  emu::meet(mask, mine, "__shfl_xor_sync", [mask](Shuffle** lanes) {
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

inline void store_for_host(uint64_t* address, uint64_t value) { *address = value; }

}  // namespace ey::cuda::ptx

#include "cuda_runtime_emulator.h"
