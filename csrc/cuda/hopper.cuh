// SPDX-License-Identifier: Apache-2.0
// The products of grouped.cuh on Hopper (sm_90a): wgmma instead of mma, for calls of many tokens.
//
// A block of threads stays on its multiprocessor and takes items, a tile of up to 128 pairs of one
// expert x 8 blocks of its weights, one after the other. Its first warpgroup copies, ahead over the
// items to come: weights by bulk copies as they lie, tokens by pair into wgmma's swizzle. The other
// two multiply: each warp has one block of weights, which it turns into bf16 in registers, wgmma's
// A operand; tokens are B.
//
// Where mma has 32 rows of a block as two times 16, wgmma has them as two times a part of its 64.
// Its sums of a group (64 a lane) are those of one half of the rows, then of the other.
#pragma once

#include "hopper_producer.cuh"

namespace ey::cuda::hopper {

// Scales are applied every kSlicesInGroup slices of 16 k: a group's, or fewer.
template <class F, int kSlicesInGroup>
class Consumer {
 public:
  __device__ __forceinline__ explicit Consumer(const Args& args) : a(args), read_(args) {}

  __device__ __forceinline__ void run() {
    for (Items items(a); items.is_here(); items.next()) {
      Sums sums;
      clear(sums);
      for (int chunk = 0; chunk < a.matrix.num_chunks; ++chunk) {
        ptx::barrier_wait(read_.ring.full(read_.ring.stage), read_.ring.parity);
        if constexpr (F::kScaled) {
          if constexpr (Tokens<F>::kFloats > 0) subtract_zeros(sums);
          multiply_scaled(sums);
        } else {
          multiply(sums);
        }
        read_.give_back();
      }
      const Tile tile = a.routing.tiles[items.tile()];
      const int block = items.first_block() + read_.warp;
      if (block >= a.matrix.num_blocks) {
        const int rows = w13_rows(has_gate(a.call.set.activation));
        if (a.down || block * rows >= a.h_stride) continue;
        clear(sums);  // the end of a row of h, where there are no weights, is zeros
      }
      grouped::finish_tile<kSumBlocks>(a, tile, block, a.routing.sorted + tile.first, sums,
                                       read_.lane);
    }
  }

 private:
  static constexpr int kQuadSlices = F::kSlices == 2 ? 2 : 1;  // 16 k that a quad has, at least

  // Weights without scales: both halves of the rows at once.
  __device__ __forceinline__ void multiply(Sums& sums) const {
    const char* const quads = read_.weights();
#pragma unroll
    for (int s = 0; s < Stage<F>::kSlices; ++s) {
      uint32_t dwords[F::kQuads][4];
#pragma unroll
      for (int i = 0; i < F::kQuads; ++i)
        read_.load_quad(quads + (s * F::kQuads + i) * 512, dwords[i]);
      uint32_t fragments[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fragments[j][i] = dwords[i / 2][2 * j + i % 2];
      }
      ptx::wgmma_fence();
      ptx::wgmma_bf16(sums[0], fragments[0], read_.tokens(s), true);
      ptx::wgmma_bf16(sums[1], fragments[1], read_.tokens(s), true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the registers of the slice before are free
    }
    ptx::wgmma_wait<0>();
  }

  // Group by group, of each one half of the rows and then the other.
  __device__ __forceinline__ void multiply_scaled(Sums& sums) const {
    constexpr int kQuadsInGroup = kSlicesInGroup / kQuadSlices;
    const Matrix& m = a.matrix;
    const char* const chunk = read_.weights();
    constexpr int kGroups = Stage<F>::kSlices / kSlicesInGroup;
    // with zeros the compiler spills unless this is so
    [[maybe_unused]] constexpr int kUnroll =
        Tokens<F>::kFloats > 0 && kSlicesInGroup == 2 ? 1 : kGroups;
#pragma unroll kUnroll
    for (int group = 0; group < kGroups; ++group) {
      const int first = group * kQuadsInGroup, line = first >> m.quad_shift;
      const char* const head = chunk + line * m.head_bytes + (line << m.quad_shift) * 512;
      const char* const quads = chunk + (line + 1) * m.head_bytes + first * 512;
      uint32_t dwords[kQuadsInGroup][4];
#pragma unroll
      for (int q = 0; q < kQuadsInGroup; ++q) read_.load_quad(quads + q * 512, dwords[q]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float products[kSumBlocks][4];
#pragma unroll
        for (int s = 0; s < kSlicesInGroup; ++s) {
          const uint32_t low[1] = {dwords[s / kQuadSlices][2 * j]};
          const uint32_t high[1] = {dwords[s / kQuadSlices][2 * j + 1]};
          const int slice = s % kQuadSlices;
          const uint32_t fragments[4] = {F::pair(low, slice, 0), F::pair(high, slice, 0),
                                         F::pair(low, slice, 1), F::pair(high, slice, 1)};
          ptx::wgmma_fence();
          ptx::wgmma_bf16(products, fragments, read_.tokens(group * kSlicesInGroup + s), s > 0);
          ptx::wgmma_commit();
          if (s > 0) ptx::wgmma_wait<1>();
        }
        float scales[2];
        load_two_scales(head, group, j, scales);
        ptx::wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < kSumBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[j][n][i] += scales[i / 2] * products[n][i];
        }
      }
    }
  }

  // sums -= scale * (zero - middle) * sum of x (scale.cuh), of all groups of a chunk. Sums of x
  // come with the tokens: 4 to a chunk, of 32 k each. Before the products: both would not fit in
  // registers.
  __device__ __forceinline__ void subtract_zeros(Sums& sums) const {
    const Matrix& m = a.matrix;
    const int g = read_.lane / 4, t = read_.lane % 4;
    const char* const of_x = read_.floats() + 2 * t * 16;
#pragma unroll 1
    for (int group = 0; group < ChunkShape<F>::kQuads; group += m.group_mask + 1) {  // in quads
      const int line = group >> m.quad_shift;
      const char* const head = read_.weights() + line * m.head_bytes + (line << m.quad_shift) * 512;
      float scales[4], zeros[4];
      const int bytes = m.scale_type == ScaleType::kFp32 ? 16 : 8;
      load_scales(head + bytes * g, m.scale_type, scales);
      load_scales(head + m.scale_bytes + bytes * g, m.scale_type, zeros);
#pragma unroll
      for (int i = 0; i < 4; ++i) zeros[i] = scales[i] * (zeros[i] - kInt4Middle);
#pragma unroll
      for (int n = 0; n < kSumBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float sum = float_of_bits(ptx::load_uint(of_x + (8 * n + i % 2) * 16 + group * 4));
          sums[0][n][i] -= zeros[i / 2] * sum;
          sums[1][n][i] -= zeros[2 + i / 2] * sum;
        }
      }
    }
  }

  // Of rows 4 g + 2 j and 4 g + 2 j + 1.
  __device__ __forceinline__ void load_two_scales(const char* head, int group, int j,
                                                  float (&scales)[2]) const {
    const int row = read_.lane / 4 * 4 + 2 * j;
    if constexpr (F::kFormat == Format::kMxfp4) {
      const char* const bytes = head + group % 2 * kLanes + row;
      scales[0] = e8m0_value(uint8_t(bytes[0]));
      scales[1] = e8m0_value(uint8_t(bytes[1]));
    } else {
      load_scale_pair(head, row, a.matrix.scale_type, scales);
    }
  }

  const Args& a;
  Reader<F> read_;
};

// Grid: as many blocks of threads as multiprocessors.
template <class F, int kSlicesInGroup>
__global__ void __launch_bounds__(kThreads, 1) experts_wgmma(const __grid_constant__ Args a) {
  if (threadIdx.x == 0) set_barriers(a);
  __syncthreads();  // the barriers are there
  if (threadIdx.x < kProducers) {
    ptx::give_registers<kProducerRegisters>();
    Producer<F>(a).run();
  } else {
    ptx::take_registers<kConsumerRegisters>();
    Consumer<F, kSlicesInGroup>(a).run();
  }
}

}  // namespace ey::cuda::hopper
