// SPDX-License-Identifier: Apache-2.0
// The CPU's end of a hand-off (cuda/handoff.h): the lane "cpu" answers what one GPU asks for one
// shape of call, with the experts that the question names. All layers of a model share it, for a
// stream asks for one layer after the other; models do not.
//
// How the lane learns that a question comes, since it sleeps when nothing is asked: outside graphs
// from whoever queues the question; in a graph from a host function on a branch of its own, once a
// replay, which says how many questions the graph has. The lane then polls.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

#include "../cuda/handoff.h"
#include "handles.h"
#include "lane.h"

namespace ey::handoff {

class Desk : public Mailbox {
 public:
  struct Options {
    int threads;  // of the CPU's kernels
    int64_t timeout_ns;
    bool host_functions;  // wake and wait by host functions: nothing on the GPU polls
  };
  static Status make(int device, const cuda::BoxShape& shape, const Options& options,
                     std::unique_ptr<Desk>* desk);
  ~Desk() override;  // no graph that asks it may be replayed any more

  const cuda::Box& box() const { return box_; }
  // Both queue work on the stream, which may be captured; ask fails with what check() says.
  Status ask(const cuda::Question& question, uint32_t* ticket, void* stream);
  Status collect(const uint32_t* ticket, const float* share, void* out, DType out_dtype,
                 void* stream);
  // What went wrong with an earlier question, once. may_wait: after a time-out, questions are
  // accepted again if the late answer has come; else the box stays as it is.
  Status check(bool may_wait);

  bool asked() override;
  void answer() override;

 private:
  struct Expectation {
    Desk* desk;
    int questions;
  };

  Desk(const Options& options) : options_(options), lane_(lane("cpu", INT32_MAX)) {}
  Status announce(void* stream);
  Status compute();
  static void expect(void* expectation);
  static void expect_one(void* desk);
  static void wait(void* desk);

  cuda::Box box_{};
  const Options options_;
  Lane& lane_;
  Signal answered_;
  std::mutex mutex_;  // of what follows
  Status error_;      // of the last answer that failed
  uint64_t capture_ = 0;
  std::deque<Expectation> expectations_;  // one for each graph; their addresses stay
  bool must_join_ = false;
};

Handles<Desk>& desks();  // never destroyed: as expert sets

}  // namespace ey::handoff
