// SPDX-License-Identifier: Apache-2.0
// The two kernels of handoff.h. One block rings: a question of a decode step is small, and the
// epoch must come last. A few blocks collect, so that they fit beside whatever else runs on the
// card.
#pragma once

#include "handoff.h"
#include "handoff_ptx.cuh"
#include "numbers.cuh"

namespace ey::cuda::handoff {

constexpr int kRingThreads = 512, kCollectThreads = 256, kMostCollectBlocks = 8;
constexpr uint32_t kFirstSleep = 64, kLongestSleep = 1024;  // ns between two looks over PCIe

struct RingArgs {
  Box box;
  Question question;
  int64_t hidden_bytes;
  uint32_t* ticket;
};

struct CollectArgs {
  BoxWords* words;
  BoxState* state;
  const float* answer;
  const uint32_t* ticket;
  const float* share;  // may be null
  void* out;
  DType out_dtype;
  int64_t size;
  uint64_t timeout_ns;
};

__device__ __forceinline__ void report(BoxWords* words, uint32_t epoch, BoxReport what) {
  ptx::store_for_host(&words->report, uint64_t(epoch) << 32 | uint32_t(what));
}

// Each thread its share of the question, to pinned memory.
__device__ __forceinline__ void write_question(const RingArgs& a, int thread, int threads) {
  const BoxShape& shape = a.box.shape;
  const Question& q = a.question;
  const int64_t bytes = a.hidden_bytes;
  const auto* from = static_cast<const char*>(q.hidden_states);
  auto* const to = static_cast<char*>(a.box.hidden_states);
  const int64_t wide = reinterpret_cast<uintptr_t>(from) % 16 == 0 ? bytes / 16 * 16 : 0;
  for (int64_t i = int64_t(thread) * 16; i < wide; i += int64_t(threads) * 16) {
    ptx::store_uint4(to + i, ptx::load_uint4(from + i));
  }
  for (int64_t i = wide + int64_t(thread) * 2; i < bytes; i += int64_t(threads) * 2) {
    *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
  }
  const int64_t pairs = shape.num_tokens * shape.top_k;
  for (int64_t i = thread; i < pairs; i += threads) {
    const int64_t id = q.ids_are_int64 ? static_cast<const int64_t*>(q.topk_ids)[i]
                                       : static_cast<const int32_t*>(q.topk_ids)[i];
    // an id that no int32 holds stays one that names no expert
    a.box.topk_ids[i] = id == int32_t(id) ? int32_t(id) : INT32_MIN;
    a.box.topk_weights[i] = load_number(q.topk_weights, q.weights_dtype, i);
  }
}

__global__ void __launch_bounds__(kRingThreads) ring(const __grid_constant__ RingArgs a) {
  auto* const epoch = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) {
    *epoch = 0;
    if (ptx::exchange(&a.box.state->busy, 1) == 0) {
      *epoch = a.box.state->epoch + 1 != 0 ? a.box.state->epoch + 1 : 1;
      a.box.state->epoch = *epoch;
    }
    *a.ticket = *epoch;
  }
  __syncthreads();  // the epoch is known
  if (*epoch == 0) return;
  write_question(a, int(threadIdx.x), int(blockDim.x));
  if (threadIdx.x == 0) {
    a.box.words->experts = a.question.experts;
    a.box.words->num_experts = uint32_t(a.question.num_experts);
  }
  __syncthreads();  // the question is whole
  if (threadIdx.x == 0) ptx::store_release_system(&a.box.words->asked, *epoch);
}

// One thread. What became of the question.
__device__ __forceinline__ BoxReport wait_for_answer(const CollectArgs& a, uint32_t ticket) {
  if (ticket == 0) return BoxReport::kRefused;
  const uint64_t begin = ptx::nanoseconds();
  uint32_t pause = kFirstSleep;
  while (ptx::load_acquire_system(&a.words->answered) != ticket) {
    if (ptx::nanoseconds() - begin > a.timeout_ns) return BoxReport::kTimedOut;
    ptx::sleep(pause);
    if (pause < kLongestSleep) pause *= 2;
  }
  const bool failed = ptx::load_acquire_system(&a.words->failed) == ticket;
  return failed ? BoxReport::kFailed : BoxReport::kNone;
}

__global__ void __launch_bounds__(kCollectThreads) collect(const __grid_constant__ CollectArgs a) {
  auto* const verdict = reinterpret_cast<BoxReport*>(ptx::dynamic_shared());
  const uint32_t ticket = *a.ticket;
  if (threadIdx.x == 0) {
    *verdict = wait_for_answer(a, ticket);
    if (*verdict != BoxReport::kNone) report(a.words, ticket, *verdict);
  }
  __syncthreads();  // the answer is there, or never will be
  const bool is_there = *verdict == BoxReport::kNone;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.size; i += step) {
    float sum = float_of_bits(0x7fc00000u);  // NaN
    if (is_there) sum = ptx::load_host_float(a.answer + i) + (a.share ? a.share[i] : 0.0f);
    store_number(a.out, a.out_dtype, i, sum);
  }
  __syncthreads();  // the answer has been read
  if (threadIdx.x != 0 || ticket == 0) return;
  if (*verdict == BoxReport::kTimedOut) a.state->late = 1;
  if (ptx::fetch_add(&a.state->arrived, 1) != gridDim.x - 1) return;
  a.state->arrived = 0;
  // Where the host may still be writing, the box stays taken until revive().
  if (ptx::fetch_add(&a.state->late, 0) == 0) ptx::exchange(&a.state->busy, 0);
}

}  // namespace ey::cuda::handoff
