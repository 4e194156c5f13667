// SPDX-License-Identifier: Apache-2.0
// Mode::kFast for fp8 weights on Hopper: e4m3 by e4m3, twice as many products a clock as of bf16.
//
//   prepare_e4m3     x, and the epilogue h, in groups of 128 values along k: codes = e4m3(v /
//   scale),
//                    scale = max |v| / 448, fp32; a group's scale goes beside its codes
//   experts_wgmma_fast  sums += (scale of weights * scale of tokens) * products, every 128 k
//
// Hopper adds products of e4m3 with fewer bits than fp32 (13 behind the point of the largest), so a
// sum is taken out of the tensor cores, and added in fp32, after each group of activations; a group
// of weights is no shorter. The order of work is hopper.cuh's. An item's 8 blocks of w13 make 128
// values of h, one group: its warps tell each other their largest through shared memory.
#pragma once

#include "formats/fp8_fast.cuh"
#include "hopper_producer.cuh"

namespace ey::cuda::hopper {

constexpr int kGroup = 128;  // activations that share a scale
constexpr float kLargestE4m3 = 448.0f;
constexpr float kNothing = 1e-30f;  // a group that is nowhere larger counts as zeros
constexpr int kConsumers = 32 * kBlocks;

template <>
struct Tokens<Fp8FastBlocks> {
  static constexpr int kBytes = 1, kFloats = 1;
};
static_assert(Fp8FastBlocks::kChunkK == kGroup && kBlocks * kLaneSet == kGroup);

// 1 / scale of a group, and its scale.
__device__ __forceinline__ float inverse_of(float most) {
  return most < kNothing ? 0.0f : kLargestE4m3 / most;
}
__device__ __forceinline__ float scale_of(float most) {
  return most < kNothing ? 0.0f : most / kLargestE4m3;
}
__device__ __forceinline__ float larger(float a, float b) { return a < b ? b : a; }
__device__ __forceinline__ float size_of_value(float v) { return v < 0.0f ? -v : v; }

// A NaN is not seen in the largest of a group, but is a NaN among its codes.
constexpr int kPrepareThreads = 1024;
template <class F>  // so that it is compiled where it is launched
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_e4m3(const Chunk c, int32_t pairs, int32_t pairs_per_tile, const Routing r, uint8_t* x,
                 float* scales, int tokens, int x_stride) {
  if (blockIdx.x == 0) {
    route_pairs<kPrepareThreads>(c, pairs, pairs_per_tile, r);
    return;
  }
  const int64_t hidden = c.set.hidden_size;
  const int groups = x_stride / kGroup, lane = threadIdx.x % 32;
  for (int64_t row = blockIdx.x - 1; row < tokens; row += gridDim.x - 1) {
    for (int group = threadIdx.x / 32; group < groups; group += kPrepareThreads / 32) {
      const int k = group * kGroup + 4 * lane;
      float v[4], most = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] =
            k + i < hidden ? load_number(c.hidden_states, c.hidden_dtype, row * hidden + k + i) : 0;
        most = larger(most, size_of_value(v[i]));
      }
#pragma unroll
      for (int other = 16; other > 0; other /= 2) {
        most = larger(most, __shfl_xor_sync(kAllLanes, most, other));
      }
      const float by = inverse_of(most);
      *reinterpret_cast<uint32_t*>(x + row * x_stride + k) =
          ptx::floats_to_e4m3(v[0] * by, v[1] * by, v[2] * by, v[3] * by);
      if (lane == 0) scales[row * groups + group] = scale_of(most);
    }
  }
}

// Behind the barriers of the ring: the largest value of each warp's rows of h, by column, of two
// items in turn; and for each warp those of all.
constexpr int kMostBytes = 3 * kBlocks * kColumns * int(sizeof(float));

template <class F>
class FastConsumer {
 public:
  __device__ __forceinline__ explicit FastConsumer(const Args& args) : a(args), read_(args) {}

  __device__ __forceinline__ void run() {
    for (Items items(a); items.is_here(); items.next()) {
      Sums sums;
      clear(sums);
      for (int chunk = 0; chunk < a.matrix.num_chunks; ++chunk) {
        ptx::barrier_wait(read_.ring.full(read_.ring.stage), read_.ring.parity);
        multiply(sums);
        read_.give_back();
      }
      const Tile tile = a.routing.tiles[items.tile()];
      const int block = items.first_block() + read_.warp;
      const int* const pairs = a.routing.sorted + tile.first;
      if (a.down) {
        if (block < a.matrix.num_blocks) {
          grouped::finish_y<kSumBlocks>(a, tile, block, pairs, sums, read_.lane);
        }
        continue;
      }
      if (block >= a.matrix.num_blocks) clear(sums);  // h is zero where there are no weights
      finish_e4m3(tile, items.first_block(), pairs, sums, items.turn());
    }
  }

 private:
  // A chunk, of it one half of the rows and then the other.
  __device__ __forceinline__ void multiply(Sums& sums) const {
    constexpr int kQuads = ChunkShape<F>::kQuads, kSlices = Stage<F>::kSlices;
    const char* const head = read_.weights();
    const char* const quads = head + a.matrix.head_bytes;
    const int t = read_.lane % 4;
    uint32_t dwords[kQuads][4];
    const auto load_slice = [&](int s) {
      read_.load_quad(quads + 2 * s * 512, dwords[2 * s]);
      read_.load_quad(quads + (2 * s + 1) * 512, dwords[2 * s + 1]);
    };
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float products[kSumBlocks][4];
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        // The first half loads for both. Before its last slice the first ones' registers are free.
        if (j == 0 && s == kSlices - 1) ptx::wgmma_wait<1>();
        if (j == 0) load_slice(s);
        const uint32_t fragments[4] = {dwords[2 * s][2 * j], dwords[2 * s][2 * j + 1],
                                       dwords[2 * s + 1][2 * j], dwords[2 * s + 1][2 * j + 1]};
        if (j == 0 || s == 0) ptx::wgmma_fence();
        ptx::wgmma_e4m3(products, fragments, read_.tokens(s), s > 0);
        if (j == 0 && s > 0) ptx::wgmma_commit();
      }
      if (j == 1) ptx::wgmma_commit();
      float of_rows[2];
      load_scale_pair(head, read_.lane / 4 * 4 + 2 * j, a.matrix.scale_type, of_rows);
      const char* const of_columns = read_.floats() + 2 * t * 4;
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int n = 0; n < kSumBlocks; ++n) {
        const uint2 two = ptx::load_uint2(of_columns + n * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float scale = of_rows[i / 2] * float_of_bits(i % 2 ? two.y : two.x);
          sums[j][n][i] += scale * products[n][i];
        }
      }
    }
  }

  // The group of h that begins with the first block's rows.
  __device__ __forceinline__ void finish_e4m3(const Tile& tile, int first_block, const int* pairs,
                                              Sums& sums, int turn) const {
    const int warp = read_.warp, lane = read_.lane, g = lane / 4, t = lane % 4;
    const int block = first_block + warp;
    grouped::finish_h(a, tile, block, sums, lane, [](int, const float (&)[4]) {});
    const auto& h = sums[0];
    float* const of_warps = most() + turn * kBlocks * kColumns;
#pragma unroll
    for (int n = 0; n < kSumBlocks; ++n) {
      float largest[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        largest[i] = larger(size_of_value(h[n][i]), size_of_value(h[n][2 + i]));
#pragma unroll
        for (int other = 4; other < 32; other *= 2) {
          largest[i] = larger(largest[i], __shfl_xor_sync(kAllLanes, largest[i], other));
        }
      }
      if (g == n / 2) {
        float* const to = of_warps + warp * kColumns + 8 * n + 2 * t;
        to[0] = largest[0];
        to[1] = largest[1];
      }
    }
    ptx::sync_some(1, kConsumers);  // all warps have told their largest
    float4 all{};
#pragma unroll
    for (int w = 0; w < kBlocks; ++w) {
      const float4 one = ptx::load_float4(of_warps + w * kColumns + 4 * lane);
      all = {larger(all.x, one.x), larger(all.y, one.y), larger(all.z, one.z),
             larger(all.w, one.w)};
    }
    float* const of_all = most() + (2 * kBlocks + warp) * kColumns;
    __syncwarp();  // what the item before has left there is read
    ptx::store_float4(of_all + 4 * lane, all);
    __syncwarp();  // the largest of all warps are there

    auto* const codes = reinterpret_cast<uint8_t*>(a.h) + grouped::first_row(block, lane);
#pragma unroll
    for (int n = 0; n < kSumBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + 2 * t + i;
        if (column >= tile.count) continue;
        const float largest = of_all[column], by = inverse_of(largest);
        const int64_t pair = pairs[column];
        *reinterpret_cast<uint16_t*>(codes + pair * a.h_stride) =
            uint16_t(ptx::floats_to_e4m3(h[n][i] * by, h[n][2 + i] * by, 0, 0));
        if (warp == 0 && g == 0) {
          a.h_beside[pair * a.h_beside_stride + first_block / kBlocks] = scale_of(largest);
        }
      }
    }
  }

  __device__ __forceinline__ float* most() const {
    return reinterpret_cast<float*>(read_.ring.full(2 * a.stages));
  }

  const Args& a;
  Reader<F> read_;
};

template <class F>
__global__ void __launch_bounds__(kThreads, 1) experts_wgmma_fast(const __grid_constant__ Args a) {
  if (threadIdx.x == 0) set_barriers(a);
  __syncthreads();  // the barriers are there
  if (threadIdx.x < kProducers) {
    ptx::give_registers<kProducerRegisters>();
    Producer<F>(a).run();
  } else {
    ptx::take_registers<kConsumerRegisters>();
    FastConsumer<F>(a).run();
  }
}

}  // namespace ey::cuda::hopper
