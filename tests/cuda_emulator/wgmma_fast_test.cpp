// SPDX-License-Identifier: Apache-2.0
// Those of Hopper for e4m3 weights and activations: scales of both, warps that wait for each other.
#include "packed_problem.h"

using namespace packed;

// Every way in which fp8 weights that meet e4m3 may be packed.
static std::vector<Packing> fast_packings() {
  return {{ScaleType::kFp32, 128, false},
          {ScaleType::kBf16, 128, false},
          {ScaleType::kFp32, 0, false},
          {ScaleType::kFp16, 256, false}};
}
static Shape fast_shape(const Packing& packing) {
  Shape s;
  s.format = Format::kFp8;
  s.packing = packing;
  s.fast = true;
  setenv("EXPERTYARD_CUDA_KERNELS", "cuda_wgmma_fast", 1);
  return s;
}

TEST(fast_every_packing_and_shape) {
  const OnHopper hopper;
  const int sizes[][2] = {{264, 150}, {133, 200}, {1, 1}, {3, 300}, {1400, 24}, {128, 128}};
  for (const Packing& packing : fast_packings()) {
    for (const auto& [hidden, intermediate] : sizes) {
      Shape s = fast_shape(packing);
      s.tokens = hidden == 264 ? 130 : 5;  // more than one tile
      s.top_k = hidden == 264 ? 1 : 2;
      s.num_experts = hidden == 264 ? 1 : 2;
      s.hidden = hidden;
      s.intermediate = intermediate;
      CHECK(Problem(s, 1).isa() == "cuda_wgmma_fast");
      run_and_check(s);
    }
  }
}

TEST(fast_every_type_and_activation) {
  const OnHopper hopper;
  check_types_of(fast_shape({ScaleType::kFp32, 128, false}), "cuda_wgmma_fast", true);
}

TEST(fast_rows_and_items_longer_than_the_ring) {
  const OnHopper hopper;
  Shape s = fast_shape({ScaleType::kFp32, 128, false});
  s.tokens = 3;
  s.num_experts = 1;
  s.hidden = 1800;
  s.intermediate = 700;  // 6 items of w13 for two multiprocessors: the largest values take turns
  s.sentinels = false;
  run_and_check(s);
}

// Warps that wait for each other at a barrier of their own must do so even where one lags behind:
// a block's items are of one token each, now a large one, now a small one.
TEST(fast_a_slow_warp_is_waited_for) {
  const OnHopper hopper;
  emu::machine.multiprocessors = 1;
  const emu::Options usual = emu::options;
  emu::options.slow_warp_one_in = 64;
  emu::options.most_polls_without_change = 40'000'000;
  for (uint64_t other = 0; other < 6; ++other) {  // another warp is the slow one
    emu::options.seed = usual.seed + other;
    Shape s = fast_shape({ScaleType::kFp32, 128, false});
    s.tokens = s.num_experts = 8;
    s.top_k = 1;
    s.hidden = 100;
    s.intermediate = 128;
    Problem problem(s, emu::options.seed);
    for (int t = 0; t < s.tokens; ++t) {
      problem.set_id(size_t(t), t);
      if (t % 2) problem.multiply_token(size_t(t), 100.0f);
    }
    CHECK(problem.run().ok);
    problem.check();
  }
  emu::options = usual;
}

TEST(fast_the_schedule_does_not_change_a_bit) {
  const OnHopper hopper;
  Shape s = fast_shape({ScaleType::kFp32, 128, false});
  s.tokens = 12;
  s.num_experts = 2;
  s.intermediate = 300;
  check_schedules(s, 1);
}

TEST(fast_an_id_out_of_range_makes_its_row_nan_and_is_reported_once) {
  const OnHopper hopper;
  check_bad_id(fast_shape({ScaleType::kFp32, 128, false}));
}

TEST(fast_nan_and_zeros_stay_what_they_are) {
  const OnHopper hopper;
  Shape s = fast_shape({ScaleType::kFp32, 128, false});
  s.top_k = 1;
  s.sentinels = false;
  Problem problem(s, emu::options.seed);
  for (int t = 0; t < s.tokens; ++t) problem.set_id(size_t(t), t % 2);
  problem.set_first_code(0, 0x7f);
  CHECK(problem.run().ok);
  problem.check({0, 2});  // the tokens of expert 0
  Problem nothing(s, emu::options.seed);
  nothing.set_hidden_states(0.0);
  CHECK(nothing.run().ok);
  nothing.check();
  nothing.set_hidden_states(NAN);
  CHECK(nothing.run().ok);
  nothing.check({0, 1, 2});
}

TEST(fast_random_problems) {
  const OnHopper hopper;
  Dice dice(96);
  const std::vector<Packing> all = fast_packings();
  for (int i = 0; i < 8; ++i) {
    Shape s = fast_shape(dice.of(all));
    s.tokens = dice(1, 60);
    s.top_k = dice(1, 4);
    s.num_experts = dice(1, 5);
    s.hidden = dice(1, 600);
    s.intermediate = dice(1, 300);
    s.hidden_dtype = DType(dice(0, 2));
    dice.throw_options(s);
    run_and_check(s);
  }
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
