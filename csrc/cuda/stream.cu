// SPDX-License-Identifier: Apache-2.0
#include "family.cuh"
#include "limits.cuh"
#include "packed.cuh"
#include "stream.cuh"
#include "stream_counters.cuh"

namespace ey::cuda {
namespace {

// Of a row of h: what the blocks of w13 make.
int64_t h_values(const ExpertSet& set) {
  const bool gated = has_gate(set.activation);
  return w13_blocks(set.intermediate_size, gated) * w13_rows(gated);
}

// One after the other in the workspace, each from a multiple of 256 bytes.
struct Parts {
  int64_t h, y, counters, end;
  Parts(const ExpertSet& set, int64_t pairs) {
    h = 0;
    y = h + round_up(pairs * h_values(set) * 2, 256);
    counters = y + round_up(pairs * set.hidden_size * 4, 256);
    end = counters + round_up(sizeof(stream::Counters), 256);
  }
};

// How a launch is cut. columns = 0: it does not fit.
struct Cut {
  int blocks, columns, most_tiles, heads_bytes, stage_bytes, stages, shared_bytes;
};

Cut cut_of(const ExpertSet& set, const PackedFormat& format, const Matrix (&m)[2], int64_t tokens,
           int64_t top_k, int shared_bytes) {
  Cut c;
  const int pairs = int(tokens * top_k), experts = int(set.num_experts);
  c.heads_bytes = heads_bytes(m[0]) > heads_bytes(m[1]) ? heads_bytes(m[0]) : heads_bytes(m[1]);
  // A second block of columns where experts would often need it, else it multiplies zeros. An
  // expert has a token once, as a rule; where it has one twice, there are more tiles.
  const int most_columns = tokens > 8 && pairs > 4 * experts ? 16 : 8;
  c.columns = tokens < most_columns ? int(tokens) : most_columns;
  for (; c.columns > 0; c.columns /= 2) {  // as many as leave room for two stages
    c.blocks = c.columns > 8 ? 2 : 1;
    const int tiles = experts + pairs / c.columns;
    c.most_tiles = pairs < tiles ? pairs : tiles;
    c.stage_bytes = c.heads_bytes + format.chunk_bytes + c.columns * format.token_bytes;
    const int fixed = stream::ring_at(c.most_tiles, pairs, c.blocks);
    c.stages = (shared_bytes - fixed) / (stream::kWarps * c.stage_bytes);
    if (c.stages > stream::kMostStages) c.stages = stream::kMostStages;
    const int ring = stream::kWarps * c.stages * c.stage_bytes;
    c.shared_bytes = fixed + ring;
    if (c.stages >= 2 && ring >= stream::sorting_bytes(experts, pairs)) return c;
  }
  return c;
}

// Every card that these kernels run on gives a block that much. Whether a call is served must not
// depend on the card: the current device may not yet be the one that will run it.
constexpr int kLeastShared = 99 * 1024;

bool serves(const MoeArgs& args) {
  const ExpertSet& set = *args.set;
  const PackedFormat* const format = packed_format(set.format);
  if (set.layout != Layout::kBlocks || format == nullptr) return false;
  if (args.hidden_dtype != DType::kBF16 || set.hidden_size % 8 != 0 ||
      reinterpret_cast<uintptr_t>(args.hidden_states) % 16 != 0) {
    return false;
  }
  if (args.top_k == 0 || args.num_tokens * args.top_k > stream::kMostPairs ||
      set.num_experts > stream::kMostExperts ||
      w2_blocks(set.hidden_size) > stream::kMostRowBlocks) {
    return false;
  }
  Matrix m[2];
  return make_matrices(set, *format, m) &&
         cut_of(set, *format, m, args.num_tokens, args.top_k, kLeastShared).columns > 0;
}

int64_t workspace_bytes(const MoeArgs& args, int64_t tokens) {
  return Parts(*args.set, tokens * args.top_k).end;
}

cudaError_t run(const Chunk& chunk, int64_t tokens, void* workspace, cudaStream_t stream) {
  const ExpertSet& set = chunk.set;
  const PackedFormat& format = *packed_format(set.format);
  const Parts parts(set, tokens * chunk.top_k);
  char* const bytes = static_cast<char*>(workspace);
  Limits limit{};
  if (cudaError_t e = limits(&limit); e != cudaSuccess) return e;

  stream::Args a{};
  make_matrices(set, format, a.matrices);
  const Cut cut = cut_of(set, format, a.matrices, tokens, chunk.top_k, limit.shared_bytes);
  a.call = chunk;
  a.x = chunk.hidden_states;
  a.h = reinterpret_cast<uint16_t*>(bytes + parts.h);
  a.y = reinterpret_cast<float*>(bytes + parts.y);
  a.h_stride = int(h_values(set));
  a.pairs = int(tokens * chunk.top_k);
  a.tokens = int(tokens);
  a.most_tiles = cut.most_tiles;
  a.columns = cut.columns;
  a.stages = cut.stages;
  a.stage_bytes = cut.stage_bytes;
  a.tokens_at = cut.heads_bytes + format.chunk_bytes;
  if (cudaError_t e = stream::counters_of(stream, &a.counters); e != cudaSuccess) return e;
  if (a.counters == nullptr) {
    a.counters = reinterpret_cast<stream::Counters*>(bytes + parts.counters);
    const cudaError_t e = cudaMemsetAsync(a.counters, 0, sizeof(stream::Counters), stream);
    if (e != cudaSuccess) return e;
  }
  const int64_t items =
      int64_t(cut.most_tiles) * (a.matrices[0].num_blocks + a.matrices[1].num_blocks);
  const unsigned grid = unsigned(items < limit.multiprocessors ? items : limit.multiprocessors);
  return format.stream(cut.blocks, a, grid, cut.shared_bytes, stream);
}

cudaError_t load() {
  Limits limit{};
  cudaError_t error = limits(&limit);
  for (const PackedFormat* f : kPackedFormats) {
    if (error == cudaSuccess) error = f->load_stream(limit.shared_bytes);
  }
  return error;
}

}  // namespace

const Family kStream = {"cuda_stream", serves, workspace_bytes, run, load};

}  // namespace ey::cuda
