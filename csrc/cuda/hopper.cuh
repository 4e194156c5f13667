// SPDX-License-Identifier: Apache-2.0
// The products of grouped.cuh on Hopper (sm_90a): wgmma instead of mma, for calls of many tokens.
//
// A block of threads stays on its multiprocessor and takes items, a tile of up to 128 pairs of one
// expert x 8 blocks of its weights, one after the other. Its first warpgroup copies, ahead over the
// items to come: weights by bulk copies as they lie, tokens by pair into wgmma's swizzle. The other
// two multiply: each warp has one block of weights, which it turns into bf16 in registers, wgmma's
// A operand; tokens are B. A stage of the ring in shared memory is [tokens] [8 chunks of weights].
//
// Where mma has 32 rows of a block as two times 16, wgmma has them as two times a part of its 64.
// Its sums of a group (64 a lane) are those of one half of the rows, then of the other.
//
// A step of weights is 32 dwords, one for each row: 4 lanes with the same rows and different steps
// would meet in one bank. So lane t reads rows 4 g + (i ^ t), i = 0 .. 3, and puts them in order
// itself.
#pragma once

#include "grouped_epilogue.cuh"
#include "wgmma.cuh"

namespace ey::cuda::hopper {

using grouped::Args;

constexpr int kColumns = 128;
constexpr int kSumBlocks = kColumns / 8;
constexpr int kProducers = 128;  // threads: one warpgroup
constexpr int kBlocks = 8;       // of weights, one a consuming warp
constexpr int kThreads = kProducers + 32 * kBlocks;
constexpr int kPanelK = 64;
constexpr int kPanelBytes = kColumns * ptx::kPanelRowBytes;
// 128 * 40 + 256 * 232 = 384 * 168, what the launch gives
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <class F>
struct Stage {
  static constexpr int kTokenBytes = F::kChunkK / kPanelK * kPanelBytes;
  static constexpr int kSlices = F::kChunkK / 16;  // wgmma's k
};

// The ring, and where a thread is in it. Addresses are made anew where they are wanted: registers
// are scarce, and what they are made of are constants.
struct Ring {
  const Args& a;
  int stage = 0, parity = 0;

  __device__ __forceinline__ explicit Ring(const Args& args) : a(args) {}
  __device__ __forceinline__ char* bytes() const {
    return ptx::dynamic_shared() + stage * a.stage_bytes;
  }
  __device__ __forceinline__ uint64_t* full(int i) const {
    return reinterpret_cast<uint64_t*>(ptx::dynamic_shared() + a.stages * a.stage_bytes) + i;
  }
  __device__ __forceinline__ uint64_t* empty(int i) const { return full(a.stages + i); }
  __device__ __forceinline__ void next() {
    if (++stage == a.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Items of one block of threads. Blocks of weights vary fastest: those that run together share the
// tokens of a few tiles and the weights of a few experts, both of which L2 holds.
struct Items {
  int index, count, step, row_groups;

  __device__ __forceinline__ explicit Items(const Args& a)
      : index(blockIdx.x),
        step(gridDim.x),
        row_groups((a.matrix.num_blocks + kBlocks - 1) / kBlocks) {
    count = *a.routing.num_tiles * row_groups;
  }
  __device__ __forceinline__ bool is_here() const { return index < count; }
  __device__ __forceinline__ int tile() const { return index / row_groups; }
  __device__ __forceinline__ int first_block() const { return index % row_groups * kBlocks; }
  __device__ __forceinline__ void next() { index += step; }
};

constexpr int kOpenCopies =
    1;  // groups of a thread's copies of tokens, beyond the one it waits for

template <class F>
class Producer {
 public:
  __device__ __forceinline__ explicit Producer(const Args& args)
      : a(args), ring_(args), thread(threadIdx.x) {}

  __device__ __forceinline__ void run() {
    for (Items items(a); items.is_here(); items.next()) {
      const Tile tile = a.routing.tiles[items.tile()];
      const ExpertPointers& expert = a.call.set.experts[tile.expert];
      const char* const weights = static_cast<const char*>(a.down ? expert.down : expert.gate);
      const int block = items.first_block() + thread;  // of the first threads
      // One a lane: its warp copies those of all its lanes.
      const int column = row_of(thread % 32 / 4, thread % 4);
      const int row =
          column < tile.count ? a.routing.sorted[tile.first + column] / a.pairs_per_row : -1;
      for (int chunk = 0; chunk < a.matrix.num_chunks; ++chunk) {
        if (!ptx::barrier_test(ring_.empty(ring_.stage), ring_.parity ^ 1)) {
          publish_all();  // the consumers may be waiting for what has come meanwhile
          ptx::barrier_wait(ring_.empty(ring_.stage), ring_.parity ^ 1);
        }
        if (thread < kBlocks) {
          copy_weights(weights + block * a.matrix.block_bytes, chunk, block < a.matrix.num_blocks);
        }
        clear_end(chunk);
        copy_tokens(row, chunk);
        ptx::copy_commit();
        ring_.next();
        if (++open_ > kOpenCopies) {
          ptx::copy_wait<kOpenCopies>();
          publish();
        }
      }
    }
    publish_all();
  }

 private:
  // Of 4 rows a warp copies at once, 8 threads each; 16 of all warps.
  static constexpr int kRowsAtOnce = kProducers / 8, kTurns = kColumns / kRowsAtOnce;

  __device__ __forceinline__ int row_of(int turn, int i) const {
    return turn * kRowsAtOnce + thread / 32 * 4 + i;
  }

  // This thread's block of weights. A line's chunks lie behind its head, which each of them needs.
  __device__ __forceinline__ void copy_weights(const char* block, int chunk, bool has_block) {
    const Matrix& m = a.matrix;
    uint64_t* const full = ring_.full(ring_.stage);
    if (!has_block) {
      ptx::barrier_arrive(full);
      return;
    }
    const int heads = m.head_bytes * m.lines_in_chunk;
    const int line = m.lines_in_chunk > 1 ? chunk * m.lines_in_chunk : chunk / m.chunks_in_line;
    const int skipped =
        m.lines_in_chunk > 1 ? 0 : chunk % m.chunks_in_line * ChunkShape<F>::kQuadBytes;
    const int64_t from = line * m.line_bytes;
    const int bytes = chunk_bytes(from + skipped);
    char* const to =
        ring_.bytes() + Stage<F>::kTokenBytes + thread * (heads + ChunkShape<F>::kQuadBytes);
    ptx::barrier_arrive_expecting(full, bytes);
    if (skipped == 0 || heads == 0) {
      ptx::copy_bulk(to, block + from + skipped, bytes, full);
    } else {
      ptx::copy_bulk(to, block + from, heads, full);
      ptx::copy_bulk(to + heads, block + from + heads + skipped, bytes - heads, full);
    }
  }

  // Of a chunk whose quads, less its heads, begin that far in the block.
  __device__ __forceinline__ int chunk_bytes(int64_t begin) const {
    const int whole = a.matrix.head_bytes * a.matrix.lines_in_chunk + ChunkShape<F>::kQuadBytes;
    const int64_t left = a.matrix.block_bytes - begin;
    return left < whole ? int(left) : whole;
  }

  // A last chunk that is not whole is followed by zeros: what lay there before could be NaN.
  __device__ __forceinline__ void clear_end(int chunk) {
    const Matrix& m = a.matrix;
    if (chunk + 1 < m.num_chunks) return;
    const int line = m.lines_in_chunk > 1 ? chunk * m.lines_in_chunk : chunk / m.chunks_in_line;
    const int skipped =
        m.lines_in_chunk > 1 ? 0 : chunk % m.chunks_in_line * ChunkShape<F>::kQuadBytes;
    const int whole = m.head_bytes * m.lines_in_chunk + ChunkShape<F>::kQuadBytes;
    const int begin = chunk_bytes(line * m.line_bytes + skipped);
    char* const chunks = ring_.bytes() + Stage<F>::kTokenBytes;
    for (int block = 0; block < kBlocks; ++block) {
      for (int i = begin + thread * 16; i < whole; i += kProducers * 16) {
        ptx::store_float4(reinterpret_cast<float*>(chunks + block * whole + i), {0, 0, 0, 0});
      }
    }
  }

  // Columns that the tile does not have keep what they have.
  __device__ __forceinline__ void copy_tokens(int my_row, int chunk) {
    const int piece = thread % 8;
    char* const to = ring_.bytes() + ptx::panel_offset(thread / 8, piece);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int row = __shfl_sync(kAllLanes, my_row, turn * 4 + thread % 32 / 8);
      if (row < 0) continue;
      const uint16_t* const from = a.tokens + int64_t(row) * a.token_k;
#pragma unroll
      for (int panel = 0; panel < F::kChunkK / kPanelK; ++panel) {
        const int k = chunk * F::kChunkK + panel * kPanelK + piece * 8;
        ptx::copy16_async(to + panel * kPanelBytes + turn * kRowsAtOnce * ptx::kPanelRowBytes,
                          k < a.token_k ? from + k : a.tokens, k < a.token_k);
      }
    }
  }

  // Tells the consumers of the oldest stage that they have not been told of.
  __device__ __forceinline__ void publish() {
    ptx::fence_for_async();
    int stage = ring_.stage - open_;
    if (stage < 0) stage += a.stages;
    ptx::barrier_arrive(ring_.full(stage));
    --open_;
  }
  __device__ __forceinline__ void publish_all() {
    ptx::copy_wait<0>();
    while (open_ > 0) publish();
  }

  const Args& a;
  Ring ring_;
  const int thread;
  int open_ = 0;  // stages begun and not published
};

// Scales are applied every kSlicesInGroup slices of 16 k: a group's, or fewer.
template <class F, int kSlicesInGroup>
class Consumer {
 public:
  __device__ __forceinline__ explicit Consumer(const Args& args)
      : a(args), ring_(args), warp((threadIdx.x - kProducers) / 32), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    for (Items items(a); items.is_here(); items.next()) {
      float sums[2][kSumBlocks][4];
      clear(sums);
      for (int chunk = 0; chunk < a.matrix.num_chunks; ++chunk) {
        ptx::barrier_wait(ring_.full(ring_.stage), ring_.parity);
        if constexpr (F::kScaled) {
          multiply_scaled(sums);
        } else {
          multiply(sums);
        }
        __syncwarp();  // all lanes have read their weights
        if (lane == 0) ptx::barrier_arrive(ring_.empty(ring_.stage));
        ring_.next();
      }
      const Tile tile = a.routing.tiles[items.tile()];
      const int block = items.first_block() + warp;
      if (block >= a.matrix.num_blocks) {
        const int rows = w13_rows(has_gate(a.call.set.activation));
        if (a.down || block * rows >= a.h_stride) continue;
        clear(sums);  // the end of a row of h, where there are no weights, is zeros
      }
      grouped::finish_tile<kSumBlocks>(a, tile, block, a.routing.sorted + tile.first, sums, lane);
    }
  }

 private:
  static constexpr int kQuadSlices = F::kSlices == 2 ? 2 : 1;  // 16 k that a quad has, at least

  __device__ __forceinline__ static void clear(float (&sums)[2][kSumBlocks][4]) {
#pragma unroll
    for (int n = 0; n < kSumBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][n][i] = sums[1][n][i] = 0.0f;
    }
  }

  // The 4 dwords of this lane: rows 4 g to 4 g + 3 of step t of a quad.
  __device__ __forceinline__ void load_quad(const char* quad, uint32_t (&rows)[4]) const {
    const int g = lane / 4, t = lane % 4;
    const char* const step = quad + t * kStepBytes + g * 16;
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = ptx::load_uint(step + (i ^ t) * 4);
    const bool odd = t % 2 != 0, high = t / 2 != 0;
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = odd ? v[i ^ 1] : v[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = high ? w[i ^ 2] : w[i];
  }

  __device__ __forceinline__ const char* weights() const {
    const Matrix& m = a.matrix;
    return ring_.bytes() + Stage<F>::kTokenBytes +
           warp * (m.head_bytes * m.lines_in_chunk + ChunkShape<F>::kQuadBytes);
  }

  __device__ __forceinline__ uint64_t tokens(int slice) const {
    return ptx::token_matrix(ring_.bytes() + slice / 4 * kPanelBytes + slice % 4 * 32);
  }

  // Weights without scales: both halves of the rows at once.
  __device__ __forceinline__ void multiply(float (&sums)[2][kSumBlocks][4]) const {
    const char* const quads = weights();
#pragma unroll
    for (int s = 0; s < Stage<F>::kSlices; ++s) {
      uint32_t dwords[F::kQuads][4];
#pragma unroll
      for (int i = 0; i < F::kQuads; ++i) load_quad(quads + (s * F::kQuads + i) * 512, dwords[i]);
      uint32_t fragments[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fragments[j][i] = dwords[i / 2][2 * j + i % 2];
      }
      ptx::wgmma_fence();
      ptx::wgmma_bf16(sums[0], fragments[0], tokens(s), true);
      ptx::wgmma_bf16(sums[1], fragments[1], tokens(s), true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the registers of the slice before are free
    }
    ptx::wgmma_wait<0>();
  }

  // Group by group, of each one half of the rows and then the other.
  __device__ __forceinline__ void multiply_scaled(float (&sums)[2][kSumBlocks][4]) const {
    constexpr int kQuadsInGroup = kSlicesInGroup / kQuadSlices;
    const Matrix& m = a.matrix;
    const char* const chunk = weights();
#pragma unroll
    for (int group = 0; group < Stage<F>::kSlices / kSlicesInGroup; ++group) {
      const int first = group * kQuadsInGroup, line = first >> m.quad_shift;
      const char* const head = chunk + line * m.head_bytes + (line << m.quad_shift) * 512;
      const char* const quads = chunk + (line + 1) * m.head_bytes + first * 512;
      uint32_t dwords[kQuadsInGroup][4];
#pragma unroll
      for (int q = 0; q < kQuadsInGroup; ++q) load_quad(quads + q * 512, dwords[q]);
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
          ptx::wgmma_bf16(products, fragments, tokens(group * kSlicesInGroup + s), s > 0);
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

  // Of rows 4 g + 2 j and 4 g + 2 j + 1.
  __device__ __forceinline__ void load_two_scales(const char* head, int group, int j,
                                                  float (&scales)[2]) const {
    const int row = lane / 4 * 4 + 2 * j;
    if constexpr (F::kFormat == Format::kMxfp4) {
      const char* const bytes = head + group % 2 * kLanes + row;
      scales[0] = e8m0_value(uint8_t(bytes[0]));
      scales[1] = e8m0_value(uint8_t(bytes[1]));
    } else {
      load_scale_pair(head, row, a.matrix.scale_type, scales);
    }
  }

  const Args& a;
  Ring ring_;
  const int warp, lane;
};

// Grid: as many blocks of threads as multiprocessors.
template <class F, int kSlicesInGroup>
__global__ void __launch_bounds__(kThreads, 1) experts_wgmma(const __grid_constant__ Args a) {
  if (threadIdx.x == 0) {
    const Ring ring(a);
    for (int i = 0; i < a.stages; ++i) {
      ptx::barrier_init(ring.full(i), kProducers + kBlocks);  // tokens, weights
      ptx::barrier_init(ring.empty(i), kBlocks);
    }
    ptx::barriers_are_set();
  }
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
