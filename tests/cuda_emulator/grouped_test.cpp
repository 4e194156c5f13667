// SPDX-License-Identifier: Apache-2.0
// The kernels for many tokens with mma.sync: tiles of every width, every format, edge shapes.
#include "packed_problem.h"

using namespace packed;

TEST(grouped_every_kind_of_packing) { check_every_kind("cuda_grouped"); }

TEST(grouped_every_type_and_activation) { check_every_type("cuda_grouped"); }

TEST(grouped_every_activation) {
  for (Activation activation : testing::kActivations) {
    Shape s;
    s.tokens = 9;
    s.num_experts = 2;
    s.hidden_dtype = DType::kF32;
    s.hidden = 72;
    s.intermediate = 300;
    s.activation = activation;
    s.bias = true;
    run_and_check(s);
  }
}

TEST(grouped_tiles_of_every_width) {
  emu::machine.most_shared_bytes = 227 * 1024;
  for (const Kind& kind : formats()) {
    for (int tokens : {0, 1, 9, 17, 70, 150}) {
      for (int shared : {99, 227}) {
        emu::machine.most_shared_bytes = shared * 1024;
        Shape s = shape_of(kind);
        s.tokens = tokens;
        s.top_k = 1;
        s.num_experts = tokens == 70 ? 3 : 1;
        s.hidden_dtype = tokens > 9 ? DType::kBF16 : DType::kF32;
        s.hidden = 72;
        s.intermediate = tokens == 9 ? 300 : 24;  // more than one row of blocks
        s.nulls = tokens == 70;
        run_and_check(s);
      }
    }
  }
}

TEST(grouped_many_experts) {
  Shape s;
  s.tokens = 300;
  s.top_k = 4;
  s.num_experts = 600;
  s.hidden = 8;
  s.intermediate = 8;
  s.nulls = true;
  CHECK(Problem(s, 1).isa() == "cuda_grouped");
  run_and_check(s);
}

TEST(grouped_edge_shapes) { check_edge_shapes(); }

TEST(grouped_groups_and_formats_that_no_kernel_serves_are_refused) {
  for (int group : {8, 48}) {  // shorter than a quad; no part of a chunk
    Shape s;
    s.format = Format::kInt8;
    s.packing.group_size = group;
    check_contains(Problem(s, 1).run().what, "no CUDA kernel serves");
  }
  Problem plain(Shape{}, 1);
  plain.set.format = Format::kFp32;
  check_contains(plain.run().what, "no CUDA kernel serves");
}

TEST(grouped_no_choice_at_all_gives_zeros) {
  Shape s;
  s.top_k = 0;
  run_and_check(s);
}

TEST(grouped_the_schedule_does_not_change_a_bit) {
  for (const Kind& kind : formats()) {
    Shape s = shape_of(kind);
    s.tokens = 12;
    s.num_experts = 2;
    check_schedules(s, 4);
  }
}

TEST(grouped_an_id_out_of_range_makes_its_row_nan_and_is_reported_once) {
  Shape s;
  s.hidden_dtype = DType::kF16;
  check_bad_id(s);
}

TEST(grouped_random_problems) {
  Dice dice(98);
  const std::vector<Kind> all = kinds();
  for (int i = 0; i < 20; ++i) {
    Shape s = shape_of(dice.of(all));
    s.tokens = dice(1, 90);
    s.top_k = dice(1, 4);
    s.num_experts = dice(1, 5);
    s.hidden = dice(1, 200);
    s.intermediate = dice(1, 200);
    s.hidden_dtype = DType(dice(0, 2));
    dice.throw_options(s);
    run_and_check(s);
  }
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
