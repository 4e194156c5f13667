// SPDX-License-Identifier: Apache-2.0
// The schedule of a CPU call, written once for all formats and instruction sets:
//
//   route    sort the (token, k) slots by expert; hidden states -> activation rows    by token
//   -------- (few tokens: the caller does this alone, before it calls the others)
//   w13      h[slot] = act(gate x + b, up x + b)                    by (expert, values of h)
//   -------- (and one more where h is made into activation rows afterwards)
//   w2       out[:, columns] = sum over experts, in fp32, rounded once  by strips of 32 columns
//
// At a line, threads wait until all tasks above it are done, by whoever took them: a thread that
// comes late, or never, is not waited for. Where there are several NUMA nodes, each has its share
// of every expert's blocks; a thread takes tasks of its own node first, then what others have left.
//
// In w2 each output element has one owner and a fixed order of experts: no atomics on data, no
// [num_tokens * top_k, hidden_size] temporary, the same bits for any number of threads.
//
// h of packed weights. A kernel makes activation rows in groups of kGroup values, a block gives
// only kHalfRows of them. Many tokens: a task is the blocks of one group, staged in cache as fp32
// and made into the row's group at once. Few: a task is one block, so that threads end together; h
// is staged in memory, and made into rows when all of it is there.
#include "experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "arena.h"
#include "nodes.h"
#include "routing.h"
#include "threads.h"

namespace ey::cpu {
namespace {

constexpr int64_t kTileTokens = 192;        // tokens of one tile c: 24 KB of L1 or L2
constexpr int64_t kStripBytes = 512 << 10;  // fp32 sums of one w2 task: half of an L2
constexpr int64_t kMaxRun = 16;             // blocks of one task: long runs read memory in order
constexpr int64_t kMaxStripRun = 8;
constexpr int64_t kFewSlots = 96;          // up to here, tasks are single blocks
constexpr int64_t kAloneBytes = 64 << 10;  // hidden states that the caller loads while others wake
constexpr int64_t kPassBytes = 256ll
                               << 20;  // bound on rows of slots; more tokens are done in passes
constexpr int64_t kMinPassTokens = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is the same for every pass of a call.
struct Layer {
  const Kernel& kernel;
  const MoeArgs& args;
  const ExpertSet& set;
  RowShape x_shape, h_shape;
  int64_t x_stride, h_stride, stage_stride;  // bytes between rows
  int64_t w13_bytes, w2_bytes;               // of a packed block
  bool gated;        // a block of w13 has 16 gate and 16 up rows, else 32 up
  int64_t w13_rows;  // values of h that a block of w13 makes
  int64_t num_w13_blocks;
  bool groups_h;  // h goes through fp32 and load_group

  Layer(const Kernel& k, const MoeArgs& a)
      : kernel(k),
        args(a),
        set(*a.set),
        x_shape{set.hidden_size, set.packing},
        h_shape{set.intermediate_size, set.packing},
        x_stride(k.row_bytes(x_shape)),
        h_stride(k.row_bytes(h_shape)),
        stage_stride(round_up(set.intermediate_size, kGroup) * sizeof(float) + 64),
        w13_bytes(BlockShape{set.format, set.packing, set.hidden_size}.block_bytes()),
        w2_bytes(BlockShape{set.format, set.packing, set.intermediate_size}.block_bytes()),
        gated(has_gate(set.activation)),
        w13_rows(ey::w13_rows(gated)),
        num_w13_blocks(w13_blocks(set.intermediate_size, gated)),
        groups_h(k.load_group != nullptr) {}
};

// One pass over at most a few thousand tokens: everything the threads share.
struct Pass {
  const Layer& layer;
  Routing routing;
  const void** x_of;  // [slots] the token's activation row
  const void** h_of;  // [slots] the slot's row of h
  char* x;            // [num_tokens] rows
  char* x_slots;      // packed weights: [slots] copies of them, so that an expert's lie together
  char* h;            // [slots] rows
  char* stage;        // [slots] rows of fp32, if few
  char* scratch;      // per thread: tile c, panel, stage of one group, strips
  size_t scratch_bytes;
  size_t panel_bytes;
  int64_t strip_run;  // most strips of one w2 task
  bool few;           // slots: h is grouped when all of it is there
  int route_parts;    // of the phases up to w13; 1: the caller has done them already
  int nodes;

  Tasks count_tasks, load_tasks, scatter_tasks, find_tasks, w13_done, group_tasks;
  Tasks w13_tasks[kMaxNodes], w2_tasks[kMaxNodes];

  int64_t slots() const { return routing.slots(); }
  float* tile(int thread) const {
    return reinterpret_cast<float*>(scratch + thread * scratch_bytes);
  }
  char* panel(int thread) const {
    return reinterpret_cast<char*>(tile(thread) + kTileTokens * kBlockRows);
  }
  float* group_stage(int thread) const {
    return reinterpret_cast<float*>(panel(thread) + panel_bytes);
  }
  float* strips(int thread) const {
    return group_stage(thread) + (layer.groups_h ? kTileTokens * kGroup : 0);
  }
};

// A part of the hidden states, and where each slot of a part finds its rows.
void load(Pass& p, int64_t part) {
  const Layer& l = p.layer;
  const Routing& r = p.routing;
  const int64_t from_stride = l.set.hidden_size * size_of(l.args.hidden_dtype);
  const auto* from = static_cast<const char*>(l.args.hidden_states) + r.begin * from_stride;
  const auto tokens = share_of(r.num_tokens, part, p.route_parts);
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    l.kernel.load_row({.from = from + t * from_stride,
                       .dtype = l.args.hidden_dtype,
                       .shape = l.x_shape,
                       .row = p.x + t * l.x_stride});
  }
}

void find_rows(Pass& p, int64_t part) {
  const Layer& l = p.layer;
  // Blocks of h are narrower than its padding: what no block writes must be zero.
  const int64_t written = l.num_w13_blocks * l.w13_rows * l.kernel.h_size;
  const auto slots = share_of(p.slots(), part, p.route_parts);
  for (int64_t s = slots.begin; s < slots.end; ++s) {
    char* row = p.x + p.routing.token[s] * l.x_stride;
    if (p.x_slots != nullptr) {
      char* copy = p.x_slots + s * l.x_stride;
      std::memcpy(copy, row, l.x_stride);
      row = copy;
    }
    p.x_of[s] = row;
    p.h_of[s] = p.h + s * l.h_stride;
    if (!l.groups_h) std::memset(p.h + s * l.h_stride + written, 0, l.h_stride - written);
  }
}

void route(Pass& p) {
  Routing& r = p.routing;
  const int parts = p.route_parts;
  p.count_tasks.each(parts, [&](int64_t part) { r.count(part, parts); });
  p.load_tasks.each(1 + parts,
                    [&](int64_t task) { task == 0 ? r.plan(parts) : load(p, task - 1); });
  p.scatter_tasks.each(parts, [&](int64_t part) { r.scatter(part, parts); });
  p.find_tasks.each(parts, [&](int64_t part) { find_rows(p, part); });
}

// What is known of the activation rows of a block, for prefetching.
struct Rows {
  bool are_new;      // to this thread's caches
  const char* next;  // the next block's first row, if those rows are new; else null
};

// Multiplies a block with rows x[begin .. end), a tile of tokens at a time, and calls
// use(first slot, tokens) for each tile while it is in cache.
template <class Use>
void multiply(const Pass& p, const Weights& w, const void* const* x, int64_t begin, int64_t end,
              int64_t expert_slots, Rows rows, int thread, Use use) {
  const Kernel& kernel = p.layer.kernel;
  for (int64_t s = begin; s < end; s += kTileTokens) {
    const int tokens = static_cast<int>(std::min(kTileTokens, end - s));
    kernel.multiply(
        {.w = w,
         .x = x + s,
         .num_tokens = tokens,
         .c = p.tile(thread),
         .panel = p.panel(thread),
         .panel_filled = s > begin,
         .many_tokens = kernel.panel_from_tokens > 0 && expert_slots >= kernel.panel_from_tokens,
         .last = s + tokens == end,
         .x_is_new = rows.are_new,
         .next_x = s + tokens == end ? rows.next : nullptr});
    use(s, tokens);
  }
}

// A block of w13: of which expert, in the order of the tasks, and which of its blocks. order < 0:
// none.
struct W13Place {
  int order;
  int64_t index;
  bool new_rows = false;  // the thread comes from another expert
};

// 32 rows of one matrix from `row` on, as far as it has them.
template <class RowOf>
void put_rows(const RowOf& row_of, int64_t row, int64_t end, Weights* w) {
  const int num_rows = static_cast<int>(std::min<int64_t>(kBlockRows, end - row));
  w->num_rows[0] = std::min(num_rows, kHalfRows);
  w->num_rows[1] = std::max(0, num_rows - kHalfRows);
  for (int half = 0; half < 2; ++half) w->row[half] = row_of(row + half * kHalfRows);
}

// A block of gate and up, and the block that this thread reads after it.
Weights w13_weights(const Pass& p, W13Place here, W13Place after) {
  const ExpertSet& set = p.layer.set;
  const Routing& r = p.routing;
  const auto expert = [&](int o) { return set.experts[r.active[r.by_load[o]]]; };
  const int64_t index = here.index;
  const ExpertPointers e = expert(here.order);
  Weights w{};
  w.k = set.hidden_size;
  const bool has_next = after.order >= 0;
  const ExpertPointers next = has_next ? expert(after.order) : e;
  const int64_t next_index = after.index;
  if (set.layout == Layout::kBlocks) {
    w.packing = set.packing;
    w.block = static_cast<const char*>(e.gate) + index * p.layer.w13_bytes;
    if (has_next)
      w.next_block = static_cast<const char*>(next.gate) + next_index * p.layer.w13_bytes;
    return w;
  }
  w.row_stride = set.gate_up_row_stride;
  const auto row_of = [&](const void* matrix, int64_t row) {
    return static_cast<const char*>(matrix) + row * w.row_stride;
  };
  const int64_t row = index * p.layer.w13_rows, next_row = next_index * p.layer.w13_rows;
  if (!p.layer.gated) {
    put_rows([&](int64_t r) { return row_of(e.gate, r); }, row, set.intermediate_size, &w);
    for (int half = 0; has_next && half < 2; ++half) {
      w.next_row[half] = row_of(next.gate, next_row + half * kHalfRows);
    }
    return w;
  }
  w.row[0] = row_of(e.gate, row);
  w.row[1] = row_of(e.up, row);
  w.num_rows[0] = w.num_rows[1] =
      static_cast<int>(std::min<int64_t>(kHalfRows, set.intermediate_size - row));
  if (has_next) {
    w.next_row[0] = row_of(next.gate, next_row);
    w.next_row[1] = row_of(next.up, next_row);
  }
  return w;
}

// Slots begin .. end of one expert through one block; h_row(slot) says where the values go.
template <class Row>
void w13_block(Pass& p, W13Place here, W13Place after, int64_t begin, int64_t end, int64_t h_stride,
               int thread, Row h_row) {
  const Layer& l = p.layer;
  const Routing& r = p.routing;
  const int a = r.by_load[here.order];
  const ExpertPointers& e = l.set.experts[r.active[a]];
  const int64_t row = here.index * l.w13_rows;
  const Weights w = w13_weights(p, here, after);
  const bool other = after.order >= 0 && after.order != here.order;
  const auto* next_x = other ? p.x_of[r.first[r.by_load[after.order]]] : nullptr;
  const Rows rows{here.new_rows, static_cast<const char*>(next_x)};
  multiply(p, w, p.x_of, begin, end, r.first[a + 1] - r.first[a], rows, thread,
           [&](int64_t s, int tokens) {
             l.kernel.activate(
                 {.c = p.tile(thread),
                  .num_tokens = tokens,
                  .num_rows = static_cast<int>(std::min(l.w13_rows, l.set.intermediate_size - row)),
                  .gate_bias = e.gate_bias ? e.gate_bias + row : nullptr,
                  .up_bias = e.up_bias ? e.up_bias + row : nullptr,
                  .activation = l.set.activation,
                  .alpha = l.set.alpha,
                  .limit = l.set.limit,
                  .h = h_row(s),
                  .h_stride = h_stride});
           });
}

// All slots of an expert through one block.
void w13_single(Pass& p, W13Place here, W13Place after, int thread) {
  const Layer& l = p.layer;
  const Routing& r = p.routing;
  const int a = r.by_load[here.order];
  const bool staged = l.groups_h;
  const int64_t stride = staged ? l.stage_stride : l.h_stride;
  const int64_t size = staged ? sizeof(float) : l.kernel.h_size;
  char* base = (staged ? p.stage : p.h) + here.index * l.w13_rows * size;
  w13_block(p, here, after, r.first[a], r.first[a + 1], stride, thread,
            [&](int64_t s) { return base + s * stride; });
}

// All slots of an expert through the blocks of one group of h, and the group into their rows.
// `here` and `after` are the groups' first blocks.
void w13_group(Pass& p, W13Place here, W13Place after, int thread) {
  const Layer& l = p.layer;
  const Routing& r = p.routing;
  const int a = r.by_load[here.order];
  const int64_t end = r.first[a + 1];
  const int64_t first_block = here.index;
  const int64_t last_block = std::min(first_block + kGroup / l.w13_rows, l.num_w13_blocks);
  const int64_t k_begin = first_block * l.w13_rows;
  float* stage = p.group_stage(thread);
  for (int64_t s = r.first[a]; s < end; s += kTileTokens) {
    const int64_t chunk_end = std::min(s + kTileTokens, end);
    for (int64_t block = first_block; block < last_block; ++block) {
      const W13Place now{here.order, block, here.new_rows && block == first_block};
      const W13Place next = block + 1 < last_block ? W13Place{here.order, block + 1}
                            : chunk_end < end      ? here
                                                   : after;
      w13_block(p, now, next, s, chunk_end, kGroup * sizeof(float), thread, [&](int64_t) {
        return reinterpret_cast<char*>(stage + (block - first_block) * l.w13_rows);
      });
    }
    for (int64_t slot = s; slot < chunk_end; ++slot) {
      l.kernel.load_group(
          {.from = stage + (slot - s) * kGroup,
           .n = static_cast<int>(std::min<int64_t>(kGroup, l.set.intermediate_size - k_begin)),
           .k_begin = k_begin,
           .shape = l.h_shape,
           .row = p.h + slot * l.h_stride});
    }
  }
}

// The tasks of w13 on one node: its share of each expert's units, which are the blocks of a task.
struct W13Share {
  int64_t unit;
  Tasks::Run units;  // of each expert
  int64_t total;     // tasks

  W13Share(const Pass& p, int node)
      : unit(p.layer.groups_h && !p.few ? kGroup / p.layer.w13_rows : 1),
        units(share_of(ceil_div(p.layer.num_w13_blocks, unit), node, p.nodes)),
        total((units.end - units.begin) * p.routing.num_active) {}

  W13Place place(int64_t task) const {
    const int64_t per_expert = units.end - units.begin;
    return {static_cast<int>(task / per_expert), (units.begin + task % per_expert) * unit};
  }
};

// Tasks of a node, as long as there are any; returns how many.
int64_t w13_of_node(Pass& p, int node, int thread, int threads) {
  const W13Share share(p, node);
  const bool grouped = p.layer.groups_h && !p.few;
  const int sharers = static_cast<int>(ceil_div(threads, p.nodes));
  const auto take = [&] {
    return p.w13_tasks[node].take(share.total, kMaxRun / share.unit, sharers);
  };
  int order = -1;  // of the expert that this thread has come from
  int64_t done = 0;
  // The next run is taken before this one begins, so that its first block can be fetched in time.
  auto next = take();
  while (next.begin < next.end) {
    const auto run = next;
    next = take();
    done += run.end - run.begin;
    for (int64_t task = run.begin; task < run.end; ++task) {
      const W13Place after = task + 1 < run.end      ? share.place(task + 1)
                             : next.begin < next.end ? share.place(next.begin)
                                                     : W13Place{-1, 0};
      W13Place here = share.place(task);
      here.new_rows = here.order != order;
      order = here.order;
      (grouped ? w13_group : w13_single)(p, here, after, thread);
    }
  }
  return done;
}

void w13(Pass& p, int thread, int threads) {
  int64_t done = 0, total = 0;
  const int home = p.nodes > 1 ? node_here() : 0;
  for (int i = 0; i < p.nodes; ++i) {
    done += w13_of_node(p, (home + i) % p.nodes, thread, threads);
    total += W13Share(p, i).total;
  }
  p.w13_done.finish(done, total);
  p.w13_done.wait(total);
}

// Staged rows of h -> activation rows, by group: in runs, of all slots.
void group_h(Pass& p, int threads) {
  const Layer& l = p.layer;
  const int64_t groups = ceil_div(l.set.intermediate_size, kGroup);
  const int64_t total = p.slots() * groups;
  p.group_tasks.each(threads, [&](int64_t part) {
    const auto share = share_of(total, part, threads);
    for (int64_t i = share.begin; i < share.end; ++i) {
      const int64_t slot = i / groups, k = i % groups * kGroup;
      l.kernel.load_group(
          {.from = reinterpret_cast<const float*>(p.stage + slot * l.stage_stride) + k,
           .n = static_cast<int>(std::min<int64_t>(kGroup, l.set.intermediate_size - k)),
           .k_begin = k,
           .shape = l.h_shape,
           .row = p.h + slot * l.h_stride});
    }
  });
}

// Down rows of one strip of active expert a, and what is read after them: the run's next strip, the
// next expert's first strip of the run, or the first of the run that this thread has taken next.
Weights w2_weights(const Pass& p, int a, int64_t strip, int64_t begin, int64_t end,
                   int64_t next_begin) {
  const ExpertSet& set = p.layer.set;
  const Routing& r = p.routing;
  const auto down = [&](int active) {
    return static_cast<const char*>(set.experts[r.active[active]].down);
  };
  int next_a = a;
  int64_t next_strip = strip + 1;
  if (next_strip == end && a + 1 < r.num_active) {
    next_a = a + 1;
    next_strip = begin;
  } else if (next_strip == end) {
    next_a = 0;
    next_strip = next_begin;
  }
  const bool has_next = next_strip * kBlockRows < set.hidden_size;
  Weights w{};
  w.k = set.intermediate_size;
  if (set.layout == Layout::kBlocks) {
    w.packing = set.packing;
    w.block = down(a) + strip * p.layer.w2_bytes;
    if (has_next) w.next_block = down(next_a) + next_strip * p.layer.w2_bytes;
    return w;
  }
  w.row_stride = set.down_row_stride;
  const auto row_of = [&](int active, int64_t row) { return down(active) + row * w.row_stride; };
  const int64_t row = strip * kBlockRows;
  put_rows([&](int64_t r) { return row_of(a, r); }, row, set.hidden_size, &w);
  for (int half = 0; half < 2; ++half) {
    if (has_next) w.next_row[half] = row_of(next_a, next_strip * kBlockRows + half * kHalfRows);
  }
  return w;
}

// Columns of out in strips begin .. end - 1: every expert's share is summed in fp32, expert by
// expert, so that its rows of h stay in cache and its rows of down are read in long runs.
void w2_run(Pass& p, int64_t begin, int64_t end, int64_t next_begin, int thread) {
  const Layer& l = p.layer;
  const Routing& r = p.routing;
  const auto columns = [&](int64_t strip) {
    return static_cast<int>(std::min<int64_t>(kBlockRows, l.set.hidden_size - strip * kBlockRows));
  };
  const auto sums = [&](int64_t strip) {
    return p.strips(thread) + (strip - begin) * r.num_tokens * kBlockRows;
  };
  std::memset(sums(begin), 0, (end - begin) * r.num_tokens * kBlockRows * sizeof(float));
  for (int a = 0; a < r.num_active; ++a) {
    const float* bias = l.set.experts[r.active[a]].down_bias;
    const int64_t first = r.first[a], last = r.first[a + 1];
    for (int64_t strip = begin; strip < end; ++strip) {
      const Weights w = w2_weights(p, a, strip, begin, end, next_begin);
      const bool more = strip + 1 == end && a + 1 < r.num_active;
      const Rows rows{strip == begin, more ? static_cast<const char*>(p.h_of[last]) : nullptr};
      multiply(p, w, p.h_of, first, last, last - first, rows, thread, [&](int64_t s, int tokens) {
        l.kernel.combine({.c = p.tile(thread),
                          .num_tokens = tokens,
                          .num_rows = columns(strip),
                          .bias = bias ? bias + strip * kBlockRows : nullptr,
                          .token = r.token + s,
                          .weight = r.weight + s,
                          .strip = sums(strip)});
      });
    }
  }
  const DType dtype = out_dtype(l.args);
  const int64_t size = size_of(dtype);
  for (int64_t t = 0; t < r.num_tokens; ++t) {
    auto* out = static_cast<char*>(l.args.out) + (r.begin + t) * l.set.hidden_size * size;
    for (int64_t strip = begin; strip < end; ++strip) {
      l.kernel.store_row(sums(strip) + t * kBlockRows, columns(strip), dtype,
                         out + strip * kBlockRows * size);
    }
  }
}

void w2(Pass& p, int thread, int threads) {
  const int64_t strips = w2_blocks(p.layer.set.hidden_size);
  const int sharers = static_cast<int>(ceil_div(threads, p.nodes));
  const int home = p.nodes > 1 ? node_here() : 0;
  for (int i = 0; i < p.nodes; ++i) {
    const int node = (home + i) % p.nodes;
    const auto share = share_of(strips, node, p.nodes);
    const auto take = [&] {
      return p.w2_tasks[node].take(share.end - share.begin, p.strip_run, sharers);
    };
    auto next = take();
    while (next.begin < next.end) {
      const auto run = next;
      next = take();
      const int64_t after = next.begin < next.end ? share.begin + next.begin : strips;
      w2_run(p, share.begin + run.begin, share.begin + run.end, after, thread);
    }
  }
}

void run_pass(void* context, int thread, int threads) {
  auto& pass = *static_cast<Pass*>(context);
  if (pass.route_parts > 1) route(pass);
  w13(pass, thread, threads);
  if (pass.layer.groups_h && pass.few) group_h(pass, threads);
  w2(pass, thread, threads);
}

int64_t expert_bytes(const Layer& l) {
  const ExpertSet& set = l.set;
  if (set.layout == Layout::kRows)
    return (l.gated ? 3 : 2) * set.hidden_size * set.intermediate_size * size_of(set.format);
  return l.num_w13_blocks * l.w13_bytes + w2_blocks(set.hidden_size) * l.w2_bytes;
}

// Waking a sleeping thread takes about as long as a thread needs for 1 MB of weights or 5 MFLOP: a
// thread more for each of these, so that a small layer is not slowed down by its helpers.
int useful_threads(const Layer& l, int num_threads) {
  constexpr int64_t kBytes = 1 << 20, kFlops = 5'000'000;
  const int64_t slots = l.args.num_tokens * l.args.top_k;
  const int64_t bytes = std::min(slots, l.set.num_experts) * expert_bytes(l);
  const int64_t flops = (l.gated ? 6 : 4) * slots * l.set.hidden_size * l.set.intermediate_size;
  return static_cast<int>(
      std::min<int64_t>(num_threads, 1 + std::max(bytes / kBytes, flops / kFlops)));
}

}  // namespace

Status moe_experts(const Kernel& kernel, const MoeArgs& args, int max_threads) {
  const Layer layer(kernel, args);
  const ExpertSet& set = layer.set;
  const int num_threads = useful_threads(layer, max_threads);
  if (const Status ids = check_ids(args, num_threads); !ids.ok) return ids;

  const bool copies = set.layout == Layout::kBlocks;
  const int64_t h_bytes =
      std::max<int64_t>(1, args.top_k) * (layer.h_stride + (copies ? layer.x_stride : 0));
  const int64_t per_pass =
      std::min(args.num_tokens, std::max(kMinPassTokens, kPassBytes / h_bytes));
  const int64_t slots = per_pass * args.top_k;
  const bool few = slots <= kFewSlots;
  const int64_t longest = std::max(set.hidden_size, set.intermediate_size);
  const size_t panel_bytes =
      Arena::bytes_of<char>(kernel.panel_bytes ? kernel.panel_bytes(longest) : 0);
  const int64_t strips = w2_blocks(set.hidden_size);
  const int64_t strip_run = std::max<int64_t>(
      1, std::min({kMaxStripRun, strips / (num_threads * 4),
                   kStripBytes / (per_pass * kBlockRows * int64_t{sizeof(float)} + 1)}));
  const size_t scratch_bytes =
      Arena::bytes_of<float>(kTileTokens * (kBlockRows + (layer.groups_h ? kGroup : 0)) +
                             per_pass * strip_run * kBlockRows) +
      panel_bytes + 128;
  const size_t stage_bytes = layer.groups_h && few ? slots * layer.stage_stride : 0;
  const size_t experts = static_cast<size_t>(set.num_experts);

  thread_local Arena arena;
  const bool reserved = arena.reserve(
      2 * Arena::bytes_of<int32_t>(experts) + Arena::bytes_of<int64_t>(experts + 1) +
      Arena::bytes_of<int64_t>(num_threads * experts) + Arena::bytes_of<int32_t>(slots) +
      Arena::bytes_of<float>(slots) + 2 * Arena::bytes_of<const void*>(slots) +
      Arena::bytes_of<char>(per_pass * layer.x_stride) +
      Arena::bytes_of<char>(copies ? slots * layer.x_stride : 0) +
      Arena::bytes_of<char>(slots * layer.h_stride) + Arena::bytes_of<char>(stage_bytes) +
      Arena::bytes_of<char>(num_threads * scratch_bytes));
  if (!reserved) {
    return failure(
        "out of memory: %lld tokens need %lld MiB of scratch", static_cast<long long>(per_pass),
        static_cast<long long>((per_pass * layer.x_stride + slots * layer.h_stride) >> 20));
  }
  auto* active = arena.take<int32_t>(experts);
  auto* by_load = arena.take<int32_t>(experts);
  auto* first = arena.take<int64_t>(experts + 1);
  auto* histogram = arena.take<int64_t>(num_threads * experts);
  auto* token = arena.take<int32_t>(slots);
  auto* weight = arena.take<float>(slots);
  auto* x_of = arena.take<const void*>(slots);
  auto* h_of = arena.take<const void*>(slots);
  auto* x = arena.take<char>(per_pass * layer.x_stride);
  auto* x_slots = copies ? arena.take<char>(slots * layer.x_stride) : nullptr;
  auto* h = arena.take<char>(slots * layer.h_stride);
  auto* stage = arena.take<char>(stage_bytes);
  auto* scratch = arena.take<char>(num_threads * scratch_bytes);

  for (int64_t begin = 0; begin < args.num_tokens; begin += per_pass) {
    const int64_t pass_tokens = std::min(per_pass, args.num_tokens - begin);
    const bool alone = pass_tokens * layer.x_stride <= kAloneBytes;
    Pass pass = {.layer = layer,
                 .routing = {.args = args,
                             .begin = begin,
                             .num_tokens = pass_tokens,
                             .num_active = 0,
                             .active = active,
                             .by_load = by_load,
                             .first = first,
                             .token = token,
                             .weight = weight,
                             .histogram = histogram},
                 .x_of = x_of,
                 .h_of = h_of,
                 .x = x,
                 .x_slots = x_slots,
                 .h = h,
                 .stage = stage,
                 .scratch = scratch,
                 .scratch_bytes = scratch_bytes,
                 .panel_bytes = panel_bytes,
                 .strip_run = strip_run,
                 .few = few,
                 .route_parts = alone ? 1 : num_threads,
                 .nodes = num_nodes(),
                 .count_tasks = {},
                 .load_tasks = {},
                 .scatter_tasks = {},
                 .find_tasks = {},
                 .w13_done = {},
                 .group_tasks = {},
                 .w13_tasks = {},
                 .w2_tasks = {}};
    if (pass.route_parts == 1) route(pass);
    run_team(num_threads, run_pass, &pass);
  }
  return {};
}

}  // namespace ey::cpu
