// SPDX-License-Identifier: Apache-2.0
#include "family.cuh"
#include "grouped.cuh"
#include "grouped_ends.cuh"
#include "limits.cuh"
#include "packed.cuh"

namespace ey::cuda {
namespace {

constexpr int64_t kXRound = 16;           // k of a row of ordered x: whole runs of every order
constexpr int64_t kMostTopK = 1024;       // combine's slots in shared memory
constexpr int kRoutingBytes = 48 * 1024;  // of prepare

int64_t x_stride(const ExpertSet& set) { return round_up(set.hidden_size, kXRound); }
int64_t h_stride(const ExpertSet& set) { return w13_blocks(set.intermediate_size) * kLaneSet; }
int64_t y_stride(const ExpertSet& set) { return w2_blocks(set.hidden_size) * kLanes; }

// One after the other in the workspace, each from a multiple of 256 bytes.
struct Parts {
  int64_t x, h, y, sorted, tile_list, num_tiles, end;
  Parts(const ExpertSet& set, int64_t tokens, int64_t pairs) {
    x = 0;
    h = x + round_up(tokens * x_stride(set) * 2, 256);
    y = h + round_up(pairs * h_stride(set) * 2, 256);
    sorted = y + round_up(pairs * y_stride(set) * 4, 256);
    tile_list = sorted + round_up(pairs * int64_t(sizeof(int32_t)), 256);
    num_tiles = tile_list + round_up(pairs * int64_t(sizeof(Tile)), 256);
    end = num_tiles + 256;
  }
};

bool serves(const MoeArgs& args) {
  const ExpertSet& set = *args.set;
  const PackedFormat* const format = packed_format(set.format);
  if (set.layout != Layout::kBlocks || format == nullptr) return false;
  Matrix m[2];
  return set.num_experts <= kMostRoutedExperts && args.top_k <= kMostTopK &&
         set.hidden_size <= kMostGridY * grouped::kCombineThreads &&
         h_stride(set) <= kMostGridY * kLaneSet * grouped::kWarps && make_matrices(set, *format, m);
}

int64_t workspace_bytes(const MoeArgs& args, int64_t tokens) {
  return Parts(*args.set, tokens, tokens * args.top_k).end;
}

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

// Of a tile. As wide as an expert's mean share of the pairs, if that fits: narrower reads weights
// again, wider multiplies zeros.
int columns_of(const PackedFormat& format, const Matrix (&m)[2], int64_t share, int shared_bytes) {
  int columns = format.most_columns;
  if (share <= grouped::kFewColumns) columns = grouped::kFewColumns;
  while (columns > 8 && (cut_of(format, m[0], columns, shared_bytes).stages == 0 ||
                         cut_of(format, m[1], columns, shared_bytes).stages == 0)) {
    columns /= 2;
  }
  return columns;
}

cudaError_t run(const Chunk& chunk, int64_t tokens, void* workspace, cudaStream_t stream) {
  const ExpertSet& set = chunk.set;
  const PackedFormat& format = *packed_format(set.format);
  const int64_t pairs = tokens * chunk.top_k;
  const Parts parts(set, tokens, pairs);
  char* const bytes = static_cast<char*>(workspace);
  Limits limit{};
  if (cudaError_t e = limits(&limit); e != cudaSuccess) return e;

  Matrix m[2];
  make_matrices(set, format, m);
  const int columns = columns_of(format, m, pairs / (set.num_experts + 1) + 1, limit.shared_bytes);
  const Routing routing{reinterpret_cast<int32_t*>(bytes + parts.num_tiles),
                        reinterpret_cast<Tile*>(bytes + parts.tile_list),
                        reinterpret_cast<int32_t*>(bytes + parts.sorted)};
  auto* const x = reinterpret_cast<uint16_t*>(bytes + parts.x);
  auto* const h = reinterpret_cast<uint16_t*>(bytes + parts.h);
  auto* const y = reinterpret_cast<float*>(bytes + parts.y);
  if (pairs > 0) {
    const int64_t rows = tokens < 4 * limit.multiprocessors ? tokens : 4 * limit.multiprocessors;
    cudaError_t error =
        ptx::launch(grouped::prepare, dim3(unsigned(1 + rows)), dim3(grouped::kPrepareThreads),
                    size_t(set.num_experts) * 3 * sizeof(int), stream, chunk, int32_t(pairs),
                    columns, routing, x, int(tokens), int(x_stride(set)), format.order);
    if (error != cudaSuccess) return error;

    grouped::Args a{};
    a.call = chunk;
    a.routing = routing;
    a.order = format.order;
    a.h = h;
    a.y = y;
    a.h_stride = int(h_stride(set));
    a.y_stride = int(y_stride(set));
    for (const bool down : {false, true}) {
      a.down = down;
      a.matrix = m[down];
      a.tokens = down ? h : x;
      a.token_k = down ? a.h_stride : int(x_stride(set));
      a.pairs_per_row = down ? 1 : int(chunk.top_k);
      const Cut cut = cut_of(format, m[down], columns, limit.shared_bytes);
      if (cut.stages == 0) return cudaErrorInvalidConfiguration;
      a.stages = cut.stages;
      a.stage_bytes = cut.stage_bytes;
      a.tokens_at = cut.tokens_at;
      const dim3 grid(unsigned(most_tiles(pairs, set.num_experts, columns)),
                      unsigned((m[down].num_blocks + grouped::kWarps - 1) / grouped::kWarps));
      error = format.grouped(columns, a, grid, cut.shared_bytes, stream);
      if (error != cudaSuccess) return error;
    }
  }
  const dim3 grid(unsigned(tokens), unsigned((set.hidden_size + grouped::kCombineThreads - 1) /
                                             grouped::kCombineThreads));
  return ptx::launch(grouped::combine, grid, dim3(grouped::kCombineThreads),
                     size_t(chunk.top_k) * 8, stream, chunk, static_cast<const float*>(y),
                     int(y_stride(set)));
}

cudaError_t load() {
  Limits limit{};
  cudaError_t error = limits(&limit);
  for (const PackedFormat* f : kPackedFormats) {
    if (error == cudaSuccess) error = f->load_grouped(limit.shared_bytes);
  }
  if (error == cudaSuccess) error = ptx::allow_shared(grouped::prepare, kRoutingBytes);
  if (error == cudaSuccess) error = ptx::allow_shared(grouped::combine, 0);
  return error;
}

}  // namespace

const Family kGrouped = {"cuda_grouped", serves, workspace_bytes, run, load};

}  // namespace ey::cuda
