// SPDX-License-Identifier: Apache-2.0
// A call of the kernels of packed weights under the emulator, with what it should give in float64;
// and the checks that every family of kernels has to pass.
#pragma once

#include "blocks_test.h"
#include "cuda.h"
#include "family.cuh"
#include "wgmma.cuh"

namespace packed {

using ey::Activation;
using ey::DType;
using ey::Format;
using ey::Packing;
using ey::ScaleType;
using testing::check_contains;
using testing::Guarded;

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

inline void run_and_check(const Shape& shape) {
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
inline std::vector<Kind> kinds() {
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
inline std::vector<Kind> formats() {
  return {{Format::kBf16, {ScaleType::kNone, 0, false}},
          {Format::kInt8, {ScaleType::kBf16, 0, false}},
          {Format::kFp8, {ScaleType::kFp32, 128, false}},
          {Format::kInt4, {ScaleType::kBf16, 64, false}},
          {Format::kInt4, {ScaleType::kBf16, 64, true}},
          {Format::kMxfp4, {ScaleType::kE8m0, 32, false}}};
}

inline Shape shape_of(const Kind& kind) {
  Shape s;
  s.format = kind.format;
  s.packing = kind.packing;
  return s;
}

// Numbers from low to high, and coins.
class Dice {
 public:
  explicit Dice(uint64_t salt) : random_(emu::options.seed + salt) {}
  int operator()(int low, int high) { return low + int(random_() % uint64_t(high - low + 1)); }
  bool coin() { return random_() % 2; }
  template <class T>
  const T& of(const std::vector<T>& all) {
    return all[random_() % all.size()];
  }
  // What changes no size.
  void throw_options(Shape& s) {
    s.bias = coin();
    s.ids_are_int64 = coin();
    s.nulls = coin();
    s.sentinels = coin();
    s.out_is_fp32 = coin();
  }

 private:
  std::mt19937_64 random_;
};

// The result is the same to the bit whatever the schedule, and on any number of multiprocessors
// from `multiprocessors` on.
inline void check_schedules(const Shape& s, int multiprocessors) {
  const uint64_t seed = emu::options.seed;
  Problem problem(s, seed);
  CHECK(problem.run().ok);
  const std::vector<char> first = problem.result();
  for (uint64_t other = 1; other <= 3; ++other) {
    emu::options.seed = seed + other;
    emu::machine.multiprocessors = multiprocessors + int(other);
    CHECK(problem.run().ok);
    CHECK(problem.result() == first);
  }
  emu::options.seed = seed;
}

// What both families of kernels for many tokens have to pass.
inline void check_every_kind(const char* isa) {
  for (const Kind& kind : kinds()) {
    for (int hidden : {264, 133}) {
      Shape s = shape_of(kind);
      s.tokens = 5;
      s.num_experts = hidden == 264 ? 1 : 2;
      s.hidden = hidden;  // 133: rows of x are no multiples of 16 bytes
      s.intermediate = hidden == 264 ? 40 : 200;
      s.sentinels = false;
      CHECK(Problem(s, 1).isa() == isa);
      run_and_check(s);
    }
  }
}
// nulls: experts that are not there, in the calls with a bias.
inline void check_types_of(Shape s, const char* isa, bool nulls) {
  s.tokens = 9;
  s.num_experts = 2;
  for (DType hidden : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (bool bias : {false, true}) {
      s.hidden_dtype = hidden;
      s.activation = Activation(int(hidden));
      s.bias = bias;
      s.ids_are_int64 = bias;
      if (nulls) s.nulls = bias;
      CHECK(Problem(s, 1).isa() == isa);
      run_and_check(s);
    }
  }
}
inline void check_every_type(const char* isa) {
  for (const Kind& kind : formats()) check_types_of(shape_of(kind), isa, false);
}
inline void check_edge_shapes() {
  const int sizes[][2] = {{1, 1}, {3, 40}, {40, 3}, {1030, 24}, {72, 1305}, {2880, 16}};
  for (const Kind& kind : formats()) {
    for (const auto& [hidden, intermediate] : sizes) {
      Shape s = shape_of(kind);
      s.tokens = 2;
      s.hidden = hidden;
      s.intermediate = intermediate;
      s.hidden_dtype = DType::kF32;
      run_and_check(s);
    }
  }
}

// An id that names no expert makes its token NaN; the next call says so, once.
inline void check_bad_id(const Shape& s) {
  for (int64_t bad : {int64_t(-2), int64_t(5)}) {
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

}  // namespace packed
