// SPDX-License-Identifier: Apache-2.0
// The experts layer on tensor cores, for bf16 weights where they lie and many tokens:
//
//   route          pairs sorted by expert, cut into tiles of up to 8, 16, 32 or 64 pairs of one
//   expert gate_up_tiles  h[p, i] = act(gate_e[i] . x[t], up_e[i] . x[t]), rounded to bf16
//   down_tiles     y[p, j] = down_e[j] . h[p] + down_bias_e[j], fp32
//   combine        out[t, j] = sum_k weights[t, k] * y[t * top_k + k, j]
//
// Weights are the A operand (16 rows), pairs the B operand (8 columns), so that a tile of few pairs
// wastes little. A sum over k does not care about the order of k: where an mma wants k = 2t, 2t + 1
// and 2t + 8, 2t + 9 from lane t, it gets 4 neighbours of the 8 that the lane has loaded as 16
// bytes of a row, for both operands alike. So rows need no packing and no ldmatrix.
#pragma once

#include "activation.cuh"
#include "choice.cuh"
#include "parts.cuh"
#include "routing.cuh"

namespace ey::cuda::tiles {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSm = 2;  // what shared memory allows on most cards; up to 255 registers
constexpr int kRouteThreads = 512;
constexpr int kCombineThreads = 256;

constexpr int kStep = 64;  // values of k that one stage of shared memory holds: 128 bytes of a row
// 64 bytes more than 128: the 16-byte loads of 8 lanes (2 pairs x 4) fall on all 32 banks once.
constexpr int kXRowBytes = kStep * 2 + 64;
constexpr int kWeightBytes = kWarps * 32 * kStep * 2;  // of a stage: 32 rows a warp

// Tile is 8 * kBlocks pairs wide.
template <int kBlocks>
struct Shape {
  static constexpr int kPairs = 8 * kBlocks;
  static constexpr int kStages = kBlocks == 8 ? 3 : 4;  // what 99 KiB, the smallest cards', holds
  static constexpr int kStageBytes = kWeightBytes + kPairs * kXRowBytes;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kPairs * int(sizeof(char*) + sizeof(int));
};

__global__ void __launch_bounds__(kRouteThreads)
    route(const Chunk c, int32_t pairs, int32_t pairs_per_tile, const Routing r) {
  route_pairs<kRouteThreads>(c, pairs, pairs_per_tile, r);
}

// What the threads of a block share about their tile's pairs.
template <int kBlocks>
struct SharedPairs {
  const char** rows;  // [kPairs] where each pair's B operand begins; null past the tile's end
  int* pairs;         // [kPairs] -1 past the end
  __device__ __forceinline__ SharedPairs() {
    char* const end = ptx::dynamic_shared() + Shape<kBlocks>::kStages * Shape<kBlocks>::kStageBytes;
    rows = reinterpret_cast<const char**>(end);
    pairs = reinterpret_cast<int*>(rows + Shape<kBlocks>::kPairs);
  }
};

// sums[w][b] += 16 rows x 8 pairs, for this warp's two times 16 rows and all blocks of 8 pairs.
//   weights  this lane's rows g and g + 8 of the first 16, then of the second; null: zeros
//   n        values of k, a multiple of 8
// All threads of the block call it, after a barrier behind the writing of pairs.
template <int kBlocks>
__device__ __forceinline__ void multiply(const char* const (&weights)[4],
                                         const SharedPairs<kBlocks>& pairs, const void* any_global,
                                         int n, float (&sums)[2][kBlocks][4]) {
  using S = Shape<kBlocks>;
  char* const shared = ptx::dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, t = lane % 4,
            g = lane / 4;
  // A lane reads back what it has copied itself, so its place needs no order but its own.
  const int my_weights = warp * (32 * kStep * 2) + lane * 16;
  const int steps = (n + kStep - 1) / kStep;

  const auto load = [&](int step) {
    if (step < steps) {
      char* const stage = shared + step % S::kStages * S::kStageBytes;
      for (int half = 0; half < 2; ++half) {
        const int k = step * kStep + half * 32 + t * 8;
        for (int row = 0; row < 4; ++row) {
          const bool valid = weights[row] != nullptr && k < n;
          ptx::copy16_async(stage + my_weights + (half * 4 + row) * 512,
                            valid ? weights[row] + k * 2 : any_global, valid);
        }
      }
      for (int i = thread; i < S::kPairs * 8; i += kThreads) {
        const int k = step * kStep + i % 8 * 8;
        const char* const row = pairs.rows[i / 8];
        const bool valid = row != nullptr && k < n;
        ptx::copy16_async(stage + kWeightBytes + i / 8 * kXRowBytes + i % 8 * 16,
                          valid ? row + k * 2 : any_global, valid);
      }
    }
    ptx::copy_commit();  // also when empty: groups are counted
  };

  for (int step = 0; step < S::kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    ptx::copy_wait<S::kStages - 2>();
    __syncthreads();  // this stage is whole, and nobody reads the one before any more
    load(step + S::kStages - 1);
    const char* const stage = shared + step % S::kStages * S::kStageBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 a[4];
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        a[row] = ptx::load_uint4(stage + my_weights + (half * 4 + row) * 512);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const uint4 b = ptx::load_uint4(stage + kWeightBytes + (block * 8 + g) * kXRowBytes +
                                        half * 64 + t * 16);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const uint4 &low = a[2 * w], &high = a[2 * w + 1];
          ptx::mma_bf16(sums[w][block], low.x, high.x, low.y, high.y, b.x, b.y);
          ptx::mma_bf16(sums[w][block], low.z, high.z, low.w, high.w, b.z, b.w);
        }
      }
    }
  }
  ptx::copy_wait<0>();
}

template <int kBlocks>
__device__ __forceinline__ void fill_pairs(const SharedPairs<kBlocks>& shared, const Tile& tile,
                                           const int32_t* sorted, const void* base,
                                           int64_t row_bytes, int64_t pairs_per_row) {
  for (int i = threadIdx.x; i < Shape<kBlocks>::kPairs; i += kThreads) {
    const int pair = i < tile.count ? sorted[tile.first + i] : -1;
    shared.pairs[i] = pair;
    shared.rows[i] =
        pair < 0 ? nullptr : static_cast<const char*>(base) + pair / pairs_per_row * row_bytes;
  }
}

__device__ __forceinline__ const char* row_or_null(const void* matrix, int64_t stride, int64_t row,
                                                   int64_t rows) {
  return row < rows ? static_cast<const char*>(matrix) + row * stride : nullptr;
}

// Grid: (tiles, at most; ceil(intermediate_size / (16 * kWarps))). Tiles vary fastest: the blocks
// that run together read the same few rows of each expert, from DRAM once. h is [pairs,
// intermediate_size] bf16.
template <int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    gate_up_tiles(const Chunk c, const Routing r, uint16_t* h) {
  if (int(blockIdx.x) >= *r.num_tiles) return;
  const Tile tile = r.tiles[blockIdx.x];
  const ExpertPointers expert = c.set.experts[tile.expert];
  const int lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
  const int64_t inner = c.set.intermediate_size, stride = c.set.gate_up_row_stride;
  const int64_t first_row = (int64_t(blockIdx.y) * kWarps + threadIdx.x / 32) * 16;

  const SharedPairs<kBlocks> shared;
  fill_pairs(shared, tile, r.sorted, c.hidden_states, c.set.hidden_size * 2, c.top_k);
  __syncthreads();  // the pairs are known
  const char* const weights[4] = {
      row_or_null(expert.gate, stride, first_row + g, inner),
      row_or_null(expert.gate, stride, first_row + g + 8, inner),
      row_or_null(expert.up, stride, first_row + g, inner),
      row_or_null(expert.up, stride, first_row + g + 8, inner),
  };
  float sums[2][kBlocks][4] = {};
  multiply<kBlocks>(weights, shared, c.hidden_states, int(c.set.hidden_size), sums);

  by_parts(sums, [&](int block, const float (&gates)[4], const float (&ups)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pair = shared.pairs[block * 8 + 2 * t + i % 2];
      const int64_t row = first_row + g + i / 2 * 8;
      if (pair < 0 || row >= inner) continue;
      float gate = gates[i], up = ups[i];
      if (expert.gate_bias) gate += expert.gate_bias[row];
      if (expert.up_bias) up += expert.up_bias[row];
      h[pair * inner + row] =
          ptx::float_to_bf16(activate_any(c.set.activation, gate, up, c.set.alpha, c.set.limit));
    }
  });
}

// Grid: (tiles, at most; ceil(hidden_size / (32 * kWarps))). y is [pairs, hidden_size] fp32.
template <int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    down_tiles(const Chunk c, const Routing r, const uint16_t* h, float* y) {
  if (int(blockIdx.x) >= *r.num_tiles) return;
  const Tile tile = r.tiles[blockIdx.x];
  const ExpertPointers expert = c.set.experts[tile.expert];
  const int lane = threadIdx.x % 32, t = lane % 4, g = lane / 4;
  const int64_t hidden = c.set.hidden_size;
  const int64_t first_row = (int64_t(blockIdx.y) * kWarps + threadIdx.x / 32) * 32;

  const SharedPairs<kBlocks> shared;
  fill_pairs(shared, tile, r.sorted, h, c.set.intermediate_size * 2, 1);
  __syncthreads();  // the pairs are known
  const char* weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[i] = row_or_null(expert.down, c.set.down_row_stride, first_row + g + i * 8, hidden);
  }
  float sums[2][kBlocks][4] = {};
  multiply<kBlocks>(weights, shared, h, int(c.set.intermediate_size), sums);

#pragma unroll
  for (int w = 0; w < 2; ++w) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pair = shared.pairs[block * 8 + 2 * t + i % 2];
        const int64_t row = first_row + w * 16 + g + i / 2 * 8;
        if (pair < 0 || row >= hidden) continue;
        const float bias = expert.down_bias ? expert.down_bias[row] : 0.0f;
        y[pair * hidden + row] = sums[w][block][i] + bias;
      }
    }
  }
}

// Grid: (tokens, ceil(hidden_size / kCombineThreads)).
__global__ void __launch_bounds__(kCombineThreads) combine(const Chunk c, const float* y) {
  const int64_t token = blockIdx.x;
  const int64_t column = int64_t(blockIdx.y) * kCombineThreads + threadIdx.x;
  if (column >= c.set.hidden_size) return;
  float sum = 0.0f;
  for (int64_t k = 0; k < c.top_k; ++k) {
    const int64_t pair = token * c.top_k + k;
    int64_t id;
    ExpertPointers expert;
    const Chosen chosen = choose(c, pair, &id, &expert);
    if (chosen == Chosen::kExpert) {
      sum +=
          load_number(c.topk_weights, c.weights_dtype, pair) * y[pair * c.set.hidden_size + column];
    } else if (chosen == Chosen::kBadId) {
      sum += refuse(c, token, id, column == 0);
    }
  }
  store_number(c.out, c.out_dtype, token * c.set.hidden_size + column, sum);
}

}  // namespace ey::cuda::tiles
