// SPDX-License-Identifier: Apache-2.0
// The schedule of a CPU call, written once for all formats and instruction sets:
//
//   count    sort the (token, k) slots by expert                                   caller
//   load     hidden states -> padded rows of the kernel's activation type          by token
//   -------- barrier (few tokens: the caller loads alone, and there is none)
//   w13      h[slot] = act(gate x + b, up x + b)        by (expert, 16 values of h)
//   -------- barrier
//   w2       out[:, columns] = sum over experts, in fp32, rounded once       by strips of 32
//   columns
//
// In w2 each output element has one owner and a fixed order of experts: no atomics on data, no
// [num_tokens * top_k, hidden_size] temporary, the same bits for any number of threads.
#include "experts.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "convert.h"
#include "threads.h"

namespace ey::cpu {
namespace {

constexpr int64_t kTileTokens = 192;        // tokens of one tile c: 24 KB of L1 or L2
constexpr int64_t kPanelK = 2048;           // weights of a row in one panel: 128 KB of L2 in bf16
constexpr int64_t kStripBytes = 512 << 10;  // fp32 sums of one w2 task: half of an L2
constexpr int64_t kMaxStripGroup = 8;       // strips of one w2 task
constexpr int64_t kAloneBytes = 64 << 10;   // hidden states that the caller loads while others wake
constexpr int64_t kPassBytes = 128ll << 20;  // bound on h; more tokens are done in passes
constexpr int64_t kMinPassTokens = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch memory of one calling thread, kept between calls: a call allocates nothing once warm.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(memory_); }

  bool reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    std::free(memory_);
    size_ = 0;
    constexpr size_t kHugePage = 2u << 20;
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    memory_ = static_cast<char*>(std::aligned_alloc(kHugePage, bytes));
    if (memory_ == nullptr) return false;
    madvise(memory_, bytes, MADV_HUGEPAGE);  // advice: failure costs speed only
    size_ = bytes;
    return true;
  }
  template <class T>
  T* take(size_t count) {
    auto* p = reinterpret_cast<T*>(memory_ + used_);
    used_ += bytes_of<T>(count);
    return p;
  }
  template <class T>
  static size_t bytes_of(size_t count) {
    return (count * sizeof(T) + 127) / 128 * 128;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
  size_t used_ = 0;
};

int64_t id_at(const MoeArgs& a, int64_t slot) {
  return a.ids_are_int64 ? static_cast<const int64_t*>(a.topk_ids)[slot]
                         : static_cast<const int32_t*>(a.topk_ids)[slot];
}

float weight_at(const MoeArgs& a, int64_t slot) {
  if (a.weights_dtype == DType::kF32) return static_cast<const float*>(a.topk_weights)[slot];
  const uint16_t half = static_cast<const uint16_t*>(a.topk_weights)[slot];
  return a.weights_dtype == DType::kBF16 ? from_bf16(half) : from_fp16(half);
}

Status check_ids(const MoeArgs& a) {
  const int64_t num_experts = a.set->num_experts;
  for (int64_t slot = 0; slot < a.num_tokens * a.top_k; ++slot) {
    const int64_t id = id_at(a, slot);
    if (id < -1 || id > num_experts) {
      return failure(
          "topk_ids[%lld, %lld] is %lld: expected an expert from 0 to %lld, or -1 or %lld for none",
          static_cast<long long>(slot / a.top_k), static_cast<long long>(slot % a.top_k),
          static_cast<long long>(id), static_cast<long long>(num_experts - 1),
          static_cast<long long>(num_experts));
    }
  }
  return {};
}

// One pass over at most a few thousand tokens: everything the threads share.
struct Pass {
  const Kernel& kernel;
  const MoeArgs& args;
  const ExpertSet& set;
  int64_t begin;       // first token
  int64_t num_tokens;  // of this pass

  // Slots are sorted by expert: those of active expert a are first[a] .. first[a + 1].
  int num_active;
  int32_t* active;    // [num_active] expert ids
  int64_t* first;     // [num_active + 1]
  int32_t* token;     // [slots] token within the pass
  float* weight;      // [slots]
  const void** x_of;  // [slots] the token's activation row
  const void** h_of;  // [slots] the slot's row of h
  char* x;            // [num_tokens] rows
  char* h;            // [slots] rows
  int64_t x_stride, h_stride;
  char* scratch;  // per thread: tile c, panel, strips
  size_t scratch_bytes;
  size_t panel_bytes;
  int64_t strip_group;  // strips of one w2 task
  bool loaded;          // the caller has filled x already

  alignas(64) std::atomic<int64_t> next_w13{0};
  alignas(64) std::atomic<int64_t> next_w2{0};

  int64_t slots() const { return first[num_active]; }
  float* tile(int thread) const {
    return reinterpret_cast<float*>(scratch + thread * scratch_bytes);
  }
  char* panel(int thread) const {
    return reinterpret_cast<char*>(tile(thread) + kTileTokens * kBlockRows);
  }
  float* strips(int thread) const { return reinterpret_cast<float*>(panel(thread) + panel_bytes); }
};

// One block of weight rows and what this thread reads after it.
struct Block {
  const char* w[2];  // first row of each half
  int num_rows[2];
  const char* next[2];  // of the next block, or null
  int64_t stride;
  int64_t k;
};

// Rows of activations start a cache line apart from a power of two, or they would share L1 sets.
int64_t row_stride(int64_t values, int size) {
  return ceil_div(values, kRowPad) * kRowPad * size + 64;
}

void count(Pass& p, int64_t* cursor) {
  const MoeArgs& a = p.args;
  const int64_t from = p.begin * a.top_k, to = (p.begin + p.num_tokens) * a.top_k;
  const auto here = [&](int64_t id) {
    return id >= 0 && id < p.set.num_experts && p.set.experts[id].gate != nullptr;
  };
  std::fill_n(cursor, p.set.num_experts, 0);
  for (int64_t slot = from; slot < to; ++slot) {
    const int64_t id = id_at(a, slot);
    if (here(id)) ++cursor[id];
  }
  p.num_active = 0;
  p.first[0] = 0;
  for (int64_t e = 0; e < p.set.num_experts; ++e) {
    if (cursor[e] == 0) continue;
    const int64_t begin = p.first[p.num_active];
    p.active[p.num_active++] = static_cast<int32_t>(e);
    p.first[p.num_active] = begin + cursor[e];
    cursor[e] = begin;
  }
  for (int64_t slot = from; slot < to; ++slot) {
    const int64_t id = id_at(a, slot);
    if (!here(id)) continue;
    const int64_t s = cursor[id]++;
    const int64_t t = slot / a.top_k - p.begin;
    p.token[s] = static_cast<int32_t>(t);
    p.weight[s] = weight_at(a, slot);
    p.x_of[s] = p.x + t * p.x_stride;
    p.h_of[s] = p.h + s * p.h_stride;
  }
}

void load(Pass& p, int thread, int threads) {
  const int64_t hidden = p.set.hidden_size;
  const auto* from = static_cast<const char*>(p.args.hidden_states);
  const int64_t from_stride = hidden * size_of(p.args.hidden_dtype);
  for (int64_t t = thread; t < p.num_tokens; t += threads) {
    p.kernel.load_row(from + (p.begin + t) * from_stride, p.args.hidden_dtype, hidden,
                      p.x + t * p.x_stride);
  }
  // Blocks of h are kHalfRows wide, its padding is kRowPad wide: what no block writes must be zero.
  const int size = p.kernel.activation_size;
  const int64_t written = ceil_div(p.set.intermediate_size, kHalfRows) * kHalfRows * size;
  for (int64_t s = thread; written < p.h_stride && s < p.slots(); s += threads) {
    std::memset(p.h + s * p.h_stride + written, 0, p.h_stride - written);
  }
}

// Multiplies a block with the x rows of active expert a's slots, a tile of tokens at a time, and
// calls use(first slot, tokens) for each tile while it is in cache.
template <class Use>
void multiply(const Pass& p, int a, const Block& block, const void* const* x, int thread, Use use) {
  const Kernel& kernel = p.kernel;
  float* c = p.tile(thread);
  const int64_t end = p.first[a + 1];
  const bool packs = kernel.pack_from_tokens > 0 && end - p.first[a] >= kernel.pack_from_tokens;
  const bool one_panel = block.k <= kPanelK;
  bool packed = false;

  for (int64_t s = p.first[a]; s < end; s += kTileTokens) {
    const int tokens = static_cast<int>(std::min(kTileTokens, end - s));
    const bool last = s + tokens == end;
    if (!packs) {
      for (int half = 0; half < 2; ++half) {
        kernel.rows({.w = block.w[half],
                     .w_stride = block.stride,
                     .num_rows = block.num_rows[half],
                     .k = block.k,
                     .next = last ? block.next[half] : nullptr,
                     .x = x + s,
                     .num_tokens = tokens,
                     .c = c + half * kHalfRows});
      }
    } else {
      char* panel = p.panel(thread);
      const int64_t weight_size = size_of(p.set.format);
      for (int64_t k = 0; k < block.k; k += kPanelK) {
        const int64_t length = std::min(kPanelK, block.k - k);
        for (int half = 0; half < 2 && !(packed && one_panel); ++half) {
          kernel.pack({.w = block.w[half] + k * weight_size,
                       .w_stride = block.stride,
                       .num_rows = block.num_rows[half],
                       .k = length,
                       .panel = panel,
                       .half = half});
        }
        packed = true;
        // What is packed next: these rows' next stretch, or (at the end) the next block.
        PanelArgs args = {.panel = panel,
                          .k = length,
                          .x = x + s,
                          .x_offset = k * kernel.activation_size,
                          .num_tokens = tokens,
                          .add = k > 0,
                          .c = c,
                          .next = {nullptr, nullptr},
                          .next_stride = block.stride};
        for (int half = 0; half < 2; ++half) {
          if (k + length < block.k) {
            args.next[half] = block.w[half] + (k + length) * weight_size;
          } else if (last) {
            args.next[half] = block.next[half];
          }
        }
        kernel.panel(args);
      }
    }
    use(s, tokens);
  }
}

void w13_block(Pass& p, int a, int64_t index, int thread) {
  const ExpertSet& set = p.set;
  const ExpertPointers& e = set.experts[p.active[a]];
  const int64_t stride = set.gate_up_row_stride;
  const int64_t row = index * kHalfRows;
  const int num_rows = static_cast<int>(std::min<int64_t>(kHalfRows, set.intermediate_size - row));
  const auto rows_of = [stride](const void* matrix, int64_t r) {
    return static_cast<const char*>(matrix) + r * stride;
  };
  Block block = {.w = {rows_of(e.gate, row), rows_of(e.up, row)},
                 .num_rows = {num_rows, num_rows},
                 .next = {nullptr, nullptr},
                 .stride = stride,
                 .k = set.hidden_size};
  if (row + kHalfRows < set.intermediate_size) {
    block.next[0] = rows_of(e.gate, row + kHalfRows);
    block.next[1] = rows_of(e.up, row + kHalfRows);
  } else if (a + 1 < p.num_active) {
    const ExpertPointers& next = set.experts[p.active[a + 1]];
    block.next[0] = rows_of(next.gate, 0);
    block.next[1] = rows_of(next.up, 0);
  }
  multiply(p, a, block, p.x_of, thread, [&](int64_t s, int tokens) {
    p.kernel.activate({.c = p.tile(thread),
                       .num_tokens = tokens,
                       .num_rows = num_rows,
                       .gate_bias = e.gate_bias ? e.gate_bias + row : nullptr,
                       .up_bias = e.up_bias ? e.up_bias + row : nullptr,
                       .activation = set.activation,
                       .alpha = set.alpha,
                       .limit = set.limit,
                       .h = p.h + s * p.h_stride + row * p.kernel.activation_size,
                       .h_stride = p.h_stride});
  });
}

void w13(Pass& p, int thread, int threads) {
  const int64_t blocks = ceil_div(p.set.intermediate_size, kHalfRows);
  const int64_t tasks = blocks * p.num_active;
  // Long runs read memory in address order; short ones at the end let threads finish together.
  const int64_t longest = std::clamp<int64_t>(tasks / (threads * 4), 1, 16);
  for (;;) {
    const int64_t begin = p.next_w13.fetch_add(longest, std::memory_order_relaxed);
    if (begin >= tasks) return;
    for (int64_t task = begin; task < std::min(begin + longest, tasks); ++task) {
      w13_block(p, static_cast<int>(task / blocks), task % blocks, thread);
    }
  }
}

// Down rows strip .. strip + 1 of active expert a, and what is read after them: the group's next
// strip, the next expert's first strip of the group, or the next group's first.
Block w2_block(const Pass& p, int a, int64_t strip, int64_t begin, int64_t end) {
  const ExpertSet& set = p.set;
  const auto rows_of = [&](int active, int64_t row) {
    return static_cast<const char*>(set.experts[p.active[active]].down) + row * set.down_row_stride;
  };
  const int64_t row = strip * kBlockRows;
  const int num_rows = static_cast<int>(std::min<int64_t>(kBlockRows, set.hidden_size - row));
  Block block = {.w = {rows_of(a, row), rows_of(a, row + kHalfRows)},
                 .num_rows = {std::min(num_rows, kHalfRows), std::max(0, num_rows - kHalfRows)},
                 .next = {nullptr, nullptr},
                 .stride = set.down_row_stride,
                 .k = set.intermediate_size};
  int next_a = a;
  int64_t next_strip = strip + 1;
  if (next_strip == end && a + 1 < p.num_active) {
    next_a = a + 1;
    next_strip = begin;
  } else if (next_strip == end) {
    next_a = 0;
  }
  if (next_strip * kBlockRows < set.hidden_size) {
    block.next[0] = rows_of(next_a, next_strip * kBlockRows);
    block.next[1] = rows_of(next_a, next_strip * kBlockRows + kHalfRows);
  }
  return block;
}

// Columns of out in strips begin .. end - 1: every expert's share is summed in fp32, expert by
// expert, so that its rows of h stay in cache and its rows of down are read in long runs.
void w2_group(Pass& p, int64_t begin, int64_t end, int thread) {
  const ExpertSet& set = p.set;
  const auto columns = [&](int64_t strip) {
    return static_cast<int>(std::min<int64_t>(kBlockRows, set.hidden_size - strip * kBlockRows));
  };
  const auto sums = [&](int64_t strip) {
    return p.strips(thread) + (strip - begin) * p.num_tokens * kBlockRows;
  };
  std::memset(sums(begin), 0, (end - begin) * p.num_tokens * kBlockRows * sizeof(float));
  for (int a = 0; a < p.num_active; ++a) {
    const float* bias = set.experts[p.active[a]].down_bias;
    for (int64_t strip = begin; strip < end; ++strip) {
      const Block block = w2_block(p, a, strip, begin, end);
      multiply(p, a, block, p.h_of, thread, [&](int64_t s, int tokens) {
        p.kernel.combine({.c = p.tile(thread),
                          .num_tokens = tokens,
                          .num_rows = columns(strip),
                          .bias = bias ? bias + strip * kBlockRows : nullptr,
                          .token = p.token + s,
                          .weight = p.weight + s,
                          .strip = sums(strip)});
      });
    }
  }
  const int64_t size = size_of(p.args.hidden_dtype);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    auto* out = static_cast<char*>(p.args.out) + (p.begin + t) * set.hidden_size * size;
    for (int64_t strip = begin; strip < end; ++strip) {
      p.kernel.store_row(sums(strip) + t * kBlockRows, columns(strip), p.args.hidden_dtype,
                         out + strip * kBlockRows * size);
    }
  }
}

void w2(Pass& p, int thread) {
  const int64_t strips = ceil_div(p.set.hidden_size, kBlockRows);
  for (;;) {
    const int64_t begin = p.next_w2.fetch_add(p.strip_group, std::memory_order_relaxed);
    if (begin >= strips) return;
    w2_group(p, begin, std::min(begin + p.strip_group, strips), thread);
  }
}

void run_pass(void* context, Team& team, int thread) {
  auto& pass = *static_cast<Pass*>(context);
  if (!pass.loaded) {
    load(pass, thread, team.size());
    team.barrier();
  }
  w13(pass, thread, team.size());
  team.barrier();
  w2(pass, thread);
}

// Waking a sleeping thread takes about as long as a thread needs for 1 MB of weights or 5 MFLOP: a
// thread more for each of these, so that a small layer is not slowed down by its helpers.
int useful_threads(const MoeArgs& args, int num_threads) {
  constexpr int64_t kBytes = 1 << 20, kFlops = 5'000'000;
  const ExpertSet& set = *args.set;
  const int64_t slots = args.num_tokens * args.top_k;
  const int64_t weights = 3 * set.hidden_size * set.intermediate_size;
  const int64_t bytes = std::min(slots, set.num_experts) * weights * size_of(set.format);
  const int64_t flops = 2 * slots * weights;
  return static_cast<int>(
      std::min<int64_t>(num_threads, 1 + std::max(bytes / kBytes, flops / kFlops)));
}

}  // namespace

Status moe_experts(const Kernel& kernel, const MoeArgs& args, int max_threads) {
  const ExpertSet& set = *args.set;
  if (const Status ids = check_ids(args); !ids.ok) return ids;
  const int num_threads = useful_threads(args, max_threads);

  const int64_t x_stride = row_stride(set.hidden_size, kernel.activation_size);
  const int64_t h_stride = row_stride(set.intermediate_size, kernel.activation_size);
  const int64_t h_bytes = std::max<int64_t>(1, args.top_k) * h_stride;
  const int64_t per_pass =
      std::min(args.num_tokens, std::max(kMinPassTokens, kPassBytes / h_bytes));
  const int64_t slots = per_pass * args.top_k;
  const int64_t longest = std::min(kPanelK, std::max(set.hidden_size, set.intermediate_size));
  const size_t panel_bytes = kernel.pack_from_tokens > 0 ? kernel.panel_bytes(longest) : 0;
  const int64_t strips = ceil_div(set.hidden_size, kBlockRows);
  const int64_t strip_group = std::max<int64_t>(
      1, std::min({kMaxStripGroup, strips / (num_threads * 4),
                   kStripBytes / (per_pass * kBlockRows * int64_t{sizeof(float)} + 1)}));
  const size_t scratch_bytes =
      Arena::bytes_of<float>((kTileTokens + per_pass * strip_group) * kBlockRows) +
      Arena::bytes_of<char>(panel_bytes) + 128;

  thread_local Arena arena;
  const bool reserved = arena.reserve(
      Arena::bytes_of<int64_t>(set.num_experts) + Arena::bytes_of<int32_t>(set.num_experts) +
      Arena::bytes_of<int64_t>(set.num_experts + 1) + Arena::bytes_of<int32_t>(slots) +
      Arena::bytes_of<float>(slots) + 2 * Arena::bytes_of<const void*>(slots) +
      Arena::bytes_of<char>(per_pass * x_stride) + Arena::bytes_of<char>(slots * h_stride) +
      Arena::bytes_of<char>(num_threads * scratch_bytes));
  if (!reserved) {
    return failure("out of memory: %lld tokens need %lld MiB of scratch",
                   static_cast<long long>(per_pass),
                   static_cast<long long>((per_pass * x_stride + slots * h_stride) >> 20));
  }
  auto* cursor = arena.take<int64_t>(set.num_experts);
  auto* active = arena.take<int32_t>(set.num_experts);
  auto* first = arena.take<int64_t>(set.num_experts + 1);
  auto* token = arena.take<int32_t>(slots);
  auto* weight = arena.take<float>(slots);
  auto* x_of = arena.take<const void*>(slots);
  auto* h_of = arena.take<const void*>(slots);
  auto* x = arena.take<char>(per_pass * x_stride);
  auto* h = arena.take<char>(slots * h_stride);
  auto* scratch = arena.take<char>(num_threads * scratch_bytes);

  for (int64_t begin = 0; begin < args.num_tokens; begin += per_pass) {
    const int64_t pass_tokens = std::min(per_pass, args.num_tokens - begin);
    Pass pass = {.kernel = kernel,
                 .args = args,
                 .set = set,
                 .begin = begin,
                 .num_tokens = pass_tokens,
                 .num_active = 0,
                 .active = active,
                 .first = first,
                 .token = token,
                 .weight = weight,
                 .x_of = x_of,
                 .h_of = h_of,
                 .x = x,
                 .h = h,
                 .x_stride = x_stride,
                 .h_stride = h_stride,
                 .scratch = scratch,
                 .scratch_bytes = scratch_bytes,
                 .panel_bytes = Arena::bytes_of<char>(panel_bytes),
                 .strip_group = strip_group,
                 .loaded = pass_tokens * x_stride <= kAloneBytes};
    count(pass, cursor);
    if (pass.loaded) load(pass, 0, 1);
    run_team(num_threads, run_pass, &pass);
  }
  return {};
}

}  // namespace ey::cpu
