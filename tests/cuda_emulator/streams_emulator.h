// SPDX-License-Identifier: Apache-2.0
// Streams and events of the CUDA runtime. As a rule what is queued has run when the call returns.
// With emu::streams.deferred it waits until the test runs a stream: then the next operation is
// drawn at random from the heads of all streams that may go on, so two operations are in order only
// if a stream or an event says so. Kernels of ptx::launch are not among them.
#pragma once

#include <deque>
#include <functional>
#include <random>

#include "cuda_emulator.h"

using cudaEvent_t = void*;
using cudaHostFn_t = void (*)(void*);
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

namespace emu {

struct Event {
  uint64_t records = 0, done = 0;  // queued; that have run
};

class Streams {
 public:
  bool deferred = false;
  bool hangs = false;  // an event that nobody records was waited for

  void queue(cudaStream_t stream, std::function<void()> run) {
    put(stream, {std::move(run), nullptr, 0});
  }
  void wait(cudaStream_t stream, Event* event) {
    put(stream, {[] {}, event, event->records});
  }
  // Until nothing is left in the stream; others go on as it happens.
  void run(cudaStream_t stream, std::mt19937& random) {
    while (!queues_[stream].empty()) {
      std::vector<std::deque<Operation>*> ready;
      for (auto& [name, queue] : queues_) {
        if (queue.empty()) continue;
        const Operation& head = queue.front();
        if (head.after == nullptr || head.after->done >= head.number) ready.push_back(&queue);
      }
      if (ready.empty()) {
        hangs = true;
        return;
      }
      std::deque<Operation>& queue = *ready[random() % ready.size()];
      const Operation operation = std::move(queue.front());
      queue.pop_front();
      operation.run();
    }
  }
  size_t left() const {  // in all streams
    size_t count = 0;
    for (const auto& [name, queue] : queues_) count += queue.size();
    return count;
  }
  void forget() { queues_.clear(); }

 private:
  struct Operation {
    std::function<void()> run;
    Event* after;
    uint64_t number;
  };
  void put(cudaStream_t stream, Operation operation) {
    if (deferred) {
      queues_[stream].push_back(std::move(operation));
    } else {
      operation.run();
    }
  }
  std::map<cudaStream_t, std::deque<Operation>> queues_;
};
inline Streams streams;

}  // namespace emu

inline cudaError_t cudaMemset(void* to, int byte, size_t bytes) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return emu::allocate(stream, 1);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return emu::release(stream); }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  const cudaError_t error = emu::allocate(event, sizeof(emu::Event));
  if (error == cudaSuccess) new (*event) emu::Event;
  return error;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return emu::release(event); }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  auto* const e = static_cast<emu::Event*>(event);
  emu::streams.queue(stream, [e, number = ++e->records] { e->done = number; });
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  emu::streams.wait(stream, static_cast<emu::Event*>(event));
  return cudaSuccess;
}
inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  emu::streams.queue(stream, [=] { function(data); });
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  emu::streams.queue(stream, [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
inline cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
