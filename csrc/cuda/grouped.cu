// SPDX-License-Identifier: Apache-2.0
#include "family.cuh"
#include "grouped_run.cuh"

namespace ey::cuda {
namespace {

// How the products of one matrix are cut. stages = 0: they do not fit.
struct Cut {
  int tokens_at, stage_bytes, stages, shared_bytes;
};

Cut cut_of(const PackedFormat& format, const Matrix& m, int columns, int shared_bytes) {
  Cut c;
  c.tokens_at = grouped::kWarps * (heads_bytes(m) + format.chunk_bytes);
  c.stage_bytes = c.tokens_at + columns * format.token_bytes;
  const int pairs_bytes = columns * int(sizeof(int));
  c.stages = (shared_bytes - pairs_bytes) / c.stage_bytes;
  if (c.stages > 8) c.stages = 8;
  if (c.stages < 2) c.stages = 0;
  c.shared_bytes = c.stages * c.stage_bytes + pairs_bytes;
  return c;
}

// As wide as an expert's mean share of the pairs, if that fits: narrower reads weights again, wider
// multiplies zeros.
int columns_of(const PackedFormat& format, const Matrix (&m)[2], int64_t share,
               const Limits& limit) {
  int columns = format.most_columns;
  if (share <= grouped::kFewColumns) columns = grouped::kFewColumns;
  while (columns > 8 && (cut_of(format, m[0], columns, limit.shared_bytes).stages == 0 ||
                         cut_of(format, m[1], columns, limit.shared_bytes).stages == 0)) {
    columns /= 2;
  }
  return columns;
}

int order_of(const PackedFormat& format) { return format.order; }

cudaError_t launch(const PackedFormat& format, grouped::Args& a, int columns, int64_t pairs,
                   const Limits& limit, cudaStream_t stream) {
  const Cut cut = cut_of(format, a.matrix, columns, limit.shared_bytes);
  if (cut.stages == 0) return cudaErrorInvalidConfiguration;
  a.stages = cut.stages;
  a.stage_bytes = cut.stage_bytes;
  a.tokens_at = cut.tokens_at;
  const dim3 grid(unsigned(most_tiles(pairs, a.call.set.num_experts, columns)),
                  unsigned((a.matrix.num_blocks + grouped::kWarps - 1) / grouped::kWarps));
  return format.grouped(columns, a, grid, cut.shared_bytes, stream);
}

constexpr grouped::Products kProducts = {
    16,         16,       2,     grouped::own_matrices, grouped::no_floats, grouped::prepare_bf16,
    columns_of, order_of, launch};

bool serves(const MoeArgs& args) {
  Matrix m[2];
  return grouped::ends_serve(kProducts, args, m) && m[0].num_blocks <= kMostGridY * grouped::kWarps;
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
  for (const PackedFormat* f : kPackedFormats) {
    if (error == cudaSuccess) error = f->load_grouped(limit.shared_bytes);
  }
  return error != cudaSuccess ? error : grouped::load_ends();
}

}  // namespace

const Family kGrouped = {"cuda_grouped", serves, workspace_bytes, run, load};

}  // namespace ey::cuda
