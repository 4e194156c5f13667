// SPDX-License-Identifier: Apache-2.0
#include "family.cuh"
#include "grouped_run.cuh"
#include "hopper_format.cuh"

namespace ey::cuda {
namespace {

using hopper::HopperFormat;

constexpr int kCapability = 90;           // the only one with these instructions
constexpr int kSharedBytes = 227 * 1024;  // that every card of that capability gives a block
constexpr int kMostStages = 8;
constexpr int kAlignment = 1024;  // of a stage: wgmma's swizzle counts address bits

const HopperFormat* const kFormats[] = {&hopper::kHopperBf16,  &hopper::kHopperInt8,
                                        &hopper::kHopperFp8,   &hopper::kHopperInt4,
                                        &hopper::kHopperMxfp4, &hopper::kHopperInt4Zeros};

const HopperFormat& hopper_format(const ExpertSet& set) {
  int i = 0;
  while (kFormats[i]->format != set.format || kFormats[i]->zeros != set.packing.zeros) ++i;
  return *kFormats[i];
}

int stage_bytes(const HopperFormat& format, const Matrix& m) {
  return int(round_up(format.stage_bytes + hopper::kBlocks * heads_bytes(m), kAlignment));
}

// As many as fit beside their barriers, two each.
int stages_of(int stage_bytes) {
  const int stages = kSharedBytes / (stage_bytes + 2 * int(sizeof(uint64_t)));
  return stages < kMostStages ? stages : kMostStages;
}

int columns_of(const PackedFormat&, const Matrix (&)[2], int64_t, const Limits&) {
  return hopper::kColumns;
}

int order_of(const PackedFormat& format) { return kWgmmaOrder + step_k(format.format); }

cudaError_t launch(const PackedFormat&, grouped::Args& a, int columns, int64_t pairs,
                   const Limits& limit, cudaStream_t stream) {
  const HopperFormat& f = hopper_format(a.call.set);
  a.stage_bytes = stage_bytes(f, a.matrix);
  a.stages = stages_of(a.stage_bytes);
  const int shared_bytes =
      int(round_up(a.stages * (a.stage_bytes + 2 * int(sizeof(uint64_t))), kAlignment));
  const int64_t items = most_tiles(pairs, a.call.set.num_experts, columns) *
                        ((a.matrix.num_blocks + hopper::kBlocks - 1) / hopper::kBlocks);
  const unsigned grid = unsigned(items < limit.multiprocessors ? items : limit.multiprocessors);
  return f.launch(a, grid, shared_bytes, stream);
}

// With zeros, sums of tokens, for all 128 k of a chunk.
int64_t floats_of(const ExpertSet& set, int64_t stride) {
  return set.packing.zeros ? round_up((stride + grouped::kPartK - 1) / grouped::kPartK, 4) : 0;
}

constexpr grouped::Products kProducts = {
    kLongestRun, kLongestRun, 2,     grouped::own_matrices, floats_of, grouped::prepare_bf16,
    columns_of,  order_of,    launch};

bool serves(const MoeArgs& args) {
  Matrix m[2];
  if (args.set->capability != kCapability || !grouped::ends_serve(kProducts, args, m)) return false;
  const HopperFormat& f = hopper_format(*args.set);
  return stages_of(stage_bytes(f, m[0])) >= 2 && stages_of(stage_bytes(f, m[1])) >= 2;
}

int64_t workspace_bytes(const MoeArgs& args, int64_t tokens) {
  return grouped::Parts(kProducts, *args.set, tokens, tokens * args.top_k).end;
}

cudaError_t run(const Chunk& chunk, int64_t tokens, void* workspace, cudaStream_t stream) {
  return grouped::run_grouped(kProducts, chunk, tokens, workspace, stream);
}

cudaError_t load() {
  Limits limit{};
  cudaError_t error = limits(&limit);
  if (error != cudaSuccess || limit.capability != kCapability) return error;
  for (const HopperFormat* f : kFormats) {
    if (error == cudaSuccess) error = f->load(kSharedBytes);
  }
  return error;
}

}  // namespace

const Family kWgmma = {"cuda_wgmma", serves, workspace_bytes, run, load};

}  // namespace ey::cuda
