// SPDX-License-Identifier: Apache-2.0
// Which family of kernels a call gets: by its card, by name, by measured borders.
#include "packed_problem.h"

using namespace packed;

TEST(kernels_are_chosen_by_the_card_and_by_name) {
  Shape s;
  s.tokens = 200;
  s.num_experts = 2;
  s.hidden = s.intermediate = 16;
  const auto chosen = [&] { return Problem(s, 1).isa(); };
  CHECK(chosen() == "cuda_grouped");  // not a Hopper
  emu::machine.major = 9;
  emu::machine.minor = 0;
  emu::machine.most_shared_bytes = 227 * 1024;
  CHECK(chosen() == "cuda_wgmma");
  s.packing.zeros = true;
  CHECK(chosen() == "cuda_wgmma");
  s.packing.zeros = false;
  s.format = Format::kFp8;
  for (bool fast : {false, true}) {
    for (int group : {64, 128}) {
      s.packing.group_size = group;
      s.fast = fast;
      CHECK(chosen() == (fast && group == 128 ? "cuda_wgmma_fast" : "cuda_wgmma"));
    }
  }
  s.fast = false;
  s.format = Format::kInt4;
  s.tokens = 60;  // 60 pairs an expert: a narrower tile does
  CHECK(chosen() == "cuda_grouped");
  setenv("EXPERTYARD_CUDA_KERNELS", "cuda_wgmma", 1);
  CHECK(chosen() == "cuda_wgmma");
  emu::machine.major = 8;
  check_contains(Problem(s, 1).run().what, "cuda_wgmma do not serve this call");
  setenv("EXPERTYARD_CUDA_KERNELS", "cuda_fast", 1);
  check_contains(Problem(s, 1).run().what,
                 "no CUDA kernels are called 'cuda_fast'; there are: cuda_rows cuda_tiles "
                 "cuda_stream cuda_grouped cuda_wgmma cuda_wgmma_fast");
  unsetenv("EXPERTYARD_CUDA_KERNELS");
}

TEST(borders_are_those_of_the_table) {
  Shape s;
  s.num_experts = 2;
  s.hidden = s.intermediate = 16;
  emu::machine.major = 9;
  emu::machine.minor = 0;
  emu::machine.most_shared_bytes = 227 * 1024;
  const std::string path = "/tmp/expertyard-crossovers-" + std::to_string(getpid());
  const auto chosen = [&](const char* lines, int tokens) {
    std::FILE* const file = std::fopen(path.c_str(), "w");
    std::fputs(lines, file);
    std::fclose(file);
    setenv("EXPERTYARD_CUDA_CROSSOVERS", path.c_str(), 1);
    s.tokens = tokens;
    return Problem(s, 1).isa();
  };
  const char* const ours =
      "# of a card\n\n90 int4 32 16 16 2 20.5 100 # both\n90 int4 64 16 16 2 1 1\n";
  CHECK(chosen("", 9) == "cuda_grouped");
  CHECK(chosen("", 65) == "cuda_wgmma");
  CHECK(chosen(ours, 20) == "cuda_stream");
  CHECK(chosen(ours, 21) == "cuda_grouped");
  CHECK(chosen(ours, 100) == "cuda_grouped");
  CHECK(chosen(ours, 101) == "cuda_wgmma");
  CHECK(chosen("90 int4 32 16 16 2 0 30", 31) == "cuda_wgmma");  // 0: not measured
  CHECK(chosen("90 int4 32 16 16 2 0 30", 9) == "cuda_grouped");
  CHECK(chosen("80 int4 32 16 16 2 20 30\n90 int8 32 16 16 2 20 30\n90 fp8 32 16 16 2 2 2\n"
               "90 mxfp4 32 16 16 2 2 2\n90 bf16 0 16 16 2 2 2\n",
               20) == "cuda_grouped");  // of other experts
  const auto refused = [&](const char* part) {
    ey::ExpertSet set{};
    set.layout = ey::Layout::kBlocks;
    set.num_experts = 1;
    const ey::ExpertPointers nothing{};
    check_contains(ey::cuda::make_table(0, &nothing, &set).what, part);
  };
  std::FILE* const file = std::fopen(path.c_str(), "w");
  std::fputs("90 int4 32 16 16 2 20.5 100\n90 int4 32 16 16 2 20.5\n", file);
  std::fclose(file);
  refused(":2: expected capability format group_size");
  std::remove(path.c_str());
  refused("cannot be read");
  unsetenv("EXPERTYARD_CUDA_CROSSOVERS");
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
