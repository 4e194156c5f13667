// SPDX-License-Identifier: Apache-2.0
// The hand-off between an emulated GPU and a real lane: many questions through one box, epochs that
// wrap, two questions at once, answers that fail, come late, or never come.
#include "cuda/handoff.h"

#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "handoff/lane.h"
#include "testing.h"

using ey::DType;
using ey::cuda::BoxReport;

namespace {

constexpr int64_t kSecond = 1'000'000'000;

// The host's side: answer[t, h] = sum_k ids[t, k] * weights[t, k] + hidden[t, h] + experts.
class Answers : public ey::handoff::Mailbox {
 public:
  explicit Answers(const ey::cuda::Box& box) : box_(box) { lane().watch(this); }
  ~Answers() override { lane().unwatch(this); }
  static ey::handoff::Lane& lane() { return ey::handoff::lane("cpu", 1); }

  bool asked() override {
    return !deaf && __atomic_load_n(&box_.words->asked, __ATOMIC_ACQUIRE) != box_.words->answered;
  }
  void answer() override {
    const uint32_t epoch = box_.words->asked;
    if (slow_ms > 0) std::this_thread::sleep_for(std::chrono::milliseconds(slow_ms));
    const auto& s = box_.shape;
    for (int64_t t = 0; t < s.num_tokens; ++t) {
      float sum = float(box_.words->experts);
      for (int64_t k = 0; k < s.top_k; ++k) {
        sum += float(box_.topk_ids[t * s.top_k + k]) * box_.topk_weights[t * s.top_k + k];
      }
      for (int64_t h = 0; h < s.hidden_size; ++h) {
        const size_t i = size_t(t * s.hidden_size + h);
        box_.answer[i] = sum + float(testing::get(box_.hidden_states, s.hidden_dtype, i));
      }
    }
    if (fails) box_.words->failed = epoch;
    __atomic_store_n(&box_.words->answered, epoch, __ATOMIC_RELEASE);
    ++answered;
  }

  std::atomic<bool> fails{false}, deaf{false};
  std::atomic<int> slow_ms{0}, answered{0};

 private:
  const ey::cuda::Box& box_;
};

struct BoxGuard {
  ey::cuda::Box box;
  explicit BoxGuard(const ey::cuda::BoxShape& shape) {
    const ey::Status made = ey::cuda::make_box(0, shape, &box);
    if (!made.ok) testing::fail("%s", made.what);
  }
  ~BoxGuard() { ey::cuda::free_box(&box); }
};

// A question with its own inputs and result; small integers, so that every sum is exact.
struct Asked {
  ey::cuda::BoxShape shape;
  bool int64_ids;
  DType weights_dtype, out_dtype;
  bool has_share;
  int64_t experts;
  testing::Guarded hidden, ids, weights, share, out;
  std::vector<double> expected;
  uint32_t ticket = 77;

  Asked(const ey::cuda::BoxShape& s, std::mt19937& random, bool wide = false)
      : shape(s),
        int64_ids(wide),
        weights_dtype(wide ? DType::kBF16 : DType::kF32),
        out_dtype(s.hidden_dtype),
        has_share(random() % 2),
        experts(int64_t(random() % 8)),
        hidden(size_t(s.num_tokens * s.hidden_size * ey::size_of(s.hidden_dtype)), 16),
        ids(size_t(s.num_tokens * s.top_k * (wide ? 8 : 4)), 8),
        weights(size_t(s.num_tokens * s.top_k * ey::size_of(weights_dtype)), 4),
        share(size_t(s.num_tokens * s.hidden_size * 4), 4),
        out(size_t(s.num_tokens * s.hidden_size * ey::size_of(s.hidden_dtype)), 16) {
    const auto small = [&] { return float(random() % 4); };
    std::vector<double> sums;
    for (int64_t t = 0; t < s.num_tokens; ++t) {
      double sum = double(experts);
      for (int64_t k = 0; k < s.top_k; ++k) {
        const size_t i = size_t(t * s.top_k + k);
        const auto id = int(random() % 4) - 1;
        if (wide) {
          ids.as<int64_t>()[i] = id;
        } else {
          ids.as<int32_t>()[i] = id;
        }
        sum += id * testing::put(weights.data(), weights_dtype, i, small());
      }
      for (int64_t h = 0; h < s.hidden_size; ++h) {
        const size_t i = size_t(t * s.hidden_size + h);
        share.as<float>()[i] = small();
        const double x = testing::put(hidden.data(), s.hidden_dtype, i, small());
        expected.push_back(sum + x + (has_share ? share.as<float>()[i] : 0.0f));
      }
    }
  }
  ey::Status ring(const ey::cuda::Box& box) {
    return ey::cuda::ring(box,
                          {.hidden_states = hidden.data(),
                           .topk_ids = ids.data(),
                           .ids_are_int64 = int64_ids,
                           .topk_weights = weights.data(),
                           .weights_dtype = weights_dtype,
                           .experts = experts,
                           .num_experts = 4},
                          &ticket, nullptr);
  }
  ey::Status collect(const ey::cuda::Box& box, int64_t timeout_ns = 20 * kSecond) {
    return ey::cuda::collect(box, &ticket, has_share ? share.as<float>() : nullptr, out.data(),
                             out_dtype, timeout_ns, nullptr);
  }
  bool is_right() const {
    for (size_t i = 0; i < expected.size(); ++i) {
      if (testing::get(out.data(), out_dtype, i) != expected[i]) return false;
    }
    return true;
  }
  bool is_nan() const {
    for (size_t i = 0; i < expected.size(); ++i) {
      if (!std::isnan(testing::get(out.data(), out_dtype, i))) return false;
    }
    return true;
  }
};

void check_ok(const ey::Status& status) {
  if (!status.ok) testing::fail("%s (%s)", status.what, emu::machine.failure.c_str());
}

void ask_and_collect(const ey::cuda::Box& box, Asked& asked) {
  Answers::lane().expect(1, 20 * kSecond);
  check_ok(asked.ring(box));
  check_ok(asked.collect(box));
  CHECK(asked.is_right());
  CHECK(ey::cuda::take_report(box) == BoxReport::kNone);
}

constexpr ey::cuda::BoxShape kSmall{3, 40, 2, DType::kBF16};

}  // namespace

TEST(every_shape_and_type) {
  std::mt19937 random(unsigned(emu::options.seed));
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const auto& [tokens, hidden, top_k] :
         {std::array<int64_t, 3>{1, 1, 1}, {1, 256, 8}, {5, 37, 3}, {4, 1100, 2}}) {
      BoxGuard guard({tokens, hidden, top_k, type});
      Answers answers(guard.box);
      for (const bool wide : {false, true}) {
        Asked asked(guard.box.shape, random, wide);
        ask_and_collect(guard.box, asked);
      }
    }
  }
}

TEST(a_graph_that_is_replayed) {  // the same launches again and again, with new inputs
  std::mt19937 random(unsigned(emu::options.seed));
  BoxGuard guard(kSmall);
  Answers answers(guard.box);
  for (int i = 0; i < 60; ++i) {
    Asked asked(kSmall, random);
    ask_and_collect(guard.box, asked);
  }
  CHECK(answers.answered == 60);
  CHECK(guard.box.state->epoch == 60);
}

TEST(an_answer_that_takes_its_time) {
  std::mt19937 random(unsigned(emu::options.seed));
  BoxGuard guard(kSmall);
  Answers answers(guard.box);
  answers.slow_ms = 200;
  for (int i = 0; i < 2; ++i) {
    Asked asked(kSmall, random);
    ask_and_collect(guard.box, asked);
  }
  CHECK(answers.answered == 2);
}

TEST(epochs_wrap) {
  std::mt19937 random(unsigned(emu::options.seed));
  BoxGuard guard(kSmall);
  guard.box.state->epoch = guard.box.words->asked = guard.box.words->answered = UINT32_MAX - 2;
  Answers answers(guard.box);
  for (int i = 0; i < 6; ++i) {
    Asked asked(kSmall, random);
    ask_and_collect(guard.box, asked);
    CHECK(asked.ticket != 0);
  }
  CHECK(guard.box.state->epoch == 4);
}

TEST(a_second_question_at_once_is_refused) {
  std::mt19937 random(unsigned(emu::options.seed));
  BoxGuard guard(kSmall);
  Answers answers(guard.box);
  Asked first(kSmall, random), second(kSmall, random);
  Answers::lane().expect(1, 20 * kSecond);
  answers.deaf = true;
  check_ok(first.ring(guard.box));
  check_ok(second.ring(guard.box));
  check_ok(second.collect(guard.box));
  answers.deaf = false;
  CHECK(second.is_nan());
  CHECK(ey::cuda::take_report(guard.box) == BoxReport::kRefused);
  check_ok(first.collect(guard.box));  // untouched by the second
  CHECK(first.is_right());
  CHECK(answers.answered == 1);
  Asked third(kSmall, random);
  ask_and_collect(guard.box, third);
}

TEST(an_answer_that_fails) {
  std::mt19937 random(unsigned(emu::options.seed));
  BoxGuard guard(kSmall);
  Answers answers(guard.box);
  answers.fails = true;
  Answers::lane().expect(1, 20 * kSecond);
  Asked asked(kSmall, random);
  check_ok(asked.ring(guard.box));
  check_ok(asked.collect(guard.box));
  CHECK(asked.is_nan());
  CHECK(ey::cuda::take_report(guard.box) == BoxReport::kFailed);
  CHECK(ey::cuda::take_report(guard.box) == BoxReport::kNone);
  answers.fails = false;
  Asked next(kSmall, random);
  ask_and_collect(guard.box, next);
}

TEST(an_answer_that_comes_late) {
  std::mt19937 random(unsigned(emu::options.seed));
  BoxGuard guard({2, 1500, 2, DType::kBF16});  // several blocks collect
  Answers answers(guard.box);
  answers.slow_ms = 300;
  Answers::lane().expect(1, 20 * kSecond);
  Asked asked(guard.box.shape, random);
  check_ok(asked.ring(guard.box));
  check_ok(asked.collect(guard.box, kSecond / 50));
  CHECK(asked.is_nan());
  CHECK(ey::cuda::take_report(guard.box) == BoxReport::kTimedOut);
  CHECK(!ey::cuda::revive(guard.box).ok);
  Asked refused(guard.box.shape, random);  // the host still reads and writes the box
  check_ok(refused.ring(guard.box));
  check_ok(refused.collect(guard.box));
  CHECK(refused.is_nan());
  CHECK(ey::cuda::take_report(guard.box) == BoxReport::kRefused);
  while (answers.answered == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  answers.slow_ms = 0;
  check_ok(ey::cuda::revive(guard.box));
  Asked next(guard.box.shape, random);
  ask_and_collect(guard.box, next);
}

TEST(an_answer_that_never_comes) {
  std::mt19937 random(unsigned(emu::options.seed));
  BoxGuard guard(kSmall);
  Answers answers(guard.box);
  answers.deaf = true;
  Asked asked(kSmall, random);
  check_ok(asked.ring(guard.box));
  check_ok(asked.collect(guard.box, kSecond / 50));
  CHECK(asked.is_nan());
  CHECK(ey::cuda::take_report(guard.box) == BoxReport::kTimedOut);
}

TEST(ids_that_no_int32_holds) {
  std::mt19937 random(unsigned(emu::options.seed));
  BoxGuard guard(kSmall);
  Answers answers(guard.box);
  Asked asked(kSmall, random, true);
  asked.ids.as<int64_t>()[1] = int64_t(1) << 32;  // not expert 0
  Answers::lane().expect(1, 20 * kSecond);
  check_ok(asked.ring(guard.box));
  check_ok(asked.collect(guard.box));
  CHECK(guard.box.topk_ids[1] == INT32_MIN);
}

TEST(host_functions_instead_of_polling) {
  std::mt19937 random(unsigned(emu::options.seed));
  BoxGuard guard(kSmall);
  Answers answers(guard.box);
  static ey::cuda::Box* box;
  box = &guard.box;
  const auto wake = [](void*) { Answers::lane().expect(1, 20 * kSecond); };
  const auto wait = [](void*) {
    while (__atomic_load_n(&box->words->answered, __ATOMIC_ACQUIRE) != box->words->asked) {
      std::this_thread::yield();
    }
  };
  for (int i = 0; i < 10; ++i) {
    Asked asked(kSmall, random);
    check_ok(asked.ring(guard.box));
    check_ok(i % 2 ? ey::cuda::call_host(guard.box, wake, nullptr, nullptr)
                   : ey::cuda::call_host_aside(guard.box, wake, nullptr, nullptr));
    check_ok(ey::cuda::call_host(guard.box, wait, nullptr, nullptr));
    check_ok(ey::cuda::join_host(guard.box, nullptr));
    check_ok(asked.collect(guard.box, 0));
    CHECK(asked.is_right());
  }
}

TEST(all_memory_is_given_back) {
  const size_t before = emu::machine.allocated.size();
  {
    BoxGuard guard(kSmall);
  }
  CHECK(emu::machine.allocated.size() == before);
  for (int allocations = 0; allocations < 9; ++allocations) {
    emu::machine.allocations_left = allocations;
    ey::cuda::Box box;
    const ey::Status made = ey::cuda::make_box(0, kSmall, &box);
    CHECK(!made.ok);
    testing::check_contains(made.what, "out of memory");
    CHECK(emu::machine.allocated.size() == before);
  }
  emu::machine.allocations_left = -1;
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
