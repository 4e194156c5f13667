// SPDX-License-Identifier: Apache-2.0
// A GPU asks the CPU for its part of a layer, in the middle of a stream or of a CUDA graph, and no
// thread of the host takes part in it but the one that computes:
//
//   ring      a kernel writes hidden states, ids and weights to pinned memory, then the epoch
//   (the GPU's own experts run; a thread of the host sees the epoch, computes, writes the answer)
//   collect   a kernel waits for the answer, adds the GPU's share, and rounds once
//
// The epoch is counted in device memory, so that a graph can be replayed. A box holds one question
// at a time: a second one, before the first has been collected, is refused. A question that is
// refused, fails, or has no answer within the time-out makes every value of its result NaN, and is
// reported to the host (take_report). No CUDA header, no torch, no exception: as cuda.h.
#pragma once

#include <cstdint>

#include "../moe.h"
#include "../status.h"

namespace ey::cuda {

// What GPU and host look at, in pinned memory; each side's words on lines of their own.
struct BoxWords {
  alignas(64) uint32_t asked;     // GPU: the question of this epoch is whole
  uint32_t num_experts;           // GPU: of the layer that asks
  int64_t experts;                // GPU: the handle of the experts that are asked
  alignas(64) uint32_t answered;  // host: the answer of this epoch is whole
  uint32_t failed;                // host, before that: the answer of this epoch is an error
  alignas(64) uint64_t report;    // GPU: epoch << 32 | BoxReport
};
enum class BoxReport : uint32_t { kNone, kRefused, kTimedOut, kFailed };

// In device memory.
struct BoxState {
  uint32_t epoch;    // of the last question; never 0
  uint32_t busy;     // a question has not been collected
  uint32_t arrived;  // blocks of collect that are done
  uint32_t late;     // one of them has given up
};

struct BoxShape {
  int64_t num_tokens, hidden_size, top_k;
  DType hidden_dtype;
};

// Pinned memory and device memory for questions of one shape.
struct Box {
  int device;
  BoxShape shape;
  BoxWords* words;
  void* hidden_states;  // [num_tokens, hidden_size] of hidden_dtype
  int32_t* topk_ids;    // [num_tokens, top_k]
  float* topk_weights;  // [num_tokens, top_k]
  float* answer;        // [num_tokens, hidden_size]
  BoxState* state;
  void *aside, *forked, *joined;  // a stream, two events: for call_host_aside
};

Status make_box(int device, const BoxShape& shape, Box* box);
// Waits for the device's work.
void free_box(Box* box);

struct Question {
  const void* hidden_states;  // [num_tokens, hidden_size]
  const void* topk_ids;       // [num_tokens, top_k]
  bool ids_are_int64;
  const void* topk_weights;  // [num_tokens, top_k]
  DType weights_dtype;
  int64_t experts;  // for BoxWords
  int64_t num_experts;
};

// Queues the question. ticket: 4 bytes of device memory, for collect.
Status ring(const Box& box, const Question& question, uint32_t* ticket, void* stream);

// Queues out[i] = round(answer[i] + share[i]), once the answer is there. share: fp32 in device
// memory, or null. out: of out_dtype.
Status collect(const Box& box, const uint32_t* ticket, const float* share, void* out,
               DType out_dtype, int64_t timeout_ns, void* stream);

// Which graph the stream is captured into; 0: none.
Status capture_id(int device, void* stream, uint64_t* id);
// Queues a call of the host. It must not call CUDA.
Status call_host(const Box& box, void (*function)(void*), void* data, void* stream);
// The same beside the stream, which waits for it at join_host. Only while the stream is captured.
Status call_host_aside(const Box& box, void (*function)(void*), void* data, void* stream);
Status join_host(const Box& box, void* stream);

// What went wrong since the last call; kNone: nothing that is known by now. Touches no device.
BoxReport take_report(const Box& box);
// After a time-out, once the late answer has come: questions are accepted again. Waits for the
// device. Not ok while there is no answer.
Status revive(const Box& box);

}  // namespace ey::cuda
