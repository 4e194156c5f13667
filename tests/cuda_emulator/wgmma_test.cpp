// SPDX-License-Identifier: Apache-2.0
// Those of Hopper: the ring of stages, tiles and items, every format, edge shapes.
#include "packed_problem.h"

using namespace packed;

TEST(wgmma_every_kind_of_packing) {
  const OnHopper hopper;
  check_every_kind("cuda_wgmma");
}

TEST(wgmma_rows_longer_than_the_ring) {
  const OnHopper hopper;
  for (const Kind& kind : formats()) {
    Shape s = shape_of(kind);
    s.tokens = 3;
    s.top_k = 1;
    s.num_experts = 1;
    s.hidden = 1400;  // of bf16 22 chunks, of 4 bits 11: every stage of the ring twice and more
    s.intermediate = 24;
    s.sentinels = false;
    run_and_check(s);
  }
}

TEST(wgmma_every_type_and_activation) {
  const OnHopper hopper;
  check_every_type("cuda_wgmma");
}

TEST(wgmma_every_activation) {
  const OnHopper hopper;
  for (Activation activation : testing::kActivations) {
    for (int intermediate : {24, 300}) {  // without a gate: a row of h ends inside a block, or not
      Shape s;
      s.tokens = 9;
      s.num_experts = 2;
      s.hidden = 72;
      s.intermediate = intermediate;
      s.activation = activation;
      s.bias = true;
      run_and_check(s);
    }
  }
}

TEST(wgmma_tiles_and_items) {
  const OnHopper hopper;
  for (const Kind& kind : formats()) {
    for (int tokens : {0, 1, 127, 129, 300}) {
      Shape s = shape_of(kind);
      s.tokens = tokens;
      s.top_k = 1;
      s.num_experts = tokens == 300 ? 3 : 1;
      s.hidden = 72;
      s.intermediate = tokens == 127 ? 300 : 24;  // more than one row of blocks
      s.nulls = tokens == 300;
      run_and_check(s);
    }
  }
}

TEST(wgmma_edge_shapes) {
  const OnHopper hopper;
  check_edge_shapes();
}

TEST(wgmma_the_schedule_does_not_change_a_bit) {
  const OnHopper hopper;
  for (const Kind& kind : formats()) {
    Shape s = shape_of(kind);
    s.tokens = 12;
    s.num_experts = 2;
    check_schedules(s, 1);
  }
}

TEST(wgmma_an_id_out_of_range_makes_its_row_nan_and_is_reported_once) {
  const OnHopper hopper;
  Shape s;
  s.hidden_dtype = DType::kF16;
  check_bad_id(s);
}

TEST(wgmma_random_problems) {
  const OnHopper hopper;
  Dice dice(97);
  const std::vector<Kind> all = kinds();
  for (int i = 0; i < 12; ++i) {
    Shape s = shape_of(dice.of(all));
    s.tokens = dice(1, 90);
    s.top_k = dice(1, 4);
    s.num_experts = dice(1, 5);
    s.hidden = dice(1, 600);
    s.intermediate = dice(1, 200);
    s.hidden_dtype = DType(dice(0, 2));
    dice.throw_options(s);
    run_and_check(s);
  }
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
