// SPDX-License-Identifier: Apache-2.0
// The whole experts layer in one launch, for few tokens: weights stream from DRAM through rings in
// shared memory, and nothing else is waited for if it can be helped.
//
//   0  every block sorts the pairs (token, slot) by expert, the same way: tiles of up to 8 kBlocks
//      pairs of one expert (fewer where there are fewer tokens)
//   1  items (tile, block of w13): h[pair, 16 i ..] = act(gate . x, up . x), rounded to bf16; or
//      h[pair, 32 i ..] = act(up . x), where there is no gate
//   2  items (tile, block of w2): y[pair, 32 j ..] = down . h + bias, fp32
//   3  units (token, block of w2): out[token, 32 j ..] = sum of weight * y over the slots, in order
//
// Items go round the blocks of the grid, 1 and 2 in one sequence. The warps of a block share an
// item by taking every kWarps-th chunk of k, each through a ring of its own that runs ahead over
// the items to come; so there is one barrier an item, for the sum of the warps' shares. All sums
// have an order that depends on nothing but the shape: results are the same to the bit on every run
// and card.
//
// Between 1 and 2 there is no barrier but a counter for each tile, and between 2 and 3 one for each
// block of rows. Weights of 2 are under way before the counter is asked. Counters belong to the
// stream that a launch is on; a launch clears those of the next one, which finds them by the parity
// of a count of launches. So a launch needs no preparation and can be replayed in a graph. Blocks
// wait for each other: they must all run at once (launch_together).
#pragma once

#include "activation.cuh"
#include "choice.cuh"
#include "chunk.cuh"
#include "warp.cuh"

namespace ey::cuda::stream {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kMostPairs = 1024;  // sorted by every block: a microsecond or two
constexpr int kMostExperts = 1024;
constexpr int kMostRowBlocks = 2048;  // of w2: hidden_size 65536
constexpr int kMostStages = 8;
constexpr int kColumnFloats = 36;       // 32 rows of a column, and 4 that spread the banks
constexpr uint32_t kLaunch = 1u << 20;  // what the blocks of one launch add to `exits` together

struct Counters {
  uint32_t exits;
  uint32_t ready[2][kMostPairs];     // [parity][tile]
  uint32_t done[2][kMostRowBlocks];  // [parity][block of w2]
};

// Pairs sorted[first] to sorted[first + count - 1] have chosen this expert.
struct Tile {
  const char *w13, *w2;
  int32_t expert, first, count, unused;
};

struct Args {
  Chunk call;
  Matrix matrices[2];  // w13, w2
  const void* x;       // [tokens, hidden_size] bf16
  uint16_t* h;         // [pairs, h_stride] bf16
  float* y;            // [pairs, hidden_size]
  Counters* counters;
  int h_stride;  // 16 for every block of w13; 32 without a gate
  int pairs, tokens, most_tiles;
  int columns;                         // of a tile at most: token rows of a stage
  int stages, stage_bytes, tokens_at;  // of a warp's ring; where in a stage the tokens begin
};

// Dynamic shared memory, in this order.
struct Shared {
  Tile* tiles;     // [most_tiles]
  int* chosen;     // [pairs] expert; -1: none; -2: an id that names no expert
  float* weights;  // [pairs]
  int* sorted;     // [pairs]
  int* totals;     // tiles, pairs
  float* shares;   // [2][kWarps][8 kBlocks][kColumnFloats]
  char* ring;      // [kWarps][stages][stage_bytes]
};

__host__ __device__ constexpr int up_to_16(int bytes) { return (bytes + 15) / 16 * 16; }

__host__ __device__ constexpr int ring_at(int most_tiles, int pairs, int blocks) {
  return up_to_16(most_tiles * int(sizeof(Tile)) + pairs * 12 + 8) +
         2 * kWarps * 8 * blocks * kColumnFloats * int(sizeof(float));
}

template <int kBlocks>
__device__ __forceinline__ Shared shared_memory(const Args& a) {
  char* const begin = ptx::dynamic_shared();
  Shared s;
  s.tiles = reinterpret_cast<Tile*>(begin);
  s.chosen = reinterpret_cast<int*>(s.tiles + a.most_tiles);
  s.weights = reinterpret_cast<float*>(s.chosen + a.pairs);
  s.sorted = reinterpret_cast<int*>(s.weights + a.pairs);
  s.totals = s.sorted + a.pairs;
  s.ring = begin + ring_at(a.most_tiles, a.pairs, kBlocks);
  s.shares = reinterpret_cast<float*>(s.ring) - 2 * kWarps * 8 * kBlocks * kColumnFloats;
  return s;
}

// Bytes of the ring that sort_pairs borrows.
__host__ __device__ constexpr int sorting_bytes(int experts, int pairs) {
  return (3 * experts + pairs) * int(sizeof(int));
}

// Fills tiles, chosen, weights, sorted and totals; ends with a barrier. An expert's pairs keep
// their order, so that every block of the grid makes the same tiles.
__device__ __forceinline__ void sort_pairs(const Args& a, const Shared& s, int columns) {
  const int thread = threadIdx.x, lane = thread % 32;
  const int experts = int(a.call.set.num_experts);
  int* const count = reinterpret_cast<int*>(s.ring);
  int* const first_pair = count + experts;
  int* const first_tile = first_pair + experts;
  int* const rank = first_tile + experts;  // of a pair among those of its expert
  for (int e = thread; e < experts; e += kThreads) count[e] = 0;
  for (int p = thread; p < a.pairs; p += kThreads) {
    int64_t id;
    ExpertPointers expert;
    const Chosen chosen = choose(a.call, p, &id, &expert);
    s.chosen[p] = chosen == Chosen::kExpert ? int(id) : chosen == Chosen::kNone ? -1 : -2;
    s.weights[p] = load_number(a.call.topk_weights, a.call.weights_dtype, p);
  }
  __syncthreads();  // choices are known, counts are zero
  if (thread < 32) {
    for (int begin = 0; begin < a.pairs; begin += 32) {
      const int p = begin + lane;
      const int e = p < a.pairs ? s.chosen[p] : -1;
      const uint32_t same = __match_any_sync(kAllLanes, e);
      const int before = __popc(same & ((1u << lane) - 1));
      if (e >= 0) rank[p] = count[e] + before;
      __syncwarp();  // counts are read
      if (e >= 0 && before == 0) count[e] += __popc(same);
      __syncwarp();  // counts are written
    }
    const int a_lane = (experts + 31) / 32;
    const int begin = lane * a_lane < experts ? lane * a_lane : experts;
    const int end = begin + a_lane < experts ? begin + a_lane : experts;
    int pairs_here = 0, tiles_here = 0;
    for (int e = begin; e < end; ++e) {
      pairs_here += count[e];
      tiles_here += (count[e] + columns - 1) / columns;
    }
    int pair = sum_of_lanes_before(pairs_here, lane);
    int tile = sum_of_lanes_before(tiles_here, lane);
    if (lane == 31) {
      s.totals[0] = tile + tiles_here;
      s.totals[1] = pair + pairs_here;
    }
    for (int e = begin; e < end; ++e) {
      first_pair[e] = pair;
      first_tile[e] = tile;
      pair += count[e];
      tile += (count[e] + columns - 1) / columns;
    }
  }
  __syncthreads();  // every expert has its place
  for (int p = thread; p < a.pairs; p += kThreads) {
    const int e = s.chosen[p];
    if (e >= 0) s.sorted[first_pair[e] + rank[p]] = p;
  }
  for (int e = thread; e < experts; e += kThreads) {
    if (count[e] == 0) continue;
    const ExpertPointers expert = a.call.set.experts[e];
    Tile* tile = s.tiles + first_tile[e];
    for (int done = 0; done < count[e]; done += columns) {
      const int left = count[e] - done;
      *tile++ = {static_cast<const char*>(expert.gate),
                 static_cast<const char*>(expert.down),
                 e,
                 first_pair[e] + done,
                 left < columns ? left : columns,
                 0};
    }
  }
  __syncthreads();  // tiles are whole, and the ring is free
}

// One warp's share of the work, in order: chunk `chunk` of item `item`.
struct Place {
  int item, chunk;
};

template <class F, int kBlocks>
class Worker {
 public:
  __device__ __forceinline__ Worker(const Args& args, const Shared& shared, int parity)
      : a(args), s(shared), lane(threadIdx.x % 32), warp(threadIdx.x / 32), parity_(parity) {
    ring_ = s.ring + warp * a.stages * a.stage_bytes;
    num_tiles_ = s.totals[0];
    items_w13_ = num_tiles_ * a.matrices[0].num_blocks;
    items_ = items_w13_ + num_tiles_ * a.matrices[1].num_blocks;
  }

  __device__ __forceinline__ void run() {
    ahead_ = settled({int(blockIdx.x), warp});
    for (int i = 0; i < a.stages - 1; ++i) copy_next();
    int turn = 0;  // items done; decides who finishes one, so that all warps take part
    for (int item = blockIdx.x; item < items_; item += gridDim.x, ++turn) {
      if (item >= items_w13_ && !h_may_be_awaited_) await_h(item);
      const int down = item >= items_w13_;
      const Matrix& m = a.matrices[down];
      const int index = item - (down ? items_w13_ : 0);
      const Tile& tile = s.tiles[index / m.num_blocks];
      float sums[2][kBlocks][4] = {};
      for (int chunk = warp; chunk < m.num_chunks; chunk += kWarps) {
        ptx::copy_wait_for(a.stages - 2);
        __syncwarp();  // the chunk is here for all lanes, and none reads the one before
        copy_next();
        const char* const stage = ring_ + read_ * a.stage_bytes;
        multiply_chunk<F, kBlocks, false>(m, stage, stage + a.tokens_at, tile.count, lane, sums);
        read_ = after(read_);
      }
      float* const shares = s.shares + turn % 2 * (kWarps * kShareFloats);
      put_share(shares + warp * kShareFloats, sums);
      __syncthreads();  // all shares are there; those of the item before are no longer read
      const int mine = (warp + turn) % kWarps;
      if (down) {
        finish_y(tile, index % m.num_blocks, shares, mine);
      } else {
        finish_h(tile, index % m.num_blocks, shares, mine);
      }
    }
    ptx::copy_wait_for(0);  // empty groups
    combine();
  }

 private:
  static constexpr int kShareFloats = 8 * kBlocks * kColumnFloats;

  __device__ __forceinline__ int after(int stage) const {
    return stage + 1 == a.stages ? 0 : stage + 1;
  }

  __device__ __forceinline__ Place settled(Place p) const {
    while (p.item < items_ && p.chunk >= a.matrices[p.item >= items_w13_].num_chunks) {
      p = {p.item + int(gridDim.x), warp};
    }
    return p;
  }

  __device__ __forceinline__ const Tile& tile_of(int item) const {
    return item < items_w13_ ? s.tiles[item / a.matrices[0].num_blocks]
                             : s.tiles[(item - items_w13_) / a.matrices[1].num_blocks];
  }

  // Starts the copies of the next chunk, or closes an empty group: groups are counted.
  __device__ __forceinline__ void copy_next() {
    if (ahead_.item < items_) {
      const int down = ahead_.item >= items_w13_;
      const Matrix& m = a.matrices[down];
      const int index = ahead_.item - (down ? items_w13_ : 0);
      const Tile& tile = s.tiles[index / m.num_blocks];
      char* const stage = ring_ + write_ * a.stage_bytes;
      copy_chunk<F>(m, (down ? tile.w2 : tile.w13) + index % m.num_blocks * m.block_bytes,
                    ahead_.chunk, stage, lane);
      if (!down) {
        copy_tokens<false>(tile, a.x, int(a.call.set.hidden_size), ahead_.chunk, stage);
      } else if (h_may_be_awaited_) {
        await_tile(index / m.num_blocks);
        copy_tokens<true>(tile, a.h, a.h_stride, ahead_.chunk, stage);
      }
      write_ = after(write_);
      ahead_ = settled({ahead_.item, ahead_.chunk + kWarps});
    }
    ptx::copy_commit();
  }

  // Rows of x (by token) or of h (by pair); those beyond k are zeros.
  template <bool kH>
  __device__ __forceinline__ void copy_tokens(const Tile& tile, const void* base, int k, int chunk,
                                              char* stage) {
    constexpr int kPieces = ChunkShape<F>::kPieces, kRows = 32 / kPieces;
    const int piece = lane % kPieces, begin = chunk * F::kChunkK + piece * 8;
    for (int column = lane / kPieces; column < tile.count; column += kRows) {
      const int pair = s.sorted[tile.first + column];
      const int64_t row = kH ? pair : pair / int(a.call.top_k);
      const char* const from = static_cast<const char*>(base) + (row * k + begin) * 2;
      char* const to = stage + a.tokens_at + column * ChunkShape<F>::kTokenBytes + piece * 16;
      if constexpr (kH) {
        ptx::copy16_async(to, begin < k ? from : base, begin < k);
      } else {
        ptx::copy16_async_cached(to, begin < k ? from : base, begin < k);
      }
    }
  }

  // Before the first item of w2, and not earlier: until then this warp must not wait for others,
  // which may wait for it. The weights in the ring get their rows of h.
  __device__ __forceinline__ void await_h(int item) {
    h_may_be_awaited_ = true;
    int stage = read_;
    for (Place p = settled({item, warp}); p.item != ahead_.item || p.chunk != ahead_.chunk;
         p = settled({p.item, p.chunk + kWarps})) {
      const int index = (p.item - items_w13_) / a.matrices[1].num_blocks;
      await_tile(index);
      copy_tokens<true>(s.tiles[index], a.h, a.h_stride, p.chunk, ring_ + stage * a.stage_bytes);
      stage = after(stage);
    }
    ptx::copy_commit();
    ptx::copy_wait_for(0);  // once: these came last, so all before them have to be here
  }

  // Until h of the tile is whole. One look shows 32 tiles.
  __device__ __forceinline__ void await_tile(int tile) {
    if (tile / 32 != seen_tiles_) seen_ = 0;
    seen_tiles_ = tile / 32;
    while (!(seen_ >> tile % 32 & 1)) {
      const int mine = seen_tiles_ * 32 + lane;
      bool whole = false;
      if (mine < num_tiles_) {
        const int count = s.tiles[mine].count;
        const uint32_t wanted = uint32_t(a.matrices[0].num_blocks) *
                                uint32_t(has_gate(a.call.set.activation) ? (count + 1) / 2 : count);
        whole = ptx::load_acquire(&a.counters->ready[parity_][mine]) == wanted;
      }
      seen_ = __ballot_sync(kAllLanes, whole);
    }
    __syncwarp();  // what the lane of this tile has seen holds for all
  }

  __device__ __forceinline__ void put_share(float* share, const float (&sums)[2][kBlocks][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::store_float4(share + (8 * n + 2 * t + i) * kColumnFloats + 4 * g,
                          {sums[0][n][i], sums[0][n][2 + i], sums[1][n][i], sums[1][n][2 + i]});
      }
    }
  }

  __device__ __forceinline__ float sum_of_shares(const float* shares, int column, int row) const {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += shares[w * kShareFloats + column * kColumnFloats + row];
    }
    return sum;
  }

  // Two columns a warp: 2 x 16 rows of h.
  __device__ __forceinline__ void finish_h(const Tile& tile, int block, const float* shares,
                                           int mine) {
    const ExpertSet& set = a.call.set;
    const ExpertPointers& expert = set.experts[tile.expert];
    if (!has_gate(set.activation)) {  // one column a warp: 32 rows of up
      for (int column = mine; column < tile.count; column += kWarps) {
        const int i = block * kLanes + lane;
        float up = sum_of_shares(shares, column, lane);
        if (expert.up_bias && i < set.intermediate_size) up += expert.up_bias[i];
        const float h = activate_ungated(up);
        a.h[int64_t(s.sorted[tile.first + column]) * a.h_stride + i] = ptx::float_to_bf16(h);
        __syncwarp();  // written by all lanes
        if (lane == 0) ptx::add_release(&a.counters->ready[parity_][&tile - s.tiles], 1);
      }
      return;
    }
    for (int two = mine; 2 * two < tile.count; two += kWarps) {
      const int column = 2 * two + lane / 16, row = lane % 16, i = block * kLaneSet + row;
      if (column < tile.count) {
        float gate = sum_of_shares(shares, column, row);
        float up = sum_of_shares(shares, column, kLaneSet + row);
        if (i < set.intermediate_size) {
          if (expert.gate_bias) gate += expert.gate_bias[i];
          if (expert.up_bias) up += expert.up_bias[i];
        }
        const float h = activate(set.activation, gate, up, set.alpha, set.limit);
        a.h[int64_t(s.sorted[tile.first + column]) * a.h_stride + i] = ptx::float_to_bf16(h);
      }
      __syncwarp();  // written by all lanes
      if (lane == 0) ptx::add_release(&a.counters->ready[parity_][&tile - s.tiles], 1);
    }
  }

  // One column a warp: 32 rows of y.
  __device__ __forceinline__ void finish_y(const Tile& tile, int block, const float* shares,
                                           int mine) {
    const ExpertSet& set = a.call.set;
    const ExpertPointers& expert = set.experts[tile.expert];
    for (int column = mine; column < tile.count; column += kWarps) {
      const int j = block * kLanes + lane;
      if (j < set.hidden_size) {
        float y = sum_of_shares(shares, column, lane);
        if (expert.down_bias) y += expert.down_bias[j];
        a.y[int64_t(s.sorted[tile.first + column]) * set.hidden_size + j] = y;
      }
      __syncwarp();  // written by all lanes
      if (lane == 0) ptx::add_release(&a.counters->done[parity_][block], 1);
    }
  }

  __device__ __forceinline__ void combine() {
    const Chunk& c = a.call;
    const int num_blocks = a.matrices[1].num_blocks, top_k = int(c.top_k);
    const uint32_t all_pairs = uint32_t(s.totals[1]);
    for (int unit = blockIdx.x * kWarps + warp; unit < a.tokens * num_blocks;
         unit += gridDim.x * kWarps) {
      const int token = unit / num_blocks, block = unit % num_blocks;
      while (ptx::load_acquire(&a.counters->done[parity_][block]) != all_pairs) {
      }
      __syncwarp();
      const int j = block * kLanes + lane;
      if (j >= c.set.hidden_size) continue;
      float sum = 0.0f;
#pragma unroll 8
      for (int k = 0; k < top_k; ++k) {
        const int pair = token * top_k + k;
        const int e = s.chosen[pair];
        const float y =
            e >= 0 ? ptx::load_shared_float(a.y + int64_t(pair) * c.set.hidden_size + j) : 0.0f;
        if (e >= 0) sum += s.weights[pair] * y;
        if (e == -2) sum += refused(pair, token, block == 0 && lane == 0);
      }
      store_number(c.out, c.out_dtype, int64_t(token) * c.set.hidden_size + j, sum);
    }
  }

  __device__ __forceinline__ float refused(int pair, int token, bool report) const {
    int64_t id;
    ExpertPointers expert;
    choose(a.call, pair, &id, &expert);
    return refuse(a.call, token, id, report);
  }

  const Args& a;
  const Shared& s;
  const int lane, warp, parity_;
  char* ring_;
  int num_tiles_, items_w13_, items_;
  Place ahead_;               // of the next copy
  int read_ = 0, write_ = 0;  // stages
  bool h_may_be_awaited_ = false;
  int seen_tiles_ = -1;  // the 32 tiles that seen_ is of
  uint32_t seen_ = 0;    // which of them are whole
};

template <class F, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1) experts_stream(const __grid_constant__ Args a) {
  const Shared s = shared_memory<kBlocks>(a);
  const int parity = int(ptx::load_acquire(&a.counters->exits) / kLaunch % 2);
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < kMostPairs + kMostRowBlocks;
       i += gridDim.x * kThreads) {
    if (i < kMostPairs) {
      a.counters->ready[1 - parity][i] = 0;
    } else {
      a.counters->done[1 - parity][i - kMostPairs] = 0;
    }
  }
  sort_pairs(a, s, a.columns);
  Worker<F, kBlocks> worker(a, s, parity);
  worker.run();
  __syncthreads();  // no warp of this block looks at a counter any more
  if (threadIdx.x == 0) {
    ptx::add_release(&a.counters->exits, blockIdx.x == 0 ? kLaunch - (gridDim.x - 1) : 1);
  }
}

}  // namespace ey::cuda::stream
