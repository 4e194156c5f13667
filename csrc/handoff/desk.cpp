// SPDX-License-Identifier: Apache-2.0
#include "desk.h"

#include <algorithm>

#include "../cpu/experts.h"
#include "../cpu/threads.h"
#include "../expert_sets.h"
#include "../registry.h"

namespace ey::handoff {
namespace {

constexpr int64_t kWaitSpin = 100'000;

uint32_t load(const uint32_t& word) { return __atomic_load_n(&word, __ATOMIC_ACQUIRE); }

}  // namespace

Status Desk::make(int device, const cuda::BoxShape& shape, const Options& options,
                  std::unique_ptr<Desk>* desk) {
  std::unique_ptr<Desk> made(new Desk(options));
  if (Status s = cuda::make_box(device, shape, &made->box_); !s.ok) return s;
  made->lane_.watch(made.get());
  *desk = std::move(made);
  return {};
}

Desk::~Desk() {
  if (box_.words == nullptr) return;  // it was never made
  lane_.unwatch(this);
  cuda::free_box(&box_);
}

void Desk::expect(void* expectation) {
  const auto& e = *static_cast<const Expectation*>(expectation);
  e.desk->lane_.expect(e.questions, e.desk->options_.timeout_ns);
}

void Desk::expect_one(void* desk) {
  auto& d = *static_cast<Desk*>(desk);
  d.lane_.expect(1, d.options_.timeout_ns);
}

void Desk::wait(void* desk) {
  auto& d = *static_cast<Desk*>(desk);
  const int64_t end = now_ns() + d.options_.timeout_ns;
  for (;;) {
    const uint32_t seen = d.answered_.value();
    if (!d.asked()) return;
    const int64_t left = end - now_ns();
    if (left <= 0 || !d.answered_.wait_while(seen, left, kWaitSpin)) return;  // collect says so
  }
}

Status Desk::announce(void* stream) {
  if (options_.host_functions) return cuda::call_host(box_, &expect_one, this, stream);
  uint64_t capture = 0;
  if (Status s = cuda::capture_id(box_.device, stream, &capture); !s.ok) return s;
  if (capture == 0) {
    expect_one(this);
    return {};
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (capture == capture_) {
    ++expectations_.back().questions;
    return {};
  }
  capture_ = capture;
  expectations_.push_back({this, 1});
  must_join_ = true;
  return cuda::call_host_aside(box_, &expect, &expectations_.back(), stream);
}

Status Desk::ask(const cuda::Question& question, uint32_t* ticket, void* stream) {
  if (Status s = check(false); !s.ok) return s;
  // Announced first: the branch then runs beside the kernel that asks.
  if (!options_.host_functions) {
    if (Status s = announce(stream); !s.ok) return s;
    return cuda::ring(box_, question, ticket, stream);
  }
  if (Status s = cuda::ring(box_, question, ticket, stream); !s.ok) return s;
  return announce(stream);
}

Status Desk::collect(const uint32_t* ticket, const float* share, void* out, DType out_dtype,
                     void* stream) {
  if (options_.host_functions) {
    if (Status s = cuda::call_host(box_, &wait, this, stream); !s.ok) return s;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (must_join_) {
      must_join_ = false;
      if (Status s = cuda::join_host(box_, stream); !s.ok) return s;
    }
  }
  // After a host function that gave up the kernel does not wait as long again.
  const int64_t timeout = options_.host_functions ? 1'000'000 : options_.timeout_ns;
  return cuda::collect(box_, ticket, share, out, out_dtype, timeout, stream);
}

Status Desk::check(bool may_wait) {
  const double seconds = static_cast<double>(options_.timeout_ns) * 1e-9;
  const cuda::BoxReport report = cuda::take_report(box_);
  if (report == cuda::BoxReport::kNone) return {};
  if (may_wait && report != cuda::BoxReport::kFailed) cuda::revive(box_);
  switch (report) {
    case cuda::BoxReport::kRefused:
      return failure(
          "device: cuda:%d asked the CPU for a part of a layer before its last question had been "
          "answered and collected: the result is NaN. Either two streams or graphs of one model "
          "ran at once, or the CPU did not answer within %g s before",
          box_.device, seconds);
    case cuda::BoxReport::kTimedOut:
      return failure(
          "device: cuda:%d: the CPU's part of a layer did not finish within %g s; the result is "
          "NaN. The CPU hangs, or the time is too short for such a call: "
          "ExpertsConfig(timeout=SECONDS)",
          box_.device, seconds);
    default:
      break;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  return failure("%.380s (in a part of a layer that cuda:%d asked the CPU for; the result is NaN)",
                 error_.what, box_.device);
}

bool Desk::asked() { return load(box_.words->asked) != load(box_.words->answered); }

void Desk::answer() {
  const uint32_t epoch = load(box_.words->asked);
  if (const Status done = compute(); !done.ok) {
    const std::lock_guard<std::mutex> lock(mutex_);
    error_ = done;
    box_.words->failed = epoch;
  }
  __atomic_store_n(&box_.words->answered, epoch, __ATOMIC_RELEASE);
  answered_.advance();
}

Status Desk::compute() {
  const auto entry = find_expert_set(box_.words->experts);
  if (entry == nullptr || entry->device >= 0 || entry->set.hidden_size != box_.shape.hidden_size ||
      entry->set.num_experts != static_cast<int64_t>(box_.words->num_experts)) {
    return failure("the experts that a CUDA graph asks for are gone: capture it again");
  }
  const cpu::Kernel* kernel = nullptr;
  const ExpertSet& set = entry->set;
  const DType dtype = box_.shape.hidden_dtype;
  if (Status s = select_kernel(set.format, set.layout, set.mode, dtype, &kernel); !s.ok) return s;
  const MoeArgs args = {.num_tokens = box_.shape.num_tokens,
                        .top_k = box_.shape.top_k,
                        .hidden_states = box_.hidden_states,
                        .out = box_.answer,
                        .hidden_dtype = dtype,
                        .topk_ids = box_.topk_ids,
                        .ids_are_int64 = false,
                        .topk_weights = box_.topk_weights,
                        .weights_dtype = DType::kF32,
                        .set = &set,
                        .out_is_fp32 = true};
  const int threads = std::clamp(options_.threads, 1, cpu::thread_limits().usable());
  const Status done = cpu::moe_experts(*kernel, args, threads);
  entry->last_isa.store(kernel->isa, std::memory_order_relaxed);
  entry->calls.fetch_add(1, std::memory_order_relaxed);
  return done;
}

Handles<Desk>& desks() {
  static Handles<Desk>& all = *new Handles<Desk>;
  return all;
}

}  // namespace ey::handoff
