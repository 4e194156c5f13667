// SPDX-License-Identifier: Apache-2.0
// Pairs (token, slot) sorted by expert and cut into tiles of one expert, on the GPU, for calls that
// are too long for every block to sort for itself. By one block of threads: even 131072 pairs take
// less than the first weights.
#pragma once

#include "choice.cuh"
#include "warp.cuh"

namespace ey::cuda {

// Pairs sorted[first] to sorted[first + count - 1] have chosen this expert.
struct Tile {
  int32_t expert, first, count;
};

struct Routing {
  int32_t* num_tiles;
  Tile* tiles;
  int32_t* sorted;  // pairs
};

constexpr int kMostRoutedExperts = 4096;  // counts of 3 ints fit in 48 KiB

inline int64_t most_tiles(int64_t pairs, int64_t experts, int64_t pairs_per_tile) {
  return pairs / pairs_per_tile + (experts < pairs ? experts : pairs);
}

// The expert of a pair, or -1.
__device__ __forceinline__ int expert_of(const Chunk& c, int64_t pair) {
  int64_t id;
  ExpertPointers expert;
  return choose(c, pair, &id, &expert) == Chosen::kExpert ? int(id) : -1;
}

// One block of kThreads. Shared memory: 3 ints an expert. The order of an expert's pairs depends on
// the schedule; no result does, since a pair's sums do not depend on its column.
template <int kThreads>
__device__ __forceinline__ void route_pairs(const Chunk& c, int32_t pairs, int32_t pairs_per_tile,
                                            const Routing& r) {
  constexpr int kUnroll = 8;  // ids under way a thread: the loop waits for memory, not for sums
  const int experts = int(c.set.num_experts);
  int* const count = reinterpret_cast<int*>(ptx::dynamic_shared());
  int* const first_pair = count + experts;
  int* const first_tile = first_pair + experts;
  const int thread = threadIdx.x;
  const auto for_each_pair = [&](auto&& act) {
    for (int begin = thread; begin < pairs; begin += kThreads * kUnroll) {
      int expert[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int p = begin + i * kThreads;
        expert[i] = p < pairs ? expert_of(c, p) : -1;
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (expert[i] >= 0) act(begin + i * kThreads, expert[i]);
      }
    }
  };

  for (int e = thread; e < experts; e += kThreads) count[e] = 0;
  __syncthreads();  // counts are zero
  for_each_pair([&](int, int e) { atomicAdd(&count[e], 1); });
  __syncthreads();  // counts are whole
  if (thread < 32) {
    const int a_lane = (experts + 31) / 32;
    const int begin = thread * a_lane < experts ? thread * a_lane : experts;
    const int end = begin + a_lane < experts ? begin + a_lane : experts;
    int pairs_here = 0, tiles_here = 0;
    for (int e = begin; e < end; ++e) {
      pairs_here += count[e];
      tiles_here += (count[e] + pairs_per_tile - 1) / pairs_per_tile;
    }
    int pair = sum_of_lanes_before(pairs_here, thread);
    int tile = sum_of_lanes_before(tiles_here, thread);
    if (thread == 31) *r.num_tiles = tile + tiles_here;
    for (int e = begin; e < end; ++e) {
      first_pair[e] = pair;
      first_tile[e] = tile;
      pair += count[e];
      tile += (count[e] + pairs_per_tile - 1) / pairs_per_tile;
    }
  }
  __syncthreads();  // every expert has its place
  for (int e = thread; e < experts; e += kThreads) {
    Tile* out = r.tiles + first_tile[e];
    for (int done = 0; done < count[e]; done += pairs_per_tile) {
      const int left = count[e] - done;
      *out++ = {e, first_pair[e] + done, left < pairs_per_tile ? left : pairs_per_tile};
    }
  }
  __syncthreads();  // first_pair is no longer read, and counts up from here
  for_each_pair([&](int p, int e) { r.sorted[atomicAdd(&first_pair[e], 1)] = p; });
}

}  // namespace ey::cuda
