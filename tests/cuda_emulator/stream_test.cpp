// SPDX-License-Identifier: Apache-2.0
// The kernels for few tokens, one launch a layer: every format, scale and activation, edge shapes,
// counters from launch to launch.
#include "packed_problem.h"

using namespace packed;

TEST(stream_every_kind_of_packing) {
  for (const Kind& kind : kinds()) {
    for (int hidden : {264, 136}) {
      Shape s = shape_of(kind);
      s.hidden = hidden;
      s.intermediate = hidden == 264 ? 40 : 200;
      Problem p(s, 1);
      CHECK(p.isa() == "cuda_stream");
      run_and_check(s);
    }
  }
}

TEST(stream_every_activation_with_and_without_bias) {
  for (const Kind& kind : formats()) {
    for (Activation activation : testing::kActivations) {
      for (bool bias : {false, true}) {
        Shape s = shape_of(kind);
        s.activation = activation;
        s.bias = bias;
        s.ids_are_int64 = bias;
        s.weights_dtype = bias ? DType::kBF16 : DType::kF32;
        run_and_check(s);
      }
    }
  }
}

TEST(stream_edge_shapes) {
  const int sizes[][2] = {{8, 1}, {8, 40}, {40, 8}, {64, 264}, {1032, 24}, {72, 1304}, {2880, 16}};
  for (const Kind& kind : formats()) {
    for (const auto& [hidden, intermediate] : sizes) {
      Shape s = shape_of(kind);
      s.tokens = 1;
      s.hidden = hidden;
      s.intermediate = intermediate;
      s.nulls = true;
      run_and_check(s);
    }
  }
}

TEST(stream_many_tokens_of_an_expert) {
  for (const Kind& kind : formats()) {
    for (int tokens : {0, 1, 9, 40}) {
      for (int used : {2, 13}) {  // experts; 13: enough pairs an expert for two blocks of columns
        emu::machine.most_shared_bytes = (used == 2 ? 99 : 227) * 1024;
        Shape s = shape_of(kind);
        s.tokens = tokens;
        s.top_k = 3;
        s.num_experts = used == 2 ? 30 : 20;
        s.hidden = 72;
        s.intermediate = 48;
        s.nulls = tokens == 40;
        Problem problem(s, emu::options.seed);
        std::mt19937_64 random(emu::options.seed);
        for (int p = 0; p < tokens * s.top_k; ++p) {
          problem.set_id(size_t(p), int64_t(random() % uint64_t(used)));
        }
        CHECK(tokens == 0 || problem.isa() == "cuda_stream");
        const ey::Status status = problem.run();
        if (!status.ok) testing::fail("%s (%s)", status.what, emu::machine.failure.c_str());
        problem.check();
      }
    }
  }
}

TEST(stream_many_experts) {
  for (int top_k : {1, 8}) {
    Shape s;
    s.tokens = 40;
    s.top_k = top_k;
    s.num_experts = 300;
    s.hidden = 32;
    s.intermediate = 16;
    run_and_check(s);
  }
}

TEST(stream_on_cards_with_much_shared_memory) {
  emu::machine.most_shared_bytes = 227 * 1024;  // more stages
  emu::machine.multiprocessors = 7;
  for (const Kind& kind : formats()) {
    Shape s = shape_of(kind);
    s.hidden = 1304;
    s.intermediate = 264;
    run_and_check(s);
  }
}

TEST(stream_experts_hit_by_everyone_or_by_nobody) {
  for (int id : {0, 3, -1}) {
    Shape s;
    s.tokens = 5;
    Problem problem(s, emu::options.seed);
    for (size_t p = 0; p < size_t(s.tokens * s.top_k); ++p) problem.set_id(p, id);
    CHECK(problem.run().ok);
    problem.check();
  }
}

TEST(stream_launches_leave_the_counters_ready) {
  Shape s;
  s.tokens = 2;
  Problem problem(s, emu::options.seed);
  for (unsigned long long capture : {0, 0, 0, 7, 7, 0}) {
    emu::machine.capture_id = capture;
    CHECK(problem.run(reinterpret_cast<void*>(0x1000)).ok);
    problem.check();
  }
  emu::machine.capture_id = 0;
  for (uintptr_t stream = 0x2000; stream < 0x2000 + 100; ++stream) {  // more than there are sets
    CHECK(problem.run(reinterpret_cast<void*>(stream)).ok);
    if (stream % 10 == 0) problem.check();
  }
  CHECK(problem.run(cudaStreamPerThread).ok);
  problem.check();
}

TEST(stream_the_schedule_does_not_change_a_bit) {
  for (const Kind& kind : formats()) {
    Shape s = shape_of(kind);
    s.tokens = 5;
    s.top_k = 4;
    check_schedules(s, 4);
  }
}

TEST(stream_an_id_out_of_range_makes_its_row_nan_and_is_reported_once) { check_bad_id({}); }

TEST(stream_nan_of_fp8_stays_nan) {
  for (uint8_t code : {uint8_t(0x7f), uint8_t(0xff)}) {
    Shape s;
    s.format = Format::kFp8;
    s.packing = {ScaleType::kFp32, 128, false};
    s.top_k = 1;
    Problem problem(s, emu::options.seed);
    for (int t = 0; t < s.tokens; ++t) problem.set_id(size_t(t), t % 2);
    problem.set_first_code(0, code);
    CHECK(problem.run().ok);
    problem.check({0, 2});  // the tokens of expert 0
  }
}

TEST(stream_random_problems) {
  Dice dice(99);
  const std::vector<Kind> all = kinds();
  for (int i = 0; i < 25; ++i) {
    Shape s = shape_of(dice.of(all));
    s.tokens = dice(1, 20);
    s.top_k = dice(1, 4);
    s.num_experts = dice(1, 12);
    s.hidden = 8 * dice(1, 40);
    s.intermediate = dice(1, 200);
    dice.throw_options(s);
    run_and_check(s);
  }
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
