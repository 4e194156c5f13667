// SPDX-License-Identifier: Apache-2.0
// What the kernels on Hopper (hopper.cuh, hopper_fast.cuh) have in common: the ring of stages in
// shared memory, the items of a block of threads, and how a consuming warp reads a stage.
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
constexpr int kPanelBytes = kColumns * ptx::kPanelRowBytes;
// 128 * 40 + 256 * 232 = 384 * 168, what the launch gives
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// What a format's products take of tokens: values of so many bytes, and so many floats beside those
// of a chunk, which lie in memory row by row (Args::beside).
template <class F>
struct Tokens {
  static constexpr int kBytes = 2, kFloats = 0;  // bf16
};

// A stage: [tokens] [8 chunks of weights] [the floats of each column].
template <class F>
struct Stage {
  static constexpr int kPanelK = ptx::kPanelRowBytes / Tokens<F>::kBytes;
  static constexpr int kPieceK = 16 / Tokens<F>::kBytes;
  static constexpr int kSliceK = 32 / Tokens<F>::kBytes;  // wgmma's k
  static constexpr int kPanels = F::kChunkK / kPanelK;
  static constexpr int kTokenBytes = kPanels * kPanelBytes;
  static constexpr int kSlices = F::kChunkK / kSliceK;
  static constexpr int kFloatBytes = kColumns * Tokens<F>::kFloats * 4;

  __device__ static __forceinline__ int chunk_bytes(const Matrix& m) {  // of weights
    return m.head_bytes * m.lines_in_chunk + ChunkShape<F>::kQuadBytes;
  }
  __device__ static __forceinline__ int floats_at(const Matrix& m) {
    return kTokenBytes + kBlocks * chunk_bytes(m);
  }
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
  const Args& a;
  int index, count;

  __device__ __forceinline__ explicit Items(const Args& args) : a(args), index(blockIdx.x) {
    count = *a.routing.num_tiles * row_groups();
  }
  __device__ __forceinline__ int row_groups() const {
    return (a.matrix.num_blocks + kBlocks - 1) / kBlocks;
  }
  __device__ __forceinline__ bool is_here() const { return index < count; }
  __device__ __forceinline__ int tile() const { return index / row_groups(); }
  __device__ __forceinline__ int first_block() const { return index % row_groups() * kBlocks; }
  __device__ __forceinline__ int turn() const { return index / gridDim.x % 2; }  // of this one's
  __device__ __forceinline__ void next() { index += gridDim.x; }
};

// What a consuming warp reads of a stage: its own chunk of weights, and everybody's tokens.
template <class F>
struct Reader {
  const Args& a;
  Ring ring;
  const int warp, lane;

  __device__ __forceinline__ explicit Reader(const Args& args)
      : a(args), ring(args), warp((threadIdx.x - kProducers) / 32), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ const char* weights() const {
    return ring.bytes() + Stage<F>::kTokenBytes + warp * Stage<F>::chunk_bytes(a.matrix);
  }
  __device__ __forceinline__ uint64_t tokens(int slice) const {
    return ptx::token_matrix(ring.bytes() + slice / 4 * kPanelBytes + slice % 4 * 32);
  }
  // Of column 0; those of a column lie side by side.
  __device__ __forceinline__ const char* floats() const {
    return ring.bytes() + Stage<F>::floats_at(a.matrix);
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

  // All lanes have read what they need of the stage.
  __device__ __forceinline__ void give_back() {
    __syncwarp();  // all lanes have read their weights
    if (lane == 0) ptx::barrier_arrive(ring.empty(ring.stage));
    ring.next();
  }
};

using Sums = float[2][kSumBlocks][4];

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
  for (int n = 0; n < kSumBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][n][i] = sums[1][n][i] = 0.0f;
  }
}

// By one thread, before the others are let on.
__device__ __forceinline__ void set_barriers(const Args& a) {
  const Ring ring(a);
  for (int i = 0; i < a.stages; ++i) {
    ptx::barrier_init(ring.full(i), kProducers + kBlocks);  // tokens, weights
    ptx::barrier_init(ring.empty(i), kBlocks);
  }
  ptx::barriers_are_set();
}

}  // namespace ey::cuda::hopper
