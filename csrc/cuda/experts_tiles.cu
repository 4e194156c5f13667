// SPDX-License-Identifier: Apache-2.0
#include "experts_tiles.cuh"
#include "family.cuh"

namespace ey::cuda {
namespace {

bool serves(const MoeArgs& args) {
  const ExpertSet& set = *args.set;
  return set.format == Format::kBf16 && args.hidden_dtype == DType::kBF16 && set.rows_are_aligned &&
         set.hidden_size % 8 == 0 && set.intermediate_size % 8 == 0 && set.intermediate_size > 0 &&
         args.top_k > 0 && set.num_experts <= kMostRoutedExperts &&
         reinterpret_cast<uintptr_t>(args.hidden_states) % 16 == 0 &&
         set.hidden_size <= kMostGridY * tiles::kCombineThreads &&
         set.intermediate_size <= kMostGridY * 16 * tiles::kWarps;
}

// One after the other in the workspace, each from a multiple of 256 bytes.
struct Parts {
  int64_t h, y, sorted, tile_list, num_tiles, end;
  Parts(const ExpertSet& set, int64_t pairs) {
    h = 0;
    y = h + round_up(pairs * set.intermediate_size * int64_t(sizeof(uint16_t)), 256);
    sorted = y + round_up(pairs * set.hidden_size * int64_t(sizeof(float)), 256);
    tile_list = sorted + round_up(pairs * int64_t(sizeof(int32_t)), 256);
    num_tiles = tile_list + round_up(pairs * int64_t(sizeof(Tile)), 256);
    end = num_tiles + 256;
  }
};

int64_t workspace_bytes(const MoeArgs& args, int64_t tokens) {
  return Parts(*args.set, tokens * args.top_k).end;
}

template <int kBlocks>
cudaError_t run_blocks(const Chunk& chunk, int64_t tokens, char* workspace, cudaStream_t stream) {
  const int64_t pairs = tokens * chunk.top_k, experts = chunk.set.num_experts;
  const Parts parts(chunk.set, pairs);
  auto* const h = reinterpret_cast<uint16_t*>(workspace + parts.h);
  auto* const y = reinterpret_cast<float*>(workspace + parts.y);
  const Routing routing{reinterpret_cast<int32_t*>(workspace + parts.num_tiles),
                        reinterpret_cast<Tile*>(workspace + parts.tile_list),
                        reinterpret_cast<int32_t*>(workspace + parts.sorted)};

  constexpr int kPairs = tiles::Shape<kBlocks>::kPairs,
                kShared = tiles::Shape<kBlocks>::kSharedBytes;
  cudaError_t error = ptx::launch(tiles::route, dim3(1), dim3(tiles::kRouteThreads),
                                  size_t(experts) * 3 * sizeof(int), stream, chunk, int32_t(pairs),
                                  kPairs, routing);
  if (error != cudaSuccess) return error;

  // As many tiles as there can be; blocks beyond those that there are leave at once.
  const unsigned most = unsigned(most_tiles(pairs, experts, kPairs));
  const auto blocks = [](int64_t rows, int64_t a_block) {
    return unsigned((rows + a_block - 1) / a_block);
  };
  const dim3 threads(tiles::kThreads);
  const dim3 gate_up_grid(most, blocks(chunk.set.intermediate_size, 16 * tiles::kWarps));
  error = ptx::launch(tiles::gate_up_tiles<kBlocks>, gate_up_grid, threads, kShared, stream, chunk,
                      routing, h);
  if (error != cudaSuccess) return error;
  const dim3 down_grid(most, blocks(chunk.set.hidden_size, 32 * tiles::kWarps));
  error = ptx::launch(tiles::down_tiles<kBlocks>, down_grid, threads, kShared, stream, chunk,
                      routing, h, y);
  if (error != cudaSuccess) return error;
  const dim3 combine_grid(unsigned(tokens), blocks(chunk.set.hidden_size, tiles::kCombineThreads));
  return ptx::launch(tiles::combine, combine_grid, dim3(tiles::kCombineThreads), 0, stream, chunk,
                     y);
}

cudaError_t run(const Chunk& chunk, int64_t tokens, void* workspace, cudaStream_t stream) {
  char* const bytes = static_cast<char*>(workspace);
  // As wide as an expert's mean share of the pairs: narrower reads weights again, wider multiplies
  // zeros.
  const int64_t share = tokens * chunk.top_k / (chunk.set.num_experts + 1) + 1;
  if (share <= 8) return run_blocks<1>(chunk, tokens, bytes, stream);
  if (share <= 16) return run_blocks<2>(chunk, tokens, bytes, stream);
  if (share <= 32) return run_blocks<4>(chunk, tokens, bytes, stream);
  return run_blocks<8>(chunk, tokens, bytes, stream);
}

template <int kBlocks>
cudaError_t load_blocks() {
  constexpr int kShared = tiles::Shape<kBlocks>::kSharedBytes;
  const cudaError_t error = ptx::allow_shared(tiles::gate_up_tiles<kBlocks>, kShared);
  return error != cudaSuccess ? error : ptx::allow_shared(tiles::down_tiles<kBlocks>, kShared);
}

cudaError_t load() {
  cudaError_t error = load_blocks<1>();
  if (error == cudaSuccess) error = load_blocks<2>();
  if (error == cudaSuccess) error = load_blocks<4>();
  if (error == cudaSuccess) error = load_blocks<8>();
  if (error == cudaSuccess) error = ptx::allow_shared(tiles::route, 48 * 1024);
  if (error == cudaSuccess) error = ptx::allow_shared(tiles::combine, 0);
  return error;
}

}  // namespace

const Family kTiles = {"cuda_tiles", serves, workspace_bytes, run, load};

}  // namespace ey::cuda
