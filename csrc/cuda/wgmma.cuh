// SPDX-License-Identifier: Apache-2.0
// Instructions that only Hopper has (sm_90a), wrapped once: barriers in shared memory that count
// bytes, bulk copies that report to them, and wgmma with weights in registers and tokens in shared
// memory. For g++, tests/cuda_emulator/wgmma_emulator.h has each of these names.
#pragma once

#include "ptx.cuh"

#if !defined(__CUDACC__)
#include "wgmma_emulator.h"
#else

namespace ey::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return uint32_t(__cvta_generic_to_shared(shared));
}

// A barrier's phase ends when so many threads have arrived and all expected bytes have come.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// By the thread that initialised, before the others are let on: copies see the barriers as they
// are.
__device__ __forceinline__ void barriers_are_set() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Whether the phase of that parity has ended. Before the first one ends, the one before it (parity
// 1) counts as ended.
__device__ __forceinline__ bool barrier_test(uint64_t* barrier, int parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n"
      "}"
      : "=r"(ended)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return ended;
}
// Until it has. The loop is out of the compiler's sight: wgmma behind one that lanes might leave
// apart would be serialised.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Starts a copy of a multiple of 16 bytes from global to shared memory, both 16-byte aligned. It
// reports its bytes to the barrier.
__device__ __forceinline__ void copy_bulk(void* shared, const void* from, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// What this thread has written to shared memory (by stores, or by copies that it has waited for) is
// in order before what wgmma and bulk copies do there once it has told them.
__device__ __forceinline__ void fence_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers a thread of this warpgroup, of those that the launch gave to the block.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before wgmma, after other instructions have touched its registers (sums or weights).
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a group of wgmma.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kOpen groups are under way, the newest ones: then the registers and the
// shared memory of the others are free.
template <int kOpen>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

// d[64 x 128] = a[64 x 16] * tokens[16 x 128] (+ d if adds), bf16 in, fp32 out, by the 4 warps of a
// warpgroup. Warp w has rows 16 w to 16 w + 15: a and each d[n] (columns 8 n to 8 n + 7) are the
// fragments of mma_bf16. tokens: token_matrix() of the 16 k.
#define EY_SUMS(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
__device__ __forceinline__ void wgmma_bf16(float (&d)[16][4], const uint32_t (&a)[4],
                                           uint64_t tokens, bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.ne.b32 adds, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, adds, 1, 1, 0;\n"
      "}"
      : EY_SUMS(d[0]), EY_SUMS(d[1]), EY_SUMS(d[2]), EY_SUMS(d[3]), EY_SUMS(d[4]), EY_SUMS(d[5]),
        EY_SUMS(d[6]), EY_SUMS(d[7]), EY_SUMS(d[8]), EY_SUMS(d[9]), EY_SUMS(d[10]), EY_SUMS(d[11]),
        EY_SUMS(d[12]), EY_SUMS(d[13]), EY_SUMS(d[14]), EY_SUMS(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(int(adds)));
}

// d[64 x 128] = a[64 x 32] * tokens[32 x 128] (+ d if adds), e4m3 in, sums of fewer bits than fp32
// (docs/cuda.md). Of its warp's 16 rows lane (g = lane / 4, t = lane % 4) has a[0] (row g, k 4 t to
// 4 t + 3), a[1] (row g + 8), a[2] (row g, k 16 + 4 t to 16 + 4 t + 3), a[3] (row g + 8); d as
// above.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[16][4], const uint32_t (&a)[4],
                                           uint64_t tokens, bool adds) {
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.ne.b32 adds, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, adds, 1, 1;\n"
      "}"
      : EY_SUMS(d[0]), EY_SUMS(d[1]), EY_SUMS(d[2]), EY_SUMS(d[3]), EY_SUMS(d[4]), EY_SUMS(d[5]),
        EY_SUMS(d[6]), EY_SUMS(d[7]), EY_SUMS(d[8]), EY_SUMS(d[9]), EY_SUMS(d[10]), EY_SUMS(d[11]),
        EY_SUMS(d[12]), EY_SUMS(d[13]), EY_SUMS(d[14]), EY_SUMS(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(int(adds)));
}

// Four numbers as e4m3, a in the lowest byte; beyond 448 they are 448, NaN stays NaN.
__device__ __forceinline__ uint32_t floats_to_e4m3(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | uint32_t(high) << 16;
}

// 4 bytes of copy16_async.
__device__ __forceinline__ void copy4_async(void* shared, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(from)
               : "memory");
}

#undef EY_SUMS

// A barrier of some of the block's threads, whole warps; __syncthreads() has number 0.
__device__ __forceinline__ void sync_some(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace ey::cuda::ptx
#endif

namespace ey::cuda::ptx {

constexpr int kPanelRowBytes = 128;  // 64 k of one token
constexpr int kPanelRows = 8;        // that share a pattern of the swizzle

// Where 16-byte piece i (of 8) of a token's 64 k lies in a panel, which begins at a multiple of
// 1024 bytes: the 128-byte swizzle, by which 8 rows of one column of pieces meet all banks once.
__device__ __forceinline__ int panel_offset(int row, int piece) {
  return row * kPanelRowBytes + (piece ^ row % kPanelRows) * 16;
}

// wgmma's descriptor of 16 k of a panel; they begin at a multiple of 32 bytes in its first row.
__device__ __forceinline__ uint64_t token_matrix(const void* shared) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kLeading = uint64_t(1) << 16;  // not used with a swizzle
  constexpr uint64_t kStride = uint64_t(kPanelRows * kPanelRowBytes / 16) << 32;
  return kSwizzle128 | kStride | kLeading | (shared_address(shared) >> 4 & 0x3fff);
}

}  // namespace ey::cuda::ptx
