// SPDX-License-Identifier: Apache-2.0
// The kernels of packed weights under the emulator: every format, scale and activation against
// float64, edge shapes, the schedule, ids that name no expert.
#include "blocks_test.h"
#include "cuda.h"
#include "family.cuh"
#include "wgmma.cuh"

using testing::check_contains;
using testing::Guarded;

namespace {

using ey::Activation;
using ey::DType;
using ey::Format;
using ey::Packing;
using ey::ScaleType;

struct Shape {
  int tokens = 3, top_k = 2, num_experts = 4, hidden = 136, intermediate = 40;
  Format format = Format::kInt4;
  Packing packing{ScaleType::kBf16, 32, false};
  DType hidden_dtype = DType::kBF16, weights_dtype = DType::kF32;
  bool out_is_fp32 = false;
  DType out_dtype() const { return out_is_fp32 ? DType::kF32 : hidden_dtype; }
  Activation activation = Activation::kSiluGlu;
  bool bias = false, ids_are_int64 = false;
  bool fast = false;   // fp8: activations as e4m3
  bool nulls = false;  // expert 1 is not here
  bool sentinels = true;

  std::string text() const {
    char s[300];
    std::snprintf(s, sizeof s,
                  "T=%d K=%d E=%d H=%d I=%d format=%d scales=%d group=%d zeros=%d hidden=%d "
                  "weights=%d act=%d bias=%d int64=%d nulls=%d seed=%llu",
                  tokens, top_k, num_experts, hidden, intermediate, int(format),
                  int(packing.scale_type), int(packing.group_size), packing.zeros,
                  int(hidden_dtype), int(weights_dtype), int(activation), bias, ids_are_int64,
                  nulls, (unsigned long long)emu::options.seed);
    return s;
  }
};

struct Expert {
  testing::Matrix gate, up, down;
  std::vector<double> gate_bias, up_bias, down_bias;
};

class Problem {
 public:
  Shape shape;
  ey::ExpertSet set{};
  ey::MoeArgs args{};

  Problem(const Shape& s, uint64_t seed) : shape(s), random_(seed * 77 + 5) {
    const size_t H = size_t(s.hidden), I = size_t(s.intermediate);
    experts_.resize(size_t(s.num_experts));
    for (size_t e = 0; e < experts_.size(); ++e) {
      Expert& x = experts_[e];
      x.gate = testing::random_matrix(s.format, s.packing, I, H, random_);
      x.up = testing::random_matrix(s.format, s.packing, I, H, random_);
      x.down = testing::random_matrix(s.format, s.packing, H, I, random_);
      const bool gated = ey::has_gate(s.activation);
      memory_.push_back(gated ? testing::pack(s.format, s.packing, x.gate, &x.up)
                              : testing::pack(s.format, s.packing, x.up, nullptr));
      char* const w13 = memory_.back().data();
      memory_.push_back(testing::pack(s.format, s.packing, x.down, nullptr));
      ey::ExpertPointers p{w13, nullptr, memory_.back().data(), nullptr, nullptr, nullptr};
      if (s.bias) {
        const float* const gate_bias = bias(x.gate_bias, I);
        if (gated) p.gate_bias = gate_bias;
        p.up_bias = bias(x.up_bias, I);
        p.down_bias = bias(x.down_bias, H);
      }
      if (s.nulls && e == 1) p = {};
      pointers_.push_back(p);
    }
    set.format = s.format;
    set.layout = ey::Layout::kBlocks;
    set.mode = s.fast ? ey::Mode::kFast : ey::Mode::kExact;
    set.packing = s.packing;
    set.activation = s.activation;
    set.alpha = 1.702f;
    set.limit = 1.0f;
    set.num_experts = s.num_experts;
    set.hidden_size = s.hidden;
    set.intermediate_size = s.intermediate;

    const size_t T = size_t(s.tokens), K = size_t(s.top_k);
    x_ = Guarded(T * H * size_t(ey::size_of(s.hidden_dtype)), 16);
    ids_ = Guarded(T * K * (s.ids_are_int64 ? 8 : 4), 8);
    weights_ = Guarded(T * K * size_t(ey::size_of(s.weights_dtype)));
    fill(xs_, x_.data(), s.hidden_dtype, T * H, 1.0f);
    fill(ws_, weights_.data(), s.weights_dtype, T * K, 1.0f);
    for (size_t p = 0; p < T * K; ++p) {
      const int lowest = s.sentinels ? -1 : 0;
      const int highest = s.sentinels ? s.num_experts : s.num_experts - 1;
      set_id(p, lowest + int(random_() % uint64_t(highest - lowest + 1)));
    }
    out_bytes_ = T * H * size_t(ey::size_of(s.out_dtype()));
    out_ = Guarded(out_bytes_);
    args = {s.tokens,    s.top_k,         x_.data(),       out_.data(),     s.hidden_dtype,
            ids_.data(), s.ids_are_int64, weights_.data(), s.weights_dtype, &set};
    args.out_is_fp32 = s.out_is_fp32;
    const ey::Status made = ey::cuda::make_table(0, pointers_.data(), &set);
    if (!made.ok) testing::fail("make_table: %s", made.what);
  }
  ~Problem() { ey::cuda::free_table(0, &set); }
  Problem(const Problem&) = delete;

  void set_id(size_t pair, int64_t id) {
    chosen_.resize(std::max(chosen_.size(), pair + 1));
    chosen_[pair] = id;
    if (shape.ids_are_int64) {
      ids_.as<int64_t>()[pair] = id;
    } else {
      ids_.as<int32_t>()[pair] = int32_t(id);
    }
  }

  void set_hidden_states(double value) {
    for (size_t i = 0; i < xs_.size(); ++i) {
      xs_[i] = testing::put(x_.data(), shape.hidden_dtype, i, float(value));
    }
  }

  void multiply_token(size_t token, float by) {
    for (size_t i = token * size_t(shape.hidden); i < (token + 1) * size_t(shape.hidden); ++i) {
      xs_[i] = testing::put(x_.data(), shape.hidden_dtype, i, by * float(xs_[i]));
    }
  }

  // The first weight of the expert's first gate row becomes this code (8-bit formats).
  void set_first_code(size_t expert, uint8_t code) {
    const int64_t head = ey::BlockShape{shape.format, shape.packing, shape.hidden}.line_head();
    memory_[2 * expert].data()[head] = char(code);
  }

  ey::Status run(void* stream = nullptr) {
    std::memset(out_.data(), 0xff, out_bytes_);
    const Guarded workspace(size_t(ey::cuda::workspace_bytes(args)), 256);
    return ey::cuda::moe_experts(0, args, workspace.data(), stream);
  }
  std::vector<char> result() const { return {out_.data(), out_.data() + out_bytes_}; }
  std::string isa() const { return ey::cuda::kernel_isa(args); }

  // Rows of tokens in nan_tokens must be NaN, all others right.
  void check(const std::vector<size_t>& nan_tokens = {}) {
    testing::where = shape.text() + " " + isa();
    const size_t T = size_t(shape.tokens), K = size_t(shape.top_k), H = size_t(shape.hidden),
                 I = size_t(shape.intermediate);
    int wrong = 0;
    double worst = 0;
    std::vector<double> expected(H), allowed(H), h(I);
    for (size_t t = 0; t < T; ++t) {
      std::fill(expected.begin(), expected.end(), 0.0);
      std::fill(allowed.begin(), allowed.end(), 1e-30);
      for (size_t p = t * K; p < (t + 1) * K; ++p) {
        const int64_t id = chosen_[p];
        if (id < 0 || id >= shape.num_experts || !pointers_[size_t(id)].gate) continue;
        add(experts_[size_t(id)], &xs_[t * H], ws_[p], h, expected, allowed);
      }
      const bool nan = std::find(nan_tokens.begin(), nan_tokens.end(), t) != nan_tokens.end();
      for (size_t j = 0; j < H; ++j) {
        const double value = testing::get(out_.data(), shape.out_dtype(), t * H + j);
        const double error = std::fabs(value - expected[j]);
        const double most =
            allowed[j] + testing::rounding(shape.out_dtype()) * std::fabs(expected[j]);
        if (nan ? !std::isnan(value) : !(error <= most)) ++wrong;
        if (!nan && !(error / most <= worst)) worst = error / most;
      }
    }
    if (wrong) {
      testing::fail("%d of %zu values are wrong, the worst by %.3g times what is allowed", wrong,
                    T * H, worst);
    }
    testing::where.clear();
  }

 private:
  // h is rounded to bf16 here too; where the kernel's fp32 sums fall on the other side of a tie,
  // one h differs by a step: allowed for the largest |down * h| of the row, besides fp32 rounding.
  void add(const Expert& x, const double* xs, double weight, std::vector<double>& h,
           std::vector<double>& expected, std::vector<double>& allowed) {
    if (isa() == "cuda_wgmma_fast") return add_e4m3(x, xs, weight, expected, allowed);
    const size_t H = size_t(shape.hidden), I = size_t(shape.intermediate);
    for (size_t i = 0; i < I; ++i) {
      double g = shape.bias ? x.gate_bias[i] : 0, u = shape.bias ? x.up_bias[i] : 0;
      for (size_t j = 0; j < H; ++j) {
        const double in = rounded(float(xs[j]));
        g += x.gate.values[i * H + j] * in;
        u += x.up.values[i * H + j] * in;
      }
      h[i] = rounded(float(testing::activation(set, g, u)));
    }
    for (size_t j = 0; j < H; ++j) {
      double y = shape.bias ? x.down_bias[j] : 0, size = std::fabs(y), largest = 0;
      for (size_t i = 0; i < I; ++i) {
        const double term = x.down.values[j * I + i] * h[i];
        y += term;
        size += std::fabs(term);
        largest = std::max(largest, std::fabs(term));
      }
      expected[j] += weight * y;
      allowed[j] += std::fabs(weight) * (4e-6 * size + 0x1p-7 * largest);
    }
  }

  // A row of activations as e4m3 in groups of 128: their values, and of each group 1 / scale.
  struct Codes {
    std::vector<double> values;
    std::vector<float> by, scales;
  };
  static Codes codes(const std::vector<double>& row) {
    Codes c;
    for (size_t begin = 0; begin < row.size(); begin += 128) {
      const size_t end = std::min(row.size(), begin + 128);
      float most = 0;
      for (size_t k = begin; k < end; ++k) most = std::max(most, std::fabs(float(row[k])));
      c.by.push_back(most < 1e-30f ? 0.0f : 448.0f / most);
      c.scales.push_back(most < 1e-30f ? 0.0f : most / 448.0f);
      for (size_t k = begin; k < end; ++k) {
        c.values.push_back(as_e4m3(float(row[k]) * c.by.back()) * double(c.scales.back()));
      }
    }
    return c;
  }
  static double as_e4m3(float v) { return testing::e4m3(int(ey::cuda::ptx::float_to_e4m3(v))); }

  // weights . row, and what the tensor cores may cut off: 33 terms a product of 32 k, each by less
  // than a part in 2^13 of the largest; sums begin anew after 128 k.
  static double dot(const double* weights, const std::vector<double>& row, double* cut) {
    double sum = 0, of_group = 0;
    *cut = 0;
    for (size_t begin = 0; begin < row.size(); begin += 32) {
      if (begin % 128 == 0) of_group = 0;
      double most = std::fabs(of_group);
      for (size_t k = begin; k < std::min(row.size(), begin + 32); ++k) {
        const double term = weights[k] * row[k];
        most = std::max(most, std::fabs(term));
        of_group += term;
        sum += term;
      }
      *cut += 33 * 0x1p-13 * most;
    }
    return sum;
  }

  void add_e4m3(const Expert& x, const double* xs, double weight, std::vector<double>& expected,
                std::vector<double>& allowed) {
    const size_t H = size_t(shape.hidden), I = size_t(shape.intermediate);
    const Codes in = codes({xs, xs + H});
    std::vector<double> h(I), off(I);  // off: how far from it the kernel's may be
    for (size_t i = 0; i < I; ++i) {
      double g_off, u_off;
      const double g = dot(&x.gate.values[i * H], in.values, &g_off) +
                       (shape.bias ? x.gate_bias[i] : 0),
                   u = dot(&x.up.values[i * H], in.values, &u_off) +
                       (shape.bias ? x.up_bias[i] : 0);
      h[i] = testing::activation(set, g, u);
      for (int corner = 0; corner < 4; ++corner) {
        const double there = testing::activation(set, g + (corner % 2 ? g_off : -g_off),
                                                 u + (corner / 2 ? u_off : -u_off));
        off[i] = std::max(off[i], std::fabs(there - h[i]) + 1e-6 * std::fabs(h[i]));
      }
    }
    const Codes c = codes(h);
    for (size_t i = 0; i < I; ++i) {
      const size_t group = i / 128;
      double most = 1e-30, most_off = 0;
      for (size_t k = group * 128; k < std::min(I, group * 128 + 128); ++k) {
        most = std::max(most, std::fabs(h[k]));
        most_off = std::max(most_off, off[k]);
      }
      const double by = c.by[group], part = std::min(1.0, most_off / most);
      const double far = (off[i] + part * std::fabs(h[i])) * by;
      off[i] = (as_e4m3(float(h[i] * by + far)) - as_e4m3(float(h[i] * by - far))) *
                   double(c.scales[group]) +
               part * std::fabs(c.values[i]);
    }
    for (size_t j = 0; j < H; ++j) {
      double cut, far = 0;
      const double* const row = &x.down.values[j * I];
      const double y = dot(row, c.values, &cut) + (shape.bias ? x.down_bias[j] : 0);
      for (size_t i = 0; i < I; ++i) far += std::fabs(row[i]) * off[i];
      expected[j] += weight * y;
      allowed[j] += std::fabs(weight) * (cut + far + 4e-6 * std::fabs(y));
    }
  }

  static double rounded(float v) {
    return std::bit_cast<float>(uint32_t(ey::cuda::ptx::float_to_bf16(v)) << 16);
  }

  void fill(std::vector<double>& seen, void* to, DType type, size_t n, float scale) {
    std::normal_distribution<float> normal;
    seen.resize(n);
    for (size_t i = 0; i < n; ++i) seen[i] = testing::put(to, type, i, scale * normal(random_));
  }

  const float* bias(std::vector<double>& seen, size_t n) {
    memory_.emplace_back(n * 4, 4);
    fill(seen, memory_.back().data(), DType::kF32, n, 0.5f);
    return memory_.back().as<float>();
  }

  std::mt19937_64 random_;
  std::vector<Guarded> memory_;
  std::vector<Expert> experts_;
  std::vector<ey::ExpertPointers> pointers_;
  std::vector<double> xs_, ws_;
  std::vector<int64_t> chosen_;
  Guarded x_, ids_, weights_, out_;
  size_t out_bytes_ = 0;
};

void run_and_check(const Shape& shape) {
  Problem problem(shape, emu::options.seed);
  const ey::Status status = problem.run();
  if (!status.ok) {
    testing::where = shape.text();
    testing::fail("%s (%s)", status.what, emu::machine.failure.c_str());
    return;
  }
  problem.check();
}

// Every way in which a format may be packed.
struct Kind {
  Format format;
  Packing packing;
};
std::vector<Kind> kinds() {
  std::vector<Kind> all{{Format::kBf16, {ScaleType::kNone, 0, false}},
                        {Format::kMxfp4, {ScaleType::kE8m0, 32, false}},
                        {Format::kFp8, {ScaleType::kFp32, 128, false}},
                        {Format::kFp8, {ScaleType::kFp32, 0, false}},
                        {Format::kFp8, {ScaleType::kBf16, 0, false}}};
  for (ScaleType type : {ScaleType::kBf16, ScaleType::kFp16, ScaleType::kFp32}) {
    for (int group : {0, 32, 64, 128}) {
      all.push_back({Format::kInt8, {type, group, false}});
      if (group == 0) continue;
      for (bool zeros : {false, true}) all.push_back({Format::kInt4, {type, group, zeros}});
    }
  }
  return all;
}
// One of each format, of int4 one for each of its kernels on Hopper.
std::vector<Kind> formats() {
  return {{Format::kBf16, {ScaleType::kNone, 0, false}},
          {Format::kInt8, {ScaleType::kBf16, 0, false}},
          {Format::kFp8, {ScaleType::kFp32, 128, false}},
          {Format::kInt4, {ScaleType::kBf16, 64, false}},
          {Format::kInt4, {ScaleType::kBf16, 64, true}},
          {Format::kMxfp4, {ScaleType::kE8m0, 32, false}}};
}

}  // namespace

TEST(stream_every_kind_of_packing) {
  for (const Kind& kind : kinds()) {
    for (int hidden : {264, 136}) {
      Shape s;
      s.format = kind.format;
      s.packing = kind.packing;
      s.hidden = hidden;
      s.intermediate = hidden == 264 ? 40 : 200;
      Problem p(s, 1);
      CHECK(p.isa() == "cuda_stream");
      run_and_check(s);
    }
  }
}

TEST(stream_every_activation_with_and_without_bias) {
  for (const Kind& kind : formats()) {
    for (Activation activation : testing::kActivations) {
      for (bool bias : {false, true}) {
        Shape s;
        s.format = kind.format;
        s.packing = kind.packing;
        s.activation = activation;
        s.bias = bias;
        s.ids_are_int64 = bias;
        s.weights_dtype = bias ? DType::kBF16 : DType::kF32;
        run_and_check(s);
      }
    }
  }
}

TEST(stream_edge_shapes) {
  const int sizes[][2] = {{8, 1}, {8, 40}, {40, 8}, {64, 264}, {1032, 24}, {72, 1304}, {2880, 16}};
  for (const Kind& kind : formats()) {
    for (const auto& [hidden, intermediate] : sizes) {
      Shape s;
      s.format = kind.format;
      s.packing = kind.packing;
      s.tokens = 1;
      s.hidden = hidden;
      s.intermediate = intermediate;
      s.nulls = true;
      run_and_check(s);
    }
  }
}

TEST(stream_many_tokens_of_an_expert) {
  for (const Kind& kind : formats()) {
    for (int tokens : {0, 1, 9, 40}) {
      for (int used : {2, 13}) {  // experts; 13: enough pairs an expert for two blocks of columns
        emu::machine.most_shared_bytes = (used == 2 ? 99 : 227) * 1024;
        Shape s;
        s.format = kind.format;
        s.packing = kind.packing;
        s.tokens = tokens;
        s.top_k = 3;
        s.num_experts = used == 2 ? 30 : 20;
        s.hidden = 72;
        s.intermediate = 48;
        s.nulls = tokens == 40;
        Problem problem(s, emu::options.seed);
        std::mt19937_64 random(emu::options.seed);
        for (int p = 0; p < tokens * s.top_k; ++p) {
          problem.set_id(size_t(p), int64_t(random() % uint64_t(used)));
        }
        CHECK(tokens == 0 || problem.isa() == "cuda_stream");
        const ey::Status status = problem.run();
        if (!status.ok) testing::fail("%s (%s)", status.what, emu::machine.failure.c_str());
        problem.check();
      }
    }
  }
}

TEST(stream_many_experts) {
  for (int top_k : {1, 8}) {
    Shape s;
    s.tokens = 40;
    s.top_k = top_k;
    s.num_experts = 300;
    s.hidden = 32;
    s.intermediate = 16;
    run_and_check(s);
  }
}

TEST(stream_on_cards_with_much_shared_memory) {
  emu::machine.most_shared_bytes = 227 * 1024;  // more stages
  emu::machine.multiprocessors = 7;
  for (const Kind& kind : formats()) {
    Shape s;
    s.format = kind.format;
    s.packing = kind.packing;
    s.hidden = 1304;
    s.intermediate = 264;
    run_and_check(s);
  }
}

TEST(stream_experts_hit_by_everyone_or_by_nobody) {
  for (int id : {0, 3, -1}) {
    Shape s;
    s.tokens = 5;
    Problem problem(s, emu::options.seed);
    for (size_t p = 0; p < size_t(s.tokens * s.top_k); ++p) problem.set_id(p, id);
    CHECK(problem.run().ok);
    problem.check();
  }
}

TEST(stream_launches_leave_the_counters_ready) {
  Shape s;
  s.tokens = 2;
  Problem problem(s, emu::options.seed);
  for (unsigned long long capture : {0, 0, 0, 7, 7, 0}) {
    emu::machine.capture_id = capture;
    CHECK(problem.run(reinterpret_cast<void*>(0x1000)).ok);
    problem.check();
  }
  emu::machine.capture_id = 0;
  for (uintptr_t stream = 0x2000; stream < 0x2000 + 100; ++stream) {  // more than there are sets
    CHECK(problem.run(reinterpret_cast<void*>(stream)).ok);
    if (stream % 10 == 0) problem.check();
  }
  CHECK(problem.run(cudaStreamPerThread).ok);
  problem.check();
}

TEST(stream_the_schedule_does_not_change_a_bit) {
  for (const Kind& kind : formats()) {
    Shape s;
    s.format = kind.format;
    s.packing = kind.packing;
    s.tokens = 5;
    s.top_k = 4;
    const uint64_t seed = emu::options.seed;
    Problem problem(s, seed);
    CHECK(problem.run().ok);
    const std::vector<char> first = problem.result();
    for (uint64_t other = 1; other <= 3; ++other) {
      emu::options.seed = seed + other;
      emu::machine.multiprocessors = 4 + int(other);
      CHECK(problem.run().ok);
      CHECK(problem.result() == first);
    }
    emu::options.seed = seed;
  }
}

TEST(stream_an_id_out_of_range_makes_its_row_nan_and_is_reported_once) {
  for (int64_t bad : {int64_t(-2), int64_t(5)}) {
    Shape s;
    Problem problem(s, emu::options.seed);
    problem.set_id(3, bad);  // token 1
    CHECK(problem.run().ok);
    problem.check({1});
    const ey::Status next = problem.run();
    CHECK(!next.ok);
    check_contains(next.what, "expected -1 to 4");
    check_contains(next.what, "at token 1");
    problem.set_id(3, 0);
    CHECK(problem.run().ok);
    problem.check();
  }
}

TEST(stream_nan_of_fp8_stays_nan) {
  for (uint8_t code : {uint8_t(0x7f), uint8_t(0xff)}) {
    Shape s;
    s.format = Format::kFp8;
    s.packing = {ScaleType::kFp32, 128, false};
    s.top_k = 1;
    Problem problem(s, emu::options.seed);
    for (int t = 0; t < s.tokens; ++t) problem.set_id(size_t(t), t % 2);
    problem.set_first_code(0, code);
    CHECK(problem.run().ok);
    problem.check({0, 2});  // the tokens of expert 0
  }
}

TEST(stream_random_problems) {
  std::mt19937_64 random(emu::options.seed + 99);
  const auto pick = [&](int low, int high) {
    return low + int(random() % uint64_t(high - low + 1));
  };
  const std::vector<Kind> all = kinds();
  for (int i = 0; i < 25; ++i) {
    const Kind& kind = all[random() % all.size()];
    Shape s;
    s.format = kind.format;
    s.packing = kind.packing;
    s.tokens = pick(1, 20);
    s.top_k = pick(1, 4);
    s.num_experts = pick(1, 12);
    s.hidden = 8 * pick(1, 40);
    s.intermediate = pick(1, 200);
    s.bias = random() % 2;
    s.ids_are_int64 = random() % 2;
    s.nulls = random() % 2;
    s.sentinels = random() % 2;
    s.out_is_fp32 = random() % 2;
    run_and_check(s);
  }
}

TEST(grouped_every_kind_of_packing) {
  for (const Kind& kind : kinds()) {
    for (int hidden : {264, 133}) {
      Shape s;
      s.format = kind.format;
      s.packing = kind.packing;
      s.tokens = 5;
      s.num_experts = hidden == 264 ? 1 : 2;
      s.hidden = hidden;  // 133: rows of x are no multiples of 16 bytes
      s.intermediate = hidden == 264 ? 40 : 200;
      s.sentinels = false;
      CHECK(Problem(s, 1).isa() == "cuda_grouped");
      run_and_check(s);
    }
  }
}

TEST(grouped_every_type_and_activation) {
  for (const Kind& kind : formats()) {
    for (DType hidden : {DType::kBF16, DType::kF16, DType::kF32}) {
      for (bool bias : {false, true}) {
        Shape s;
        s.format = kind.format;
        s.packing = kind.packing;
        s.tokens = 9;
        s.num_experts = 2;
        s.hidden_dtype = hidden;
        s.activation = Activation(int(hidden));
        s.bias = bias;
        s.ids_are_int64 = bias;
        CHECK(Problem(s, 1).isa() == "cuda_grouped");
        run_and_check(s);
      }
    }
  }
}

TEST(grouped_every_activation) {
  for (Activation activation : testing::kActivations) {
    Shape s;
    s.tokens = 9;
    s.num_experts = 2;
    s.hidden_dtype = DType::kF32;
    s.hidden = 72;
    s.intermediate = 300;
    s.activation = activation;
    s.bias = true;
    run_and_check(s);
  }
}

TEST(grouped_tiles_of_every_width) {
  emu::machine.most_shared_bytes = 227 * 1024;
  for (const Kind& kind : formats()) {
    for (int tokens : {0, 1, 9, 17, 70, 150}) {
      for (int shared : {99, 227}) {
        emu::machine.most_shared_bytes = shared * 1024;
        Shape s;
        s.format = kind.format;
        s.packing = kind.packing;
        s.tokens = tokens;
        s.top_k = 1;
        s.num_experts = tokens == 70 ? 3 : 1;
        s.hidden_dtype = tokens > 9 ? DType::kBF16 : DType::kF32;
        s.hidden = 72;
        s.intermediate = tokens == 9 ? 300 : 24;  // more than one row of blocks
        s.nulls = tokens == 70;
        run_and_check(s);
      }
    }
  }
}

TEST(grouped_many_experts) {
  Shape s;
  s.tokens = 300;
  s.top_k = 4;
  s.num_experts = 600;
  s.hidden = 8;
  s.intermediate = 8;
  s.nulls = true;
  CHECK(Problem(s, 1).isa() == "cuda_grouped");
  run_and_check(s);
}

TEST(grouped_edge_shapes) {
  const int sizes[][2] = {{1, 1}, {3, 40}, {40, 3}, {1030, 24}, {72, 1305}, {2880, 16}};
  for (const Kind& kind : formats()) {
    for (const auto& [hidden, intermediate] : sizes) {
      Shape s;
      s.format = kind.format;
      s.packing = kind.packing;
      s.tokens = 2;
      s.hidden = hidden;
      s.intermediate = intermediate;
      s.hidden_dtype = DType::kF32;
      run_and_check(s);
    }
  }
}

TEST(grouped_groups_and_formats_that_no_kernel_serves_are_refused) {
  for (int group : {8, 48}) {  // shorter than a quad; no part of a chunk
    Shape s;
    s.format = Format::kInt8;
    s.packing.group_size = group;
    check_contains(Problem(s, 1).run().what, "no CUDA kernel serves");
  }
  Problem plain(Shape{}, 1);
  plain.set.format = Format::kFp32;
  check_contains(plain.run().what, "no CUDA kernel serves");
}

TEST(grouped_no_choice_at_all_gives_zeros) {
  Shape s;
  s.top_k = 0;
  run_and_check(s);
}

TEST(grouped_the_schedule_does_not_change_a_bit) {
  for (const Kind& kind : formats()) {
    Shape s;
    s.format = kind.format;
    s.packing = kind.packing;
    s.tokens = 12;
    s.num_experts = 2;
    const uint64_t seed = emu::options.seed;
    Problem problem(s, seed);
    CHECK(problem.run().ok);
    const std::vector<char> first = problem.result();
    for (uint64_t other = 1; other <= 3; ++other) {
      emu::options.seed = seed + other;
      CHECK(problem.run().ok);
      CHECK(problem.result() == first);
    }
    emu::options.seed = seed;
  }
}

TEST(grouped_an_id_out_of_range_makes_its_row_nan_and_is_reported_once) {
  for (int64_t bad : {int64_t(-2), int64_t(5)}) {
    Shape s;
    s.hidden_dtype = DType::kF16;
    Problem problem(s, emu::options.seed);
    problem.set_id(3, bad);  // token 1
    CHECK(problem.run().ok);
    problem.check({1});
    const ey::Status next = problem.run();
    CHECK(!next.ok);
    check_contains(next.what, "at token 1");
    problem.set_id(3, 0);
    CHECK(problem.run().ok);
    problem.check();
  }
}

TEST(grouped_random_problems) {
  std::mt19937_64 random(emu::options.seed + 98);
  const auto pick = [&](int low, int high) {
    return low + int(random() % uint64_t(high - low + 1));
  };
  const std::vector<Kind> all = kinds();
  for (int i = 0; i < 20; ++i) {
    const Kind& kind = all[random() % all.size()];
    Shape s;
    s.format = kind.format;
    s.packing = kind.packing;
    s.tokens = pick(1, 90);
    s.top_k = pick(1, 4);
    s.num_experts = pick(1, 5);
    s.hidden = pick(1, 200);
    s.intermediate = pick(1, 200);
    s.hidden_dtype = DType(random() % 3);
    s.bias = random() % 2;
    s.ids_are_int64 = random() % 2;
    s.nulls = random() % 2;
    s.sentinels = random() % 2;
    s.out_is_fp32 = random() % 2;
    run_and_check(s);
  }
}

// Hopper: a machine with its instructions and shared memory, and kernels forced, since these calls
// are far smaller than those that would get them.
class OnHopper {
 public:
  OnHopper() {
    emu::machine.major = 9;
    emu::machine.minor = 0;
    emu::machine.most_shared_bytes = 227 * 1024;
    emu::machine.multiprocessors = 2;
    setenv("EXPERTYARD_CUDA_KERNELS", "cuda_wgmma", 1);
  }
  ~OnHopper() { unsetenv("EXPERTYARD_CUDA_KERNELS"); }
};

TEST(wgmma_every_kind_of_packing) {
  const OnHopper hopper;
  for (const Kind& kind : kinds()) {
    for (int hidden : {264, 133}) {
      Shape s;
      s.format = kind.format;
      s.packing = kind.packing;
      s.tokens = 5;
      s.num_experts = hidden == 264 ? 1 : 2;
      s.hidden = hidden;  // 133: rows of x are no multiples of 16 bytes
      s.intermediate = hidden == 264 ? 40 : 200;
      s.sentinels = false;
      CHECK(Problem(s, 1).isa() == "cuda_wgmma");
      run_and_check(s);
    }
  }
}

TEST(wgmma_rows_longer_than_the_ring) {
  const OnHopper hopper;
  for (const Kind& kind : formats()) {
    Shape s;
    s.format = kind.format;
    s.packing = kind.packing;
    s.tokens = 3;
    s.top_k = 1;
    s.num_experts = 1;
    s.hidden = 1400;  // of bf16 22 chunks, of 4 bits 11: every stage of the ring twice and more
    s.intermediate = 24;
    s.sentinels = false;
    run_and_check(s);
  }
}

TEST(wgmma_every_type_and_activation) {
  const OnHopper hopper;
  for (const Kind& kind : formats()) {
    for (DType hidden : {DType::kBF16, DType::kF16, DType::kF32}) {
      for (bool bias : {false, true}) {
        Shape s;
        s.format = kind.format;
        s.packing = kind.packing;
        s.tokens = 9;
        s.num_experts = 2;
        s.hidden_dtype = hidden;
        s.activation = Activation(int(hidden));
        s.bias = bias;
        s.ids_are_int64 = bias;
        run_and_check(s);
      }
    }
  }
}

TEST(wgmma_every_activation) {
  const OnHopper hopper;
  for (Activation activation : testing::kActivations) {
    for (int intermediate : {24, 300}) {  // without a gate: a row of h ends inside a block, or not
      Shape s;
      s.tokens = 9;
      s.num_experts = 2;
      s.hidden = 72;
      s.intermediate = intermediate;
      s.activation = activation;
      s.bias = true;
      run_and_check(s);
    }
  }
}

TEST(wgmma_tiles_and_items) {
  const OnHopper hopper;
  for (const Kind& kind : formats()) {
    for (int tokens : {0, 1, 127, 129, 300}) {
      Shape s;
      s.format = kind.format;
      s.packing = kind.packing;
      s.tokens = tokens;
      s.top_k = 1;
      s.num_experts = tokens == 300 ? 3 : 1;
      s.hidden = 72;
      s.intermediate = tokens == 127 ? 300 : 24;  // more than one row of blocks
      s.nulls = tokens == 300;
      run_and_check(s);
    }
  }
}

TEST(wgmma_edge_shapes) {
  const OnHopper hopper;
  const int sizes[][2] = {{1, 1}, {3, 40}, {40, 3}, {1030, 24}, {72, 1305}, {2880, 16}};
  for (const Kind& kind : formats()) {
    for (const auto& [hidden, intermediate] : sizes) {
      Shape s;
      s.format = kind.format;
      s.packing = kind.packing;
      s.tokens = 2;
      s.hidden = hidden;
      s.intermediate = intermediate;
      s.hidden_dtype = DType::kF32;
      run_and_check(s);
    }
  }
}

TEST(wgmma_the_schedule_does_not_change_a_bit) {
  const OnHopper hopper;
  for (const Kind& kind : formats()) {
    Shape s;
    s.format = kind.format;
    s.packing = kind.packing;
    s.tokens = 12;
    s.num_experts = 2;
    const uint64_t seed = emu::options.seed;
    Problem problem(s, seed);
    CHECK(problem.run().ok);
    const std::vector<char> first = problem.result();
    for (uint64_t other = 1; other <= 3; ++other) {
      emu::options.seed = seed + other;
      emu::machine.multiprocessors = 1 + int(other);
      CHECK(problem.run().ok);
      CHECK(problem.result() == first);
    }
    emu::options.seed = seed;
  }
}

TEST(wgmma_an_id_out_of_range_makes_its_row_nan_and_is_reported_once) {
  const OnHopper hopper;
  Shape s;
  s.hidden_dtype = DType::kF16;
  Problem problem(s, emu::options.seed);
  problem.set_id(3, -2);  // token 1
  CHECK(problem.run().ok);
  problem.check({1});
  const ey::Status next = problem.run();
  CHECK(!next.ok);
  check_contains(next.what, "at token 1");
}

TEST(wgmma_random_problems) {
  const OnHopper hopper;
  std::mt19937_64 random(emu::options.seed + 97);
  const auto pick = [&](int low, int high) {
    return low + int(random() % uint64_t(high - low + 1));
  };
  const std::vector<Kind> all = kinds();
  for (int i = 0; i < 12; ++i) {
    const Kind& kind = all[random() % all.size()];
    Shape s;
    s.format = kind.format;
    s.packing = kind.packing;
    s.tokens = pick(1, 90);
    s.top_k = pick(1, 4);
    s.num_experts = pick(1, 5);
    s.hidden = pick(1, 600);
    s.intermediate = pick(1, 200);
    s.hidden_dtype = DType(random() % 3);
    s.bias = random() % 2;
    s.ids_are_int64 = random() % 2;
    s.nulls = random() % 2;
    s.sentinels = random() % 2;
    s.out_is_fp32 = random() % 2;
    run_and_check(s);
  }
}

// Every way in which fp8 weights that meet e4m3 may be packed.
std::vector<Packing> fast_packings() {
  return {{ScaleType::kFp32, 128, false},
          {ScaleType::kBf16, 128, false},
          {ScaleType::kFp32, 0, false},
          {ScaleType::kFp16, 256, false}};
}
Shape fast_shape(const Packing& packing) {
  Shape s;
  s.format = Format::kFp8;
  s.packing = packing;
  s.fast = true;
  setenv("EXPERTYARD_CUDA_KERNELS", "cuda_wgmma_fast", 1);
  return s;
}

TEST(fast_every_packing_and_shape) {
  const OnHopper hopper;
  const int sizes[][2] = {{264, 150}, {133, 200}, {1, 1}, {3, 300}, {1400, 24}, {128, 128}};
  for (const Packing& packing : fast_packings()) {
    for (const auto& [hidden, intermediate] : sizes) {
      Shape s = fast_shape(packing);
      s.tokens = hidden == 264 ? 130 : 5;  // more than one tile
      s.top_k = hidden == 264 ? 1 : 2;
      s.num_experts = hidden == 264 ? 1 : 2;
      s.hidden = hidden;
      s.intermediate = intermediate;
      CHECK(Problem(s, 1).isa() == "cuda_wgmma_fast");
      run_and_check(s);
    }
  }
}

TEST(fast_every_type_and_activation) {
  const OnHopper hopper;
  for (DType hidden : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (bool bias : {false, true}) {
      Shape s = fast_shape({ScaleType::kFp32, 128, false});
      s.tokens = 9;
      s.num_experts = 2;
      s.hidden_dtype = hidden;
      s.activation = Activation(int(hidden));
      s.bias = bias;
      s.ids_are_int64 = bias;
      s.nulls = bias;
      run_and_check(s);
    }
  }
}

TEST(fast_rows_and_items_longer_than_the_ring) {
  const OnHopper hopper;
  Shape s = fast_shape({ScaleType::kFp32, 128, false});
  s.tokens = 3;
  s.num_experts = 1;
  s.hidden = 1800;
  s.intermediate = 700;  // 6 items of w13 for two multiprocessors: the largest values take turns
  s.sentinels = false;
  run_and_check(s);
}

// Warps that wait for each other at a barrier of their own must do so even where one lags behind:
// a block's items are of one token each, now a large one, now a small one.
TEST(fast_a_slow_warp_is_waited_for) {
  const OnHopper hopper;
  emu::machine.multiprocessors = 1;
  const emu::Options usual = emu::options;
  emu::options.slow_warp_one_in = 64;
  emu::options.most_polls_without_change = 40'000'000;
  for (uint64_t other = 0; other < 6; ++other) {  // another warp is the slow one
    emu::options.seed = usual.seed + other;
    Shape s = fast_shape({ScaleType::kFp32, 128, false});
    s.tokens = s.num_experts = 8;
    s.top_k = 1;
    s.hidden = 100;
    s.intermediate = 128;
    Problem problem(s, emu::options.seed);
    for (int t = 0; t < s.tokens; ++t) {
      problem.set_id(size_t(t), t);
      if (t % 2) problem.multiply_token(size_t(t), 100.0f);
    }
    CHECK(problem.run().ok);
    problem.check();
  }
  emu::options = usual;
}

TEST(fast_the_schedule_does_not_change_a_bit) {
  const OnHopper hopper;
  Shape s = fast_shape({ScaleType::kFp32, 128, false});
  s.tokens = 12;
  s.num_experts = 2;
  s.intermediate = 300;
  const uint64_t seed = emu::options.seed;
  Problem problem(s, seed);
  CHECK(problem.run().ok);
  const std::vector<char> first = problem.result();
  for (uint64_t other = 1; other <= 3; ++other) {
    emu::options.seed = seed + other;
    emu::machine.multiprocessors = 1 + int(other);
    CHECK(problem.run().ok);
    CHECK(problem.result() == first);
  }
  emu::options.seed = seed;
}

TEST(fast_nan_and_zeros_stay_what_they_are) {
  const OnHopper hopper;
  Shape s = fast_shape({ScaleType::kFp32, 128, false});
  s.top_k = 1;
  s.sentinels = false;
  Problem problem(s, emu::options.seed);
  for (int t = 0; t < s.tokens; ++t) problem.set_id(size_t(t), t % 2);
  problem.set_first_code(0, 0x7f);
  CHECK(problem.run().ok);
  problem.check({0, 2});  // the tokens of expert 0
  Problem nothing(s, emu::options.seed);
  nothing.set_hidden_states(0.0);
  CHECK(nothing.run().ok);
  nothing.check();
  nothing.set_hidden_states(NAN);
  CHECK(nothing.run().ok);
  nothing.check({0, 1, 2});
}

TEST(fast_random_problems) {
  const OnHopper hopper;
  std::mt19937_64 random(emu::options.seed + 96);
  const auto pick = [&](int low, int high) {
    return low + int(random() % uint64_t(high - low + 1));
  };
  const std::vector<Packing> all = fast_packings();
  for (int i = 0; i < 8; ++i) {
    Shape s = fast_shape(all[random() % all.size()]);
    s.tokens = pick(1, 60);
    s.top_k = pick(1, 4);
    s.num_experts = pick(1, 5);
    s.hidden = pick(1, 600);
    s.intermediate = pick(1, 300);
    s.hidden_dtype = DType(random() % 3);
    s.bias = random() % 2;
    s.nulls = random() % 2;
    s.sentinels = random() % 2;
    s.out_is_fp32 = random() % 2;
    run_and_check(s);
  }
}

TEST(kernels_are_chosen_by_the_card_and_by_name) {
  Shape s;
  s.tokens = 200;
  s.num_experts = 2;
  s.hidden = s.intermediate = 16;
  const auto chosen = [&] { return Problem(s, 1).isa(); };
  CHECK(chosen() == "cuda_grouped");  // not a Hopper
  emu::machine.major = 9;
  emu::machine.minor = 0;
  emu::machine.most_shared_bytes = 227 * 1024;
  CHECK(chosen() == "cuda_wgmma");
  s.packing.zeros = true;
  CHECK(chosen() == "cuda_wgmma");
  s.packing.zeros = false;
  s.format = Format::kFp8;
  for (bool fast : {false, true}) {
    for (int group : {64, 128}) {
      s.packing.group_size = group;
      s.fast = fast;
      CHECK(chosen() == (fast && group == 128 ? "cuda_wgmma_fast" : "cuda_wgmma"));
    }
  }
  s.fast = false;
  s.format = Format::kInt4;
  s.tokens = 60;  // 60 pairs an expert: a narrower tile does
  CHECK(chosen() == "cuda_grouped");
  setenv("EXPERTYARD_CUDA_KERNELS", "cuda_wgmma", 1);
  CHECK(chosen() == "cuda_wgmma");
  emu::machine.major = 8;
  check_contains(Problem(s, 1).run().what, "cuda_wgmma do not serve this call");
  setenv("EXPERTYARD_CUDA_KERNELS", "cuda_fast", 1);
  check_contains(Problem(s, 1).run().what,
                 "no CUDA kernels are called 'cuda_fast'; there are: cuda_rows cuda_tiles "
                 "cuda_stream cuda_grouped cuda_wgmma cuda_wgmma_fast");
  unsetenv("EXPERTYARD_CUDA_KERNELS");
}

TEST(borders_are_those_of_the_table) {
  Shape s;
  s.num_experts = 2;
  s.hidden = s.intermediate = 16;
  emu::machine.major = 9;
  emu::machine.minor = 0;
  emu::machine.most_shared_bytes = 227 * 1024;
  const std::string path = "/tmp/expertyard-crossovers-" + std::to_string(getpid());
  const auto chosen = [&](const char* lines, int tokens) {
    std::FILE* const file = std::fopen(path.c_str(), "w");
    std::fputs(lines, file);
    std::fclose(file);
    setenv("EXPERTYARD_CUDA_CROSSOVERS", path.c_str(), 1);
    s.tokens = tokens;
    return Problem(s, 1).isa();
  };
  const char* const ours =
      "# of a card\n\n90 int4 32 16 16 2 20.5 100 # both\n90 int4 64 16 16 2 1 1\n";
  CHECK(chosen("", 9) == "cuda_grouped");
  CHECK(chosen("", 65) == "cuda_wgmma");
  CHECK(chosen(ours, 20) == "cuda_stream");
  CHECK(chosen(ours, 21) == "cuda_grouped");
  CHECK(chosen(ours, 100) == "cuda_grouped");
  CHECK(chosen(ours, 101) == "cuda_wgmma");
  CHECK(chosen("90 int4 32 16 16 2 0 30", 31) == "cuda_wgmma");  // 0: not measured
  CHECK(chosen("90 int4 32 16 16 2 0 30", 9) == "cuda_grouped");
  CHECK(chosen("80 int4 32 16 16 2 20 30\n90 int8 32 16 16 2 20 30\n90 fp8 32 16 16 2 2 2\n"
               "90 mxfp4 32 16 16 2 2 2\n90 bf16 0 16 16 2 2 2\n",
               20) == "cuda_grouped");  // of other experts
  const auto refused = [&](const char* part) {
    ey::ExpertSet set{};
    set.layout = ey::Layout::kBlocks;
    set.num_experts = 1;
    const ey::ExpertPointers nothing{};
    check_contains(ey::cuda::make_table(0, &nothing, &set).what, part);
  };
  std::FILE* const file = std::fopen(path.c_str(), "w");
  std::fputs("90 int4 32 16 16 2 20.5 100\n90 int4 32 16 16 2 20.5\n", file);
  std::fclose(file);
  refused(":2: expected capability format group_size");
  std::remove(path.c_str());
  refused("cannot be read");
  unsetenv("EXPERTYARD_CUDA_CROSSOVERS");
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
