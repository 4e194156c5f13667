// SPDX-License-Identifier: Apache-2.0
// The family of hopper_fast.cuh: which calls, how shared memory is cut.
#include "family.cuh"
#include "hopper_fast_launch.cuh"

namespace ey::cuda {
namespace {

using F = Fp8FastBlocks;

constexpr int kCapability = 90;
constexpr int kSharedBytes = 227 * 1024;  // that every card of that capability gives a block
constexpr int kAlignment = 1024;          // of a stage
constexpr int kMostStages = 8;

int stage_bytes(const Matrix& m) {
  return int(round_up(hopper::Stage<F>::kTokenBytes + hopper::Stage<F>::kFloatBytes +
                          hopper::kBlocks * (ChunkShape<F>::kQuadBytes + heads_bytes(m)),
                      kAlignment));
}

int stages_of(int stage_bytes) {
  const int stages =
      (kSharedBytes - hopper::kMostBytes) / (stage_bytes + 2 * int(sizeof(uint64_t)));
  return stages < kMostStages ? stages : kMostStages;
}

bool matrices_of(const ExpertSet& set, Matrix (&m)[2]) {
  return matrix_of<F>(set, set.hidden_size, w13_blocks(set.intermediate_size, true), &m[0]) &&
         matrix_of<F>(set, set.intermediate_size, w2_blocks(set.hidden_size), &m[1]);
}
int64_t floats_of(const ExpertSet&, int64_t stride) { return stride / hopper::kGroup; }
int columns_of(const PackedFormat&, const Matrix (&)[2], int64_t, const Limits&) {
  return hopper::kColumns;
}
int order_of(const PackedFormat&) { return 0; }  // as they come

cudaError_t launch(const PackedFormat&, grouped::Args& a, int columns, int64_t pairs,
                   const Limits& limit, cudaStream_t stream) {
  a.stage_bytes = stage_bytes(a.matrix);
  a.stages = stages_of(a.stage_bytes);
  const int shared_bytes =
      a.stages * (a.stage_bytes + 2 * int(sizeof(uint64_t))) + hopper::kMostBytes;
  const int64_t items = most_tiles(pairs, a.call.set.num_experts, columns) *
                        ((a.matrix.num_blocks + hopper::kBlocks - 1) / hopper::kBlocks);
  const unsigned grid = unsigned(items < limit.multiprocessors ? items : limit.multiprocessors);
  return hopper::launch_fast(a, grid, int(round_up(shared_bytes, kAlignment)), stream);
}

constexpr grouped::Products kProducts = {
    hopper::kGroup, hopper::kGroup, 1,     matrices_of, floats_of, hopper::launch_prepare_e4m3,
    columns_of,     order_of,       launch};

// Groups of weights that are shorter than those of activations would be added up too late. Without
// a gate, a warp's rows of h are not those that share a scale here.
bool serves(const MoeArgs& args) {
  const ExpertSet& set = *args.set;
  const int64_t group = set.packing.group_size;
  Matrix m[2];
  return set.mode == Mode::kFast && set.format == Format::kFp8 && set.capability == kCapability &&
         has_gate(set.activation) && (group == 0 || group % hopper::kGroup == 0) &&
         grouped::ends_serve(kProducts, args, m) && stages_of(stage_bytes(m[0])) >= 2 &&
         stages_of(stage_bytes(m[1])) >= 2;
}

int64_t workspace_bytes(const MoeArgs& args, int64_t tokens) {
  return grouped::Parts(kProducts, *args.set, tokens, tokens * args.top_k).end;
}

cudaError_t run(const Chunk& chunk, int64_t tokens, void* workspace, cudaStream_t stream) {
  return grouped::run_grouped(kProducts, chunk, tokens, workspace, stream);
}

cudaError_t load() {
  Limits limit{};
  const cudaError_t error = limits(&limit);
  if (error != cudaSuccess || limit.capability != kCapability) return error;
  return hopper::load_fast(kSharedBytes);
}

}  // namespace

const Family kWgmmaFast = {"cuda_wgmma_fast", serves, workspace_bytes, run, load};

}  // namespace ey::cuda
