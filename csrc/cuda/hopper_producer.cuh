// SPDX-License-Identifier: Apache-2.0
// The warpgroup that copies, on Hopper: ahead over the items to come, weights by bulk copies as
// they lie, tokens by pair into wgmma's swizzle, and what goes beside the tokens.
#pragma once

#include "hopper_ring.cuh"

namespace ey::cuda::hopper {

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
        if constexpr (Tokens<F>::kFloats > 0) {
          if (row >= 0) copy_floats(column, row, chunk);
        }
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
  using S = Stage<F>;
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
    char* const to = ring_.bytes() + S::kTokenBytes + thread * S::chunk_bytes(m);
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
    const int whole = S::chunk_bytes(a.matrix);
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
    const int whole = S::chunk_bytes(m);
    const int begin = chunk_bytes(line * m.line_bytes + skipped);
    char* const chunks = ring_.bytes() + S::kTokenBytes;
    for (int block = 0; block < kBlocks; ++block) {
      for (int i = begin + thread * 16; i < whole; i += kProducers * 16) {
        ptx::store_float4(reinterpret_cast<float*>(chunks + block * whole + i), {0, 0, 0, 0});
      }
    }
  }

  // Columns that the tile does not have keep what they have.
  __device__ __forceinline__ void copy_tokens(int my_row, int chunk) {
    const int piece = thread % 8;
    const auto* const all = reinterpret_cast<const char*>(a.tokens);
    char* const to = ring_.bytes() + ptx::panel_offset(thread / 8, piece);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int row = __shfl_sync(kAllLanes, my_row, turn * 4 + thread % 32 / 8);
      if (row < 0) continue;
      const char* const from = all + int64_t(row) * a.token_k * Tokens<F>::kBytes;
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel) {
        const int k = chunk * F::kChunkK + panel * S::kPanelK + piece * S::kPieceK;
        ptx::copy16_async(to + panel * kPanelBytes + turn * kRowsAtOnce * ptx::kPanelRowBytes,
                          k < a.token_k ? from + k * Tokens<F>::kBytes : all, k < a.token_k);
      }
    }
  }

  // Of this thread's column.
  __device__ __forceinline__ void copy_floats(int column, int row, int chunk) {
    constexpr int kFloats = Tokens<F>::kFloats;
    const float* const from = a.beside + int64_t(row) * a.beside_stride + chunk * kFloats;
    char* const to = ring_.bytes() + S::floats_at(a.matrix) + column * kFloats * 4;
    if constexpr (kFloats == 4) {
      ptx::copy16_async(to, from, true);
    } else {
      static_assert(kFloats == 1);
      ptx::copy4_async(to, from);
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

}  // namespace ey::cuda::hopper
