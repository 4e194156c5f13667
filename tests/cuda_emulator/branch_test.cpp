// SPDX-License-Identifier: Apache-2.0
// A part of a layer on another GPU (cuda/branch.h): several layers of a graph that is replayed,
// with streams whose operations run in any order that events allow.
#include "cuda/branch.h"

#include <array>

#include "cuda/cuda.h"
#include "handoff/away.h"
#include "streams_emulator.h"
#include "testing.h"

using ey::DType;

namespace {

std::array<std::byte, 4096> streams_of_the_test;  // addresses
int launched_on = -1;

cudaStream_t stream(int index) { return &streams_of_the_test[size_t(index)]; }

double get_id(const void* ids, bool wide, size_t i) {
  return wide ? double(static_cast<const int64_t*>(ids)[i])
              : double(static_cast<const int32_t*>(ids)[i]);
}

}  // namespace

// The experts of the other GPU, instead of the kernels: sum_k ids * weights + hidden + alpha. The
// workspace is written and read, so that two calls that share one are seen.
namespace ey::cuda {

int64_t workspace_bytes(const MoeArgs& args) {
  return int64_t(sizeof(double)) * args.num_tokens * args.set->num_experts;
}

Status moe_experts(int device, const MoeArgs& a, void* workspace, void* on) {
  launched_on = device;
  CHECK(a.out_is_fp32);
  for (const void* there : {a.hidden_states, a.topk_ids, a.topk_weights, (const void*)a.out}) {
    CHECK(emu::machine.allocated.count(const_cast<void*>(there)) == 1);  // none of ours
  }
  const float add = a.set->alpha;
  const int64_t hidden_size = a.set->hidden_size;
  auto* const sums = static_cast<double*>(workspace);
  emu::streams.queue(on, [=] {
    for (int64_t t = 0; t < a.num_tokens; ++t) {
      sums[t] = add;
      for (int64_t k = 0; k < a.top_k; ++k) {
        const auto i = size_t(t * a.top_k + k);
        sums[t] += get_id(a.topk_ids, a.ids_are_int64, i) *
                   testing::get(a.topk_weights, a.weights_dtype, i);
      }
    }
  });
  emu::streams.queue(on, [=] {
    for (int64_t i = 0; i < a.num_tokens * hidden_size; ++i) {
      static_cast<float*>(a.out)[i] =
          float(sums[i / hidden_size] + testing::get(a.hidden_states, a.hidden_dtype, size_t(i)));
    }
  });
  return {};
}

}  // namespace ey::cuda

namespace {

// A graph of several layers: each one's input is what the one before has made of its share.
struct Graph {
  ey::cuda::BranchShape shape;
  int layers;
  ey::handoff::Away away;
  std::vector<ey::ExpertSet> sets;
  testing::Guarded hidden, ids, weights, arrived, out;
  std::vector<double> expected;

  Graph(const ey::cuda::BranchShape& s, int layers, std::mt19937& random)
      : shape(s),
        layers(layers),
        away(0, 1, s),
        hidden(values() * size_t(ey::size_of(s.hidden_dtype)), 16),
        ids(pairs() * (s.ids_are_int64 ? 8 : 4), 8),
        weights(pairs() * size_t(ey::size_of(s.weights_dtype)), 4),
        arrived(values() * 4, 4),
        out(values() * 4, 4) {
    for (int i = 0; i < layers; ++i) {
      ey::ExpertSet set{};
      set.hidden_size = s.hidden_size;
      set.num_experts = i % 2 ? 9 : 4;  // workspaces of two sizes
      set.alpha = float(random() % 4);
      sets.push_back(set);
    }
  }
  size_t values() const { return size_t(shape.num_tokens * shape.hidden_size); }
  size_t pairs() const { return size_t(shape.num_tokens * shape.top_k); }

  void refill(std::mt19937& random) {
    const auto small = [&] { return float(random() % 4); };
    std::vector<double> sums(size_t(shape.num_tokens), 0);
    for (size_t i = 0; i < pairs(); ++i) {
      const auto id = int(random() % 4) - 1;
      if (shape.ids_are_int64) {
        ids.as<int64_t>()[i] = id;
      } else {
        ids.as<int32_t>()[i] = id;
      }
      sums[i / size_t(shape.top_k)] +=
          id * testing::put(weights.data(), shape.weights_dtype, i, small());
    }
    expected.assign(values(), 0);
    for (size_t i = 0; i < values(); ++i) {
      const double x = testing::put(hidden.data(), shape.hidden_dtype, i, small());
      const double sum = sums[i / size_t(shape.hidden_size)];
      for (const ey::ExpertSet& set : sets) expected[i] += sum + x + set.alpha;
    }
  }

  // Queues out = sum over layers of arrived.
  void queue(cudaStream_t on) {
    emu::streams.queue(on, [this] { std::memset(out.data(), 0, values() * 4); });
    for (const ey::ExpertSet& set : sets) {
      const ey::MoeArgs args = {.num_tokens = shape.num_tokens,
                                .top_k = shape.top_k,
                                .hidden_states = hidden.data(),
                                .out = nullptr,
                                .hidden_dtype = shape.hidden_dtype,
                                .topk_ids = ids.data(),
                                .ids_are_int64 = shape.ids_are_int64,
                                .topk_weights = weights.data(),
                                .weights_dtype = shape.weights_dtype,
                                .set = &set,
                                .out_is_fp32 = false};
      const ey::Status sent = away.send(args, arrived.as<float>(), on);
      if (!sent.ok) testing::fail("%s", sent.what);
      CHECK(launched_on == 1);
      CHECK(emu::machine.device == 0);
      const ey::Status collected = away.collect(on);
      if (!collected.ok) testing::fail("%s", collected.what);
      emu::streams.queue(on, [this] {
        for (size_t i = 0; i < values(); ++i) out.as<float>()[i] += arrived.as<float>()[i];
      });
    }
  }
  bool is_right() const {
    for (size_t i = 0; i < expected.size(); ++i) {
      if (double(out.as<float>()[i]) != expected[i]) return false;
    }
    return true;
  }
};

struct Deferred {
  Deferred() {
    emu::machine.devices = 2;
    emu::streams.deferred = true;
  }
  ~Deferred() {
    emu::streams.forget();
    emu::streams.deferred = emu::streams.hangs = false;
  }
};

constexpr ey::cuda::BranchShape kSmall{3, 20, 2, DType::kBF16, DType::kF32, false};

}  // namespace

TEST(every_shape_and_type) {
  Deferred deferred;
  std::mt19937 random(unsigned(emu::options.seed));
  for (const DType type : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const bool wide : {false, true}) {
      for (const auto& [tokens, hidden, top_k] :
           {std::array<int64_t, 3>{1, 1, 1}, {0, 16, 2}, {5, 37, 3}, {4, 200, 2}}) {
        const DType weights = wide ? DType::kBF16 : DType::kF32;
        Graph graph({tokens, hidden, top_k, type, weights, wide}, 1, random);
        graph.refill(random);
        graph.queue(stream(0));
        emu::streams.run(stream(0), random);
        CHECK(graph.is_right());
      }
    }
  }
}

TEST(layers_of_a_graph_that_is_replayed) {
  Deferred deferred;
  std::mt19937 random(unsigned(emu::options.seed));
  Graph graph(kSmall, 5, random);
  for (int replay = 0; replay < 20; ++replay) {
    emu::streams.run(stream(0), random);
    graph.refill(random);
    graph.queue(stream(0));
    emu::streams.run(stream(0), random);
    CHECK(!emu::streams.hangs);
    CHECK(emu::streams.left() == 0);  // the other GPU's stream has joined: else no capture ends
    CHECK(graph.is_right());
  }
}

TEST(two_graphs_at_once) {
  Deferred deferred;
  std::mt19937 random(unsigned(emu::options.seed));
  Graph first(kSmall, 3, random), second(kSmall, 3, random);
  for (int replay = 0; replay < 10; ++replay) {
    first.refill(random);
    second.refill(random);
    first.queue(stream(1));
    second.queue(stream(2));
    emu::streams.run(stream(1), random);
    emu::streams.run(stream(2), random);
    CHECK(first.is_right() && second.is_right());
  }
}

TEST(all_memory_is_given_back) {
  emu::machine.devices = 2;
  const size_t before = emu::machine.allocated.size();
  std::mt19937 random(unsigned(emu::options.seed));
  {
    Graph graph(kSmall, 2, random);
    graph.refill(random);
    graph.queue(stream(0));
    CHECK(graph.is_right());
    CHECK(emu::machine.allocated.size() > before);
  }
  CHECK(emu::machine.allocated.size() == before);
  for (int allocations = 0; allocations < 8; ++allocations) {
    emu::machine.allocations_left = allocations;
    ey::cuda::Branch branch;
    const ey::Status made = ey::cuda::make_branch(0, 1, kSmall, 100, &branch);
    CHECK(!made.ok);
    testing::check_contains(made.what, "out of memory");
    CHECK(emu::machine.allocated.size() == before);
    CHECK(emu::machine.device == 0);
  }
  emu::machine.allocations_left = -1;
  ey::cuda::Branch branch;
  testing::check_contains(ey::cuda::make_branch(0, 5, kSmall, 100, &branch).what,
                          "cuda:5: this mac");
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
