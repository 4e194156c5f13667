// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/wgmma.cuh for a CPU: barriers that count bytes, bulk copies, wgmma.
//
// Everything asynchronous happens as late as it may: a bulk copy while somebody asks a barrier, at
// random; a product at the wait for it. So a stage that is read before it is whole, or given back
// while wgmma still reads it, shows as wrong numbers. Reported by name: barriers that were not set,
// more arrivals than expected, bulk copies and products under way at exit, wgmma without a fence
// before it, wgmma that reads what copies or stores have written without fence_for_async, warps of
// a warpgroup that issue different products.
#pragma once

#include "cuda_emulator.h"

template <class T>
T __shfl_sync(uint32_t mask, T value, int from) {
  return shuffle(mask, value, from, "__shfl_sync");
}

namespace ey::cuda::ptx {

inline uint32_t shared_address(const void* shared) {
  const emu::SharedMemory& memory = *emu::current->block->shared;
  const auto* const p = static_cast<const char*>(shared);
  if (p < memory.data() || p >= memory.data() + memory.bytes()) {
    emu::grid->fail("shared_address: not in shared memory");
  }
  return uint32_t(p - memory.data());
}

// As it lies in its 8 bytes. Memory that was never set is all ones.
struct Barrier {
  int16_t arrivals, missing;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Barrier) == 8);

inline Barrier& barrier_at(uint64_t* address) {
  shared_address(aligned<uint64_t>(address, "barrier"));
  auto& barrier = *reinterpret_cast<Barrier*>(address);
  if (barrier.arrivals <= 0) emu::grid->fail("a barrier is used that was not set");
  return barrier;
}
inline void end_phase_if_whole(Barrier& barrier) {
  emu::grid->changed();
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.missing = barrier.arrivals;
}

// Slowly, so that threads which do not wait for it come first.
inline void barrier_init(uint64_t* address, int arrivals) {
  for (size_t i = emu::grid->below(64); i > 0; --i) emu::grid->yield();
  shared_address(address);
  const Barrier barrier{int16_t(arrivals), int16_t(arrivals), 0, 0};
  std::memcpy(address, &barrier, sizeof barrier);
  emu::Block& block = *emu::current->block;
  if (block.unfenced.empty()) block.unfenced.assign(block.shared->bytes() / 16 + 1, -1);
}
inline void barriers_are_set() {}

inline void barrier_arrive(uint64_t* address) {
  preemption_point();
  Barrier& barrier = barrier_at(address);
  if (--barrier.missing < 0) emu::grid->fail("a barrier has more arrivals than it expects");
  end_phase_if_whole(barrier);
  preemption_point();
}
inline void barrier_arrive_expecting(uint64_t* address, int bytes) {
  barrier_at(address).bytes += bytes;
  barrier_arrive(address);
}

inline void copy_bulk(void* shared, const void* from, int bytes, uint64_t* barrier) {
  aligned<uint4>(shared, "copy_bulk, to");
  aligned<uint4>(from, "copy_bulk, from");
  if (bytes <= 0 || bytes % 16) emu::grid->fail("copy_bulk: not a multiple of 16 bytes");
  const uint32_t at = shared_address(shared);
  shared_address(static_cast<char*>(shared) + bytes - 1);
  barrier_at(barrier);
  std::memset(shared, 0xff, size_t(bytes));
  emu::Block& block = *emu::current->block;
  std::fill_n(block.unfenced.begin() + at / 16, bytes / 16, -1);
  block.bulk_copies.push_back([=] {
    std::memcpy(shared, from, size_t(bytes));
    auto& done = *reinterpret_cast<Barrier*>(barrier);
    done.bytes -= bytes;
    end_phase_if_whole(done);
  });
}

inline bool barrier_test(uint64_t* address, int parity) {
  auto& copies = emu::current->block->bulk_copies;
  if (!copies.empty() && emu::grid->chance(2)) {
    std::swap(copies[emu::grid->below(copies.size())], copies.back());
    const auto copy = std::move(copies.back());
    copies.pop_back();
    copy();
  }
  emu::grid->polled();
  emu::grid->yield();
  return int(barrier_at(address).phase) != parity;
}
inline void barrier_wait(uint64_t* address, int parity) {
  while (!barrier_test(address, parity)) {
  }
}

inline void fence_for_async() {
  for (uint32_t piece : emu::current->written) {
    int& writer = emu::current->block->unfenced[piece];
    if (writer == emu::current->linear) writer = -1;
  }
  emu::current->written.clear();
}

// The warps of a warpgroup do it together; the count itself changes nothing here.
template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24);
  __syncwarp();
}
template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters <= 256);
  __syncwarp();
}

inline void wgmma_fence() {
  __syncwarp();
  emu::current->wgmma_fenced = true;
}
inline void wgmma_commit() {
  emu::current->wgmma_groups.push_back(std::move(emu::current->wgmma));
  emu::current->wgmma.clear();
  emu::current->wgmma_fenced = false;
}

inline void issue_wgmma(const emu::Wgmma& product) {
  emu::Thread& t = *emu::current;
  if (!t.wgmma_fenced) emu::grid->fail("wgmma: no wgmma_fence before it");
  t.wgmma.push_back(product);
  // The n-th product of every warp of the warpgroup is the same one.
  auto& issued = t.block->wgmma_issued[size_t(t.linear) / 128];
  if (issued.size() <= t.wgmma_count) issued.push_back(product.tokens);
  if (issued[t.wgmma_count++] != product.tokens) {
    emu::grid->fail("wgmma: the warps of a warpgroup issue different products");
  }
}
inline void wgmma_bf16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t tokens, bool adds) {
  issue_wgmma({&d[0][0], {a[0], a[1], a[2], a[3]}, tokens, adds, false});
}
inline void wgmma_e4m3(float (&d)[16][4], const uint32_t (&a)[4], uint64_t tokens, bool adds) {
  issue_wgmma({&d[0][0], {a[0], a[1], a[2], a[3]}, tokens, adds, true});
}

inline float e4m3_to_float(uint32_t code) {
  const int exponent = int(code >> 3 & 15), mantissa = int(code & 7);
  const float value = (code & 127) == 127 ? NAN
                      : exponent          ? std::ldexp(float(8 + mantissa), exponent - 10)
                                          : std::ldexp(float(mantissa), -9);
  return code & 128 ? -value : value;
}
inline uint32_t float_to_e4m3(float f) {
  const uint32_t sign = std::signbit(f) ? 0x80 : 0;
  if (std::isnan(f)) return 0x7f;
  const float a = std::min(std::fabs(f), 448.0f);
  int exponent;
  std::frexp(a, &exponent);  // a = m * 2^exponent, m in [0.5, 1)
  const int last_bit = a == 0.0f ? -9 : std::max(exponent - 4, -9);
  const int steps = int(std::nearbyint(std::ldexp(a, -last_bit)));  // ties to even
  // A carry into the next exponent comes out right by itself.
  return sign | uint32_t(steps + (last_bit == -9 ? 0 : (last_bit + 9) * 8));
}
inline uint32_t floats_to_e4m3(float a, float b, float c, float d) {
  return float_to_e4m3(a) | float_to_e4m3(b) << 8 | float_to_e4m3(c) << 16 | float_to_e4m3(d) << 24;
}

inline void copy4_async(void* shared, const void* from) { copy_async(shared, from, true, 4); }

inline void sync_some(int number, int threads) {
  if (threads % 32) emu::grid->fail("sync_some: not whole warps");
  emu::barrier(number, threads);
}

// Row r, the 16 bytes of number i of the matrix that a descriptor names: its rows are 128 bytes
// apart, 8 rows are a pattern in which bits 4 to 6 of an address are those of the row added to its
// own, and patterns follow each other at the stride.
inline const char* token_piece(uint64_t descriptor, int row, int i) {
  const uint32_t begin = uint32_t(descriptor & 0x3fff) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
    emu::grid->fail("wgmma: the descriptor is not one of the 128-byte swizzle");
  }
  uint32_t at = begin + uint32_t(row) / 8 * stride + uint32_t(row) % 8 * 128 + uint32_t(i) * 16;
  at ^= (at >> 7 & 7) << 4;
  emu::Block& block = *emu::current->block;
  if (at + 16 > block.shared->bytes()) emu::grid->fail("wgmma: tokens past shared memory");
  if (!block.unfenced.empty() && block.unfenced[at / 16] >= 0) {
    emu::grid->fail("wgmma: reads what was written without fence_for_async after it");
  }
  return block.shared->data() + at;
}

// How Hopper adds products of e4m3, as far as it is known: all of a row and column, and the sum so
// far, are shifted to the largest exponent among them, and what is then beyond 13 bits behind the
// point is cut off.
inline float add_e4m3(const float (&a)[32], const float (&b)[32], float sum) {
  float terms[33], most = std::fabs(sum);
  terms[32] = sum;
  for (int k = 0; k < 32; ++k) {
    terms[k] = a[k] * b[k];
    if (!std::isfinite(terms[k])) return NAN;
    most = std::max(most, std::fabs(terms[k]));
  }
  if (!std::isfinite(sum) || most == 0.0f) return sum;
  int exponent;
  std::frexp(most, &exponent);
  const float unit = std::ldexp(1.0f, exponent - 1 - 13);
  float steps = 0.0f;
  for (const float term : terms) steps += float(int(term / unit));
  return steps * unit;
}

// sums[column] of a row of a product of bf16, k ascending. Most of an emulated test's time.
__attribute__((optimize("O3"))) inline void add_bf16(const float (&a)[32],
                                                     const float (&b)[32][128],
                                                     float (&sums)[128]) {
  std::fill_n(sums, 128, 0.0f);
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < 128; ++column) sums[column] += a[k] * b[k][column];
  }
}

// One product of a warp: lanes[lane] are its 32 parts.
inline void multiply(const emu::Wgmma* const (&lanes)[32]) {
  const bool e4m3 = lanes[0]->e4m3;
  const int ks = e4m3 ? 32 : 16, in_register = ks / 8;
  static float a[16][32], b[32][128], columns[128][32];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < in_register; ++j) {
        const uint32_t bits = lanes[lane]->a[i] >> (32 / in_register * j);
        a[lane / 4 + i % 2 * 8][lane % 4 * in_register + i / 2 * (ks / 2) + j] =
            e4m3 ? e4m3_to_float(bits & 0xff) : bf16_to_float(bits & 0xffff);
      }
    }
  }
  const int in_piece = e4m3 ? 16 : 8;
  for (int column = 0; column < 128; ++column) {
    for (int k = 0; k < ks; k += in_piece) {
      const char* const piece = token_piece(lanes[0]->tokens, column, k / in_piece);
      for (int i = 0; i < in_piece; ++i) {
        if (e4m3) {
          columns[column][k + i] = e4m3_to_float(uint8_t(piece[i]));
        } else {
          b[k + i][column] = bf16_to_float(reinterpret_cast<const uint16_t*>(piece)[i]);
        }
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[128];
    if (!e4m3) add_bf16(a[row], b, sums);
    for (int column = 0; column < 128; ++column) {
      const emu::Wgmma& product = *lanes[row % 8 * 4 + column % 8 / 2];
      float& d = product.d[column / 8 * 4 + row / 8 * 2 + column % 2];
      const float before = product.adds ? d : 0.0f;
      d = e4m3 ? add_e4m3(a[row], columns[column], before) : before + sums[column];
    }
  }
}

template <int kOpen>
void wgmma_wait() {
  preemption_point();
  emu::Thread* mine = emu::current;
  emu::meet(0xffffffffu, *mine, "wgmma_wait", [](emu::Thread** lanes) {
    while (int(lanes[0]->wgmma_groups.size()) > kOpen) {
      for (size_t i = 0; i < lanes[0]->wgmma_groups.front().size(); ++i) {
        const emu::Wgmma* parts[32];
        for (int lane = 0; lane < 32; ++lane) parts[lane] = &lanes[lane]->wgmma_groups.front()[i];
        multiply(parts);
      }
      for (int lane = 0; lane < 32; ++lane) {
        lanes[lane]->wgmma_groups.erase(lanes[lane]->wgmma_groups.begin());
      }
    }
  });
}

}  // namespace ey::cuda::ptx
