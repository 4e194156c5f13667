// SPDX-License-Identifier: Apache-2.0
// A layer of packed weights that is no expert: the schedule of linear.h, for all formats and
// instruction sets. Not for experts: nothing is routed, gated or weighted.
//
//   load     input -> activation rows            by token
//   -------- when all are loaded
//   multiply out[:, 32 columns]                  by block of 32 weight rows
//
// A block has one owner: the same bits for any number of threads.
#include "linear.h"

#include <algorithm>

#include "arena.h"
#include "threads.h"

namespace ey::cpu {
namespace {

constexpr int64_t kTileTokens = 192;  // as in experts.cpp: a tile of 24 KB
constexpr int64_t kPassBytes =
    64 << 20;  // bound on activation rows; more tokens are done in passes
constexpr int64_t kMinPassTokens = 64;
constexpr int64_t kBytesOfThread = 1 << 20, kFlopsOfThread = 5'000'000;  // as in experts.cpp

struct Pass {
  const Kernel& kernel;
  const LinearArgs& args;
  RowShape shape;
  int64_t stride;  // bytes between activation rows
  int64_t block_bytes, blocks;
  int64_t begin, tokens;  // of the call's
  char* rows;
  const void** x;  // [tokens] of them
  char* scratch;   // per thread: tile, panel
  int64_t scratch_bytes;
  Tasks load_tasks, block_tasks;
};

void load(Pass& p, int64_t part, int parts) {
  const int64_t from_stride = p.args.in_features * size_of(p.args.dtype);
  const auto* from = static_cast<const char*>(p.args.input) + p.begin * from_stride;
  const auto tokens = share_of(p.tokens, part, parts);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    p.x[t] = p.rows + t * p.stride;
    p.kernel.load_row({.from = from + t * from_stride,
                       .dtype = p.args.dtype,
                       .shape = p.shape,
                       .row = p.rows + t * p.stride});
  }
}

void multiply(Pass& p, int64_t block, int64_t after, bool first, int thread) {
  auto* tile = reinterpret_cast<float*>(p.scratch + thread * p.scratch_bytes);
  const auto* weight = static_cast<const char*>(p.args.weight);
  const int64_t size = size_of(p.args.dtype);
  const int64_t column = block * kBlockRows;
  const int64_t columns = std::min<int64_t>(kBlockRows, p.args.out_features - column);
  Weights w{};
  w.k = p.args.in_features;
  w.packing = p.args.packing;
  w.block = weight + block * p.block_bytes;
  if (after < p.blocks) w.next_block = weight + after * p.block_bytes;
  for (int64_t t = 0; t < p.tokens; t += kTileTokens) {
    const int tokens = static_cast<int>(std::min(kTileTokens, p.tokens - t));
    p.kernel.multiply(
        {.w = w,
         .x = p.x + t,
         .num_tokens = tokens,
         .c = tile,
         .panel = reinterpret_cast<char*>(tile + kTileTokens * kBlockRows),
         .panel_filled = t > 0,
         .many_tokens = p.kernel.panel_from_tokens > 0 && p.tokens >= p.kernel.panel_from_tokens,
         .last = t + tokens == p.tokens,
         .x_is_new = first,
         .next_x = nullptr});
    for (int i = 0; i < tokens; ++i) {
      auto* out = static_cast<char*>(p.args.out) +
                  ((p.begin + t + i) * p.args.out_features + column) * size;
      p.kernel.store_row(tile + i * kBlockRows, columns, p.args.dtype, out);
    }
  }
}

void run_pass(void* context, int thread, int threads) {
  auto& p = *static_cast<Pass*>(context);
  p.load_tasks.each(threads, [&](int64_t part) { load(p, part, threads); });
  const auto take = [&] { return p.block_tasks.take(p.blocks, 1, threads).begin; };
  bool first = true;
  int64_t next = take();
  while (next < p.blocks) {
    const int64_t block = next;
    next = take();  // before this one begins, so that its memory can be fetched in time
    multiply(p, block, next, first, thread);
    first = false;
  }
}

}  // namespace

Status linear(const Kernel& kernel, const LinearArgs& args, int max_threads) {
  if (args.num_tokens == 0 || args.out_features == 0) return {};
  const RowShape shape{args.in_features, args.packing};
  const int64_t stride = kernel.row_bytes(shape);
  const int64_t block_bytes = BlockShape{args.format, args.packing, args.in_features}.block_bytes();
  const int64_t blocks = w2_blocks(args.out_features);
  const int64_t flops = 2 * args.num_tokens * args.in_features * args.out_features;
  const int threads = static_cast<int>(std::min<int64_t>(
      std::min<int64_t>(max_threads, blocks),
      1 + std::max(blocks * block_bytes / kBytesOfThread, flops / kFlopsOfThread)));
  const int64_t per_pass = std::min(
      args.num_tokens, std::max(kMinPassTokens, kPassBytes / std::max<int64_t>(stride, 1)));
  const size_t scratch_bytes =
      Arena::bytes_of<float>(kTileTokens * kBlockRows) +
      Arena::bytes_of<char>(kernel.panel_bytes ? kernel.panel_bytes(args.in_features) : 0) + 128;
  thread_local Arena arena;
  if (!arena.reserve(Arena::bytes_of<char>(per_pass * stride) +
                     Arena::bytes_of<const void*>(per_pass) +
                     Arena::bytes_of<char>(threads * scratch_bytes))) {
    return failure("out of memory: %lld tokens need %lld MiB of scratch",
                   static_cast<long long>(per_pass),
                   static_cast<long long>((per_pass * stride) >> 20));
  }
  auto* rows = arena.take<char>(per_pass * stride);
  auto* x = arena.take<const void*>(per_pass);
  auto* scratch = arena.take<char>(threads * scratch_bytes);
  for (int64_t begin = 0; begin < args.num_tokens; begin += per_pass) {
    Pass pass{.kernel = kernel,
              .args = args,
              .shape = shape,
              .stride = stride,
              .block_bytes = block_bytes,
              .blocks = blocks,
              .begin = begin,
              .tokens = std::min(per_pass, args.num_tokens - begin),
              .rows = rows,
              .x = x,
              .scratch = scratch,
              .scratch_bytes = static_cast<int64_t>(scratch_bytes),
              .load_tasks = {},
              .block_tasks = {}};
    run_team(threads, run_pass, &pass);
  }
  return {};
}

}  // namespace ey::cpu
