// SPDX-License-Identifier: Apache-2.0
// The CPU's end of a hand-off (handoff/desk.h) as an emulated GPU sees it: two models at once, CPU
// parts that fail, hang, or whose experts are gone; questions of a stream, of graphs, and by host
// functions. The experts are a sum here, the lane and the kernels of the hand-off are the real
// ones.
#include "handoff/desk.h"

#include <chrono>
#include <cmath>
#include <map>
#include <thread>

#include "cpu/experts.h"
#include "cpu/threads.h"
#include "expert_sets.h"
#include "registry.h"
#include "testing.h"

using ey::DType;
using ey::handoff::Desk;

namespace {

std::map<int64_t, std::shared_ptr<ey::ExpertSetEntry>> sets;
std::atomic<bool> fails{false}, stuck{false};
const ey::cpu::Kernel kernel{};

}  // namespace

namespace ey {

std::shared_ptr<ExpertSetEntry> find_expert_set(int64_t handle) {
  const auto found = sets.find(handle);
  return found == sets.end() ? nullptr : found->second;
}
Status select_kernel(Format, Layout, Mode, DType, const cpu::Kernel** out) {
  *out = &kernel;
  return {};
}
namespace cpu {
Status moe_experts(const Kernel&, const MoeArgs& a, int) {
  while (stuck) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  if (fails) return failure("topk_ids: something is wrong");
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    for (int64_t h = 0; h < a.set->hidden_size; ++h) {
      const int64_t i = t * a.set->hidden_size + h;
      double sum = testing::get(a.hidden_states, a.hidden_dtype, size_t(i)) + a.set->alpha;
      for (int64_t k = 0; k < a.top_k; ++k) {
        sum += static_cast<const int32_t*>(a.topk_ids)[t * a.top_k + k];
      }
      static_cast<float*>(a.out)[i] = float(sum);
    }
  }
  return {};
}
}  // namespace cpu

}  // namespace ey

namespace {

constexpr ey::cuda::BoxShape kShape{2, 24, 2, DType::kF32};
constexpr int64_t kValues = 48, kPairs = 4;

void add_set(int64_t handle, float alpha) {
  auto entry = std::make_shared<ey::ExpertSetEntry>();
  entry->set.hidden_size = kShape.hidden_size;
  entry->set.num_experts = 4;
  entry->set.alpha = alpha;
  sets[handle] = entry;
}

std::unique_ptr<Desk> make_desk(double seconds = 20, bool host_functions = false) {
  std::unique_ptr<Desk> desk;
  const ey::Status made = Desk::make(
      0, kShape,
      {.threads = 1, .timeout_ns = int64_t(seconds * 1e9), .host_functions = host_functions},
      &desk);
  if (!made.ok) testing::fail("%s", made.what);
  return desk;
}

// A question with memory of its own.
struct Call {
  int64_t experts;
  std::vector<float> hidden = std::vector<float>(kValues), weights = std::vector<float>(kPairs, 1);
  std::vector<float> out = std::vector<float>(kValues, -7);
  std::vector<int32_t> ids = std::vector<int32_t>(kPairs);
  uint32_t ticket = 0;

  Call(int64_t experts, unsigned seed) : experts(experts) {
    std::mt19937 random(seed);
    for (float& x : hidden) x = float(random() % 8);
    for (int32_t& id : ids) id = int32_t(random() % 4);
  }
  ey::Status ask(Desk& desk) {
    return desk.ask({.hidden_states = hidden.data(),
                     .topk_ids = ids.data(),
                     .ids_are_int64 = false,
                     .topk_weights = weights.data(),
                     .weights_dtype = DType::kF32,
                     .experts = experts,
                     .num_experts = 4},
                    &ticket, stream());
  }
  ey::Status collect(Desk& desk) {
    return desk.collect(&ticket, nullptr, out.data(), DType::kF32, stream());
  }
  // Both; the first sentence if any.
  ey::Status run(Desk& desk) {
    if (ey::Status s = ask(desk); !s.ok) return s;
    return collect(desk);
  }
  bool is_right() const {
    for (int64_t i = 0; i < kValues; ++i) {
      const int64_t t = i / kShape.hidden_size;
      const float sum = hidden[size_t(i)] + sets[experts]->set.alpha + float(ids[size_t(2 * t)]) +
                        float(ids[size_t(2 * t + 1)]);
      if (out[size_t(i)] != sum) return false;
    }
    return true;
  }
  bool is_nan() const {
    for (const float x : out) {
      if (!std::isnan(x)) return false;
    }
    return true;
  }

 private:
  static void* stream() {  // one that can be captured
    static int address;
    return &address;
  }
};

void check_says(const ey::Status& status, const char* part) {
  CHECK(!status.ok);
  testing::check_contains(status.what, part);
}

void works(Desk& desk, int64_t experts, unsigned seed) {
  Call call(experts, seed);
  const ey::Status done = call.run(desk);
  if (!done.ok) testing::fail("%s", done.what);
  CHECK(call.is_right());
}

}  // namespace

TEST(two_models_of_one_shape_at_once) {
  add_set(1, 10);
  add_set(2, 20);
  const auto a = make_desk(), b = make_desk();
  for (unsigned i = 0; i < 20; ++i) {
    Call first(1, i), second(2, 100 + i);
    CHECK(first.ask(*a).ok && second.ask(*b).ok);
    CHECK(second.collect(*b).ok && first.collect(*a).ok);
    CHECK(first.is_right() && second.is_right());
  }
  CHECK(a->check(true).ok && b->check(true).ok);
}

TEST(two_questions_of_one_model_at_once_are_refused) {
  add_set(1, 10);
  const auto desk = make_desk();
  Call first(1, 1), second(1, 2);
  CHECK(first.ask(*desk).ok && second.ask(*desk).ok);
  CHECK(second.collect(*desk).ok && first.collect(*desk).ok);
  CHECK(first.is_right() && second.is_nan());
  check_says(desk->check(true), "before its last question had been answered");
  works(*desk, 1, 3);
}

TEST(a_part_that_fails_is_the_next_ones_sentence) {
  add_set(1, 10);
  for (const bool host_functions : {false, true}) {
    const auto desk = make_desk(20, host_functions);
    fails = true;
    Call call(1, 1);
    CHECK(call.run(*desk).ok);
    CHECK(call.is_nan());
    fails = false;
    Call next(1, 2);
    check_says(next.run(*desk), "topk_ids: something is wrong (in a part of a layer that cuda:0");
    works(*desk, 1, 3);  // it is said once
  }
}

TEST(a_worker_that_is_stuck_is_a_time_out) {
  add_set(1, 10);
  for (const bool host_functions : {false, true}) {
    const auto desk = make_desk(0.05, host_functions);
    stuck = true;  // until all of the following has returned
    Call call(1, 1);
    CHECK(call.run(*desk).ok);
    CHECK(call.is_nan());
    Call next(1, 2);
    check_says(next.run(*desk), "the CPU's part of a layer did not finish within 0.05 s");
    Call refused(1, 3);  // the late answer is still to be written
    CHECK(refused.run(*desk).ok);
    CHECK(refused.is_nan());
    stuck = false;
    while (desk->asked()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    check_says(desk->check(true), "before its last question had been answered and collected");
    works(*desk, 1, 4);
  }
}

TEST(experts_that_are_gone) {
  const auto desk = make_desk();
  sets.clear();
  Call call(1, 1);
  CHECK(call.run(*desk).ok);
  CHECK(call.is_nan());
  check_says(desk->check(true),
             "the experts that a CUDA graph asks for are gone: capture it again");
}

TEST(by_host_functions) {
  add_set(1, 10);
  const auto desk = make_desk(20, true);
  for (unsigned i = 0; i < 20; ++i) works(*desk, 1, i);
}

TEST(graphs) {  // here a graph runs while it is captured
  add_set(1, 10);
  for (const bool host_functions : {false, true}) {
    const auto desk = make_desk(20, host_functions);
    for (unsigned i = 1; i <= 20; ++i) {
      emu::machine.capture_id = i;
      works(*desk, 1, i);
    }
    emu::machine.capture_id = 0;
    works(*desk, 1, 30);
  }
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
