// SPDX-License-Identifier: Apache-2.0
// csrc/cuda, compiled by g++ for the emulator: every kernel against float64, every sentence of the
// host side on machines with no driver, an old driver, no GPU, another GPU, no memory left.
#include "cuda.h"
#include "testing.h"

using testing::check_contains;
using testing::Guarded;
using testing::kActivations;

namespace {

using ey::Activation;
using ey::DType;
using ey::Format;

DType dtype_of(Format f) {
  return f == Format::kFp32 ? DType::kF32 : f == Format::kBf16 ? DType::kBF16 : DType::kF16;
}

struct Shape {
  int tokens = 7, top_k = 2, num_experts = 4, hidden = 64, intermediate = 48;
  Format format = Format::kBf16;
  DType hidden_dtype = DType::kBF16, weights_dtype = DType::kF32;
  bool out_is_fp32 = false;
  DType out_dtype() const { return out_is_fp32 ? DType::kF32 : hidden_dtype; }
  Activation activation = Activation::kSiluGlu;
  bool bias = false, interleaved = false, ids_are_int64 = false;
  bool nulls = false;     // expert 1 is not here
  bool sentinels = true;  // some ids are -1 or num_experts
  int pad = 0;            // elements between rows
  int shift = 0;          // elements behind the last row, which end at a page: moves all rows

  std::string text() const {
    char s[300];
    std::snprintf(s, sizeof s,
                  "T=%d K=%d E=%d H=%d I=%d format=%d hidden=%d weights=%d act=%d bias=%d "
                  "interleaved=%d int64=%d nulls=%d pad=%d shift=%d seed=%llu",
                  tokens, top_k, num_experts, hidden, intermediate, int(format), int(hidden_dtype),
                  int(weights_dtype), int(activation), bias, interleaved, ids_are_int64, nulls, pad,
                  shift, (unsigned long long)emu::options.seed);
    return s;
  }
};

// A call with its memory, and the answer in float64.
class Problem {
 public:
  Shape shape;
  ey::ExpertSet set{};
  ey::MoeArgs args{};
  std::vector<double> expected,
      magnitude;  // magnitude: sum of |terms|, what errors are relative to

  Problem(const Shape& s, uint64_t seed) : shape(s), random_(seed * 77 + 5) {
    const DType wtype = dtype_of(s.format);
    const size_t wsize = size_t(ey::size_of(wtype));
    const size_t gu_row = size_t(s.hidden + s.pad), down_row = size_t(s.intermediate + s.pad);
    const size_t step = s.interleaved ? 2 : 1;  // between two gate rows, in rows
    const size_t E = size_t(s.num_experts), H = size_t(s.hidden), I = size_t(s.intermediate);
    gate_.resize(E), up_.resize(E), down_.resize(E);
    for (size_t e = 0; e < E; ++e) {
      // The last row has no padding behind it: reading there would fault.
      const size_t gu_count = (2 * I - 1) * gu_row + H + size_t(s.shift);
      const size_t down_count = (H - 1) * down_row + I + size_t(s.shift);
      memory_.emplace_back(gu_count * wsize, s.shift || s.pad ? wsize : 16);
      char* const gu = memory_.back().data();
      memory_.emplace_back(down_count * wsize, s.shift || s.pad ? wsize : 16);
      char* const down = memory_.back().data();
      const size_t up_first = (s.interleaved ? 1 : I) * gu_row;
      fill(gate_[e], gu, wtype, I, H, step * gu_row, 1.0f / std::sqrt(float(s.hidden)));
      fill(up_[e], gu + up_first * wsize, wtype, I, H, step * gu_row,
           1.0f / std::sqrt(float(s.hidden)));
      fill(down_[e], down, wtype, H, I, down_row, 1.0f / std::sqrt(float(s.intermediate)));
      ey::ExpertPointers p{gu, gu + up_first * wsize, down, nullptr, nullptr, nullptr};
      if (!ey::has_gate(s.activation)) p.gate = p.up;
      biases_.emplace_back();
      if (s.bias) {
        const float* const gate_bias = bias(I);
        if (ey::has_gate(s.activation)) p.gate_bias = gate_bias;
        p.up_bias = bias(I);
        p.down_bias = bias(H);
      }
      if (s.nulls && e == 1) p = {};
      pointers_.push_back(p);
    }
    set.format = s.format;
    set.activation = s.activation;
    set.alpha = 1.702f;
    set.limit = 1.0f;
    set.num_experts = s.num_experts;
    set.hidden_size = s.hidden;
    set.intermediate_size = s.intermediate;
    set.gate_up_row_stride = int64_t(step * gu_row * wsize);
    set.down_row_stride = int64_t(down_row * wsize);

    const size_t T = size_t(s.tokens), K = size_t(s.top_k);
    x_ = Guarded(T * H * size_t(ey::size_of(s.hidden_dtype)));
    ids_ = Guarded(T * K * (s.ids_are_int64 ? 8 : 4), 8);
    weights_ = Guarded(T * K * size_t(ey::size_of(s.weights_dtype)));
    fill(xs_, x_.data(), s.hidden_dtype, T, H, H, 1.0f);
    fill(ws_, weights_.data(), s.weights_dtype, T, K, K, 1.0f);
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

  ey::Status run() {
    std::memset(out_.data(), 0xff, out_bytes_);
    const Guarded workspace(size_t(ey::cuda::workspace_bytes(args)), 256);
    return ey::cuda::moe_experts(0, args, workspace.data(), nullptr);
  }
  std::vector<char> result() const { return {out_.data(), out_.data() + out_bytes_}; }
  double got(size_t i) const { return testing::get(out_.data(), shape.out_dtype(), i); }
  bool is_real_id(int64_t id) const { return id >= 0 && id < shape.num_experts; }

  void compute_expected() {
    const size_t T = size_t(shape.tokens), K = size_t(shape.top_k), H = size_t(shape.hidden),
                 I = size_t(shape.intermediate);
    expected.assign(T * H, 0.0);
    magnitude.assign(T * H, 0.0);
    std::vector<double> h(I);
    for (size_t p = 0; p < T * K; ++p) {
      const int64_t id = chosen_[p];
      if (!is_real_id(id) || pointers_[size_t(id)].gate == nullptr) continue;
      const size_t e = size_t(id), t = p / K;
      for (size_t i = 0; i < I; ++i) {
        double g = shape.bias ? biases_[e][0][i] : 0, u = shape.bias ? biases_[e][1][i] : 0;
        for (size_t j = 0; j < H; ++j) {
          g += gate_[e][i * H + j] * xs_[t * H + j];
          u += up_[e][i * H + j] * xs_[t * H + j];
        }
        h[i] = testing::activation(set, g, u);
      }
      for (size_t j = 0; j < H; ++j) {
        double y = shape.bias ? biases_[e][2][j] : 0, size = std::fabs(y);
        for (size_t i = 0; i < I; ++i) {
          y += down_[e][j * I + i] * h[i];
          size += std::fabs(down_[e][j * I + i] * h[i]);
        }
        expected[t * H + j] += ws_[p] * y;
        magnitude[t * H + j] += std::fabs(ws_[p]) * size;
      }
    }
  }

  // Rows of tokens in nan_tokens must be NaN, all others right.
  void check(const std::vector<size_t>& nan_tokens = {}) {
    testing::where = shape.text() + " " + isa();
    compute_expected();
    // fp32 sums of a few thousand terms; the tiles also round h to bf16
    // of fp32 sums: what cancels inside of gate and up is not in `magnitude`
    const double tolerance = isa() == "cuda_tiles" ? 0x1p-8 : 8e-6;
    const size_t H = size_t(shape.hidden);
    int wrong = 0;
    double worst = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const bool nan = std::find(nan_tokens.begin(), nan_tokens.end(), i / H) != nan_tokens.end();
      const double value = got(i);
      const double allowed = testing::rounding(shape.out_dtype()) * std::fabs(expected[i]) +
                             tolerance * magnitude[i] + 1e-30;
      const double error = std::fabs(value - expected[i]);
      if (nan ? !std::isnan(value) : !(error <= allowed)) ++wrong;
      if (!nan && !(error / allowed <= worst)) worst = error / allowed;
    }
    if (wrong) {
      testing::fail("%d of %zu values are wrong, the worst by %.3g times what is allowed", wrong,
                    expected.size(), worst);
    }
    testing::where.clear();
  }

  std::string isa() const { return ey::cuda::kernel_isa(args); }

 private:
  void fill(std::vector<double>& seen, void* to, DType type, size_t rows, size_t columns,
            size_t row_elements, float scale) {
    std::normal_distribution<float> normal;
    seen.resize(rows * columns);
    for (size_t r = 0; r < rows; ++r) {
      for (size_t c = 0; c < columns; ++c) {
        seen[r * columns + c] =
            testing::put(to, type, r * row_elements + c, scale * normal(random_));
      }
    }
  }

  const float* bias(size_t n) {
    memory_.emplace_back(n * 4, 4);
    biases_.back().emplace_back();
    fill(biases_.back().back(), memory_.back().data(), DType::kF32, 1, n, n, 0.5f);
    return memory_.back().as<float>();
  }

  std::mt19937_64 random_;
  std::vector<Guarded> memory_;
  std::vector<std::vector<double>> gate_, up_, down_;
  std::vector<std::vector<std::vector<double>>> biases_;  // [expert][gate, up, down]
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

const Format kFormats[] = {Format::kBf16, Format::kFp16, Format::kFp32};
const DType kTypes[] = {DType::kBF16, DType::kF16, DType::kF32};

}  // namespace

TEST(every_format_and_activation_with_and_without_bias) {
  for (Format format : kFormats) {
    for (Activation activation : kActivations) {
      for (bool bias : {false, true}) {
        Shape s;
        s.tokens = 3;
        s.format = format;
        s.hidden_dtype = dtype_of(format);
        s.activation = activation;
        s.bias = bias;
        run_and_check(s);
      }
    }
  }
}

TEST(every_mix_of_types) {
  for (Format format : kFormats) {
    for (DType hidden : kTypes) {
      for (DType weights : kTypes) {
        Shape s;
        s.tokens = 2;
        s.hidden = 24;
        s.intermediate = 16;
        s.format = format;
        s.hidden_dtype = hidden;
        s.weights_dtype = weights;
        s.ids_are_int64 = hidden == weights;
        run_and_check(s);
      }
    }
  }
}

TEST(edge_shapes) {
  for (int tokens : {0, 1, 2, 7}) {
    for (int top_k : {1, 3, 8}) {
      Shape s;
      s.tokens = tokens;
      s.top_k = top_k;
      s.num_experts = 9;
      s.hidden = 37;
      s.intermediate = 29;
      s.nulls = true;
      s.ids_are_int64 = top_k == 3;
      run_and_check(s);
    }
  }
  const int sizes[][2] = {{1, 1}, {1, 40}, {40, 1}, {8, 264}, {264, 8}, {255, 257}, {72, 33}};
  for (const auto& [hidden, intermediate] : sizes) {
    Shape s;
    s.tokens = 2;
    s.hidden = hidden;
    s.intermediate = intermediate;
    s.bias = true;
    run_and_check(s);
  }
}

TEST(hidden_size_longer_than_shared_memory_holds) {
  for (Format format : kFormats) {
    Shape s;
    s.tokens = 2;
    s.hidden = 2 * 2048 + 40;  // three stages, the last with a tail
    s.intermediate = 9;
    s.format = format;
    s.hidden_dtype = DType::kF32;
    run_and_check(s);
  }
}

TEST(strides_and_alignments) {
  for (Format format : kFormats) {
    for (int shift : {0, 1, 4}) {
      for (int pad : {0, 3, 8}) {
        for (bool interleaved : {false, true}) {
          Shape s;
          s.tokens = 2;
          s.hidden = 48;
          s.intermediate = 40;
          s.format = format;
          s.shift = shift;
          s.pad = pad;
          s.interleaved = interleaved;
          run_and_check(s);
        }
      }
    }
  }
}

TEST(experts_hit_by_everyone_or_by_nobody) {
  for (int id : {0, 3, -1}) {
    Shape s;
    s.tokens = 5;
    s.hidden_dtype = DType::kF32;
    Problem problem(s, emu::options.seed);
    for (size_t p = 0; p < size_t(s.tokens * s.top_k); ++p) problem.set_id(p, id);
    CHECK(problem.run().ok);
    problem.check();
  }
}

TEST(no_choice_at_all_gives_zeros) {
  Shape s;
  s.top_k = 0;
  run_and_check(s);
}

TEST(random_problems) {
  std::mt19937_64 random(emu::options.seed + 99);
  const auto pick = [&](int low, int high) {
    return low + int(random() % uint64_t(high - low + 1));
  };
  for (int i = 0; i < 25; ++i) {
    Shape s;
    s.tokens = pick(1, 9);
    s.top_k = pick(1, 8);
    s.num_experts = pick(2, 12);
    s.hidden = pick(1, 150);
    s.intermediate = pick(1, 100);
    s.format = kFormats[random() % 3];
    s.hidden_dtype = kTypes[random() % 3];
    s.weights_dtype = kTypes[random() % 3];
    s.activation = kActivations[random() % std::size(kActivations)];
    s.bias = random() % 2;
    s.interleaved = random() % 2;
    s.ids_are_int64 = random() % 2;
    s.nulls = random() % 2;
    s.sentinels = random() % 2;
    s.out_is_fp32 = random() % 2;
    s.pad = pick(0, 1) * pick(1, 9);
    s.shift = pick(0, 1) * pick(1, 9);
    run_and_check(s);
  }
}

TEST(the_schedule_does_not_change_a_bit) {
  for (DType hidden : {DType::kF32, DType::kBF16}) {  // rows, tiles
    Shape s;
    s.hidden_dtype = hidden;
    s.tokens = 5;
    s.top_k = 4;
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

TEST(an_id_out_of_range_makes_its_row_nan_and_is_reported_once) {
  for (bool wide : {false, true}) {
    for (int64_t bad : {int64_t(-2), int64_t(5), wide ? int64_t(1) << 40 : int64_t(INT32_MIN)}) {
      Shape s;
      s.tokens = 4;
      s.ids_are_int64 = wide;
      s.hidden = bad == 5 ? 37 : 40;  // rows, tiles
      Problem problem(s, emu::options.seed);
      const auto good = ey::cuda::take_bad_id(problem.set);
      CHECK(good.ok);
      problem.set_id(5, bad);  // token 2
      CHECK(problem.run().ok);
      problem.check({2});
      const ey::Status next = problem.run();
      CHECK(!next.ok);
      check_contains(next.what, "expected -1 to 4");
      check_contains(next.what, "at token 2");
      const int64_t shown = std::min<int64_t>(bad, INT32_MAX);
      check_contains(next.what, ("got " + std::to_string(shown) + " at").c_str());
      problem.set_id(5, 0);
      CHECK(problem.run().ok);
      problem.check();
    }
  }
}

TEST(tiles_of_every_width) {
  const int widths[][2] = {{8, 5}, {20, 2}, {40, 3}, {70, 2}};  // tokens, experts
  for (const auto& [tokens, experts] : widths) {
    for (bool bias : {false, true}) {
      Shape s;
      s.tokens = tokens;
      s.num_experts = experts;
      s.hidden = 392;  // more stages than shared memory holds, and a tail
      s.intermediate = bias ? 24 : 328;
      s.bias = bias;
      s.interleaved = bias;
      s.ids_are_int64 = bias;
      s.nulls = experts == 5;
      Problem problem(s, emu::options.seed);
      CHECK(problem.isa() == "cuda_tiles");
      const ey::Status status = problem.run();
      if (!status.ok) testing::fail("%s (%s)", status.what, emu::machine.failure.c_str());
      problem.check();
    }
  }
}

TEST(tiles_are_left_alone_where_they_do_not_fit) {
  Shape s;  // 14 pairs for 4 experts
  const auto isa = [](const Shape& shape) { return Problem(shape, 1).isa(); };
  CHECK(isa(s) == "cuda_tiles");
  for (auto change : {+[](Shape& t) { t.tokens = 2; }, +[](Shape& t) { t.hidden = 60; },
                      +[](Shape& t) { t.intermediate = 44; }, +[](Shape& t) { t.shift = 1; },
                      +[](Shape& t) { t.pad = 4; }, +[](Shape& t) { t.hidden_dtype = DType::kF32; },
                      +[](Shape& t) { t.format = Format::kFp16; }}) {
    Shape other = s;
    change(other);
    CHECK(isa(other) == "cuda_rows");
  }
}

TEST(more_experts_than_threads_route) {
  Shape s;
  s.tokens = 300;
  s.top_k = 4;
  s.num_experts = 600;
  s.hidden = 8;
  s.intermediate = 8;
  s.nulls = true;
  Problem problem(s, emu::options.seed);
  CHECK(problem.isa() == "cuda_tiles");
  CHECK(problem.run().ok);
  problem.check();
}

TEST(sizes_beyond_the_grid_are_refused) {
  Problem problem(Shape{}, 1);
  problem.set.hidden_size = int64_t(1) << 30;
  const ey::Status status = ey::cuda::moe_experts(0, problem.args, nullptr, nullptr);
  CHECK(!status.ok);
  check_contains(status.what, "no CUDA kernel serves sizes that large");
}

// The host side, on other machines.

TEST(without_a_driver_everything_answers_with_a_sentence) {
  emu::machine.driver_version = 0;
  emu::machine.count_error = cudaErrorInsufficientDriver;
  int count = 7;
  const ey::Status counted = ey::cuda::device_count(&count);
  CHECK(count == 0 && !counted.ok);
  check_contains(counted.what,
                 "no NVIDIA driver on this machine (CUDA error 35: CUDA driver version is "
                 "insufficient for CUDA runtime version); the CPU kernels work without one");
  CHECK(ey::cuda::driver_version() == 0);
  ey::cuda::DeviceFacts facts;
  check_contains(ey::cuda::device_facts(0, &facts).what, "no NVIDIA driver");
  check_contains(ey::cuda::prepare(0).what, "no NVIDIA driver");
  ey::ExpertSet set{};
  set.num_experts = 1;
  const ey::ExpertPointers expert{};
  check_contains(ey::cuda::make_table(0, &expert, &set).what, "no NVIDIA driver");
  CHECK(ey::cuda::free_table(0, &set).ok);
  CHECK(ey::cuda::take_bad_id(set).ok);
}

TEST(an_old_driver_is_named) {
  emu::machine.driver_version = 12040;
  emu::machine.count_error = cudaErrorInsufficientDriver;
  int count;
  check_contains(ey::cuda::device_count(&count).what,
                 "serves CUDA up to 12.4 and this build needs 13.0");
}

TEST(a_driver_without_a_gpu_is_named) {
  emu::machine.count_error = cudaErrorNoDevice;
  int count;
  check_contains(ey::cuda::device_count(&count).what, "CUDA_VISIBLE_DEVICES");
  emu::machine.count_error = cudaErrorLaunchFailure;
  check_contains(ey::cuda::device_count(&count).what, "cannot be used on this machine");
}

TEST(a_device_that_is_not_there_is_named) {
  emu::machine.devices = 2;
  ey::cuda::DeviceFacts facts;
  check_contains(ey::cuda::device_facts(2, &facts).what, "has 2 CUDA devices, cuda:0 to cuda:1");
  CHECK(!ey::cuda::device_facts(-1, &facts).ok);
  CHECK(ey::cuda::device_facts(1, &facts).ok);
  CHECK(std::string(facts.name) == "Emulated GPU" && facts.major == 8 && facts.free_bytes > 0);
  CHECK(emu::machine.device == 0);  // as it was
}

TEST(a_call_runs_on_its_own_device_and_leaves_the_current_one) {
  emu::machine.devices = 2;
  Problem problem(Shape{}, 1);
  CHECK(ey::cuda::prepare(1).ok);
  const Guarded workspace(size_t(ey::cuda::workspace_bytes(problem.args)), 256);
  CHECK(ey::cuda::moe_experts(1, problem.args, workspace.data(), nullptr).ok);
  CHECK(emu::machine.launch_device == 1 && emu::machine.device == 0);
  problem.check();
  const ey::Status none = ey::cuda::moe_experts(2, problem.args, workspace.data(), nullptr);
  check_contains(none.what, "cudaSetDevice");
  CHECK(emu::machine.device == 0);
}

TEST(a_launch_that_fails_is_reported) {
  Problem problem(Shape{}, 1);
  emu::machine.has_code = false;
  check_contains(problem.run().what, "launching the CUDA experts kernels: CUDA error 209");
}

TEST(an_architecture_without_code_is_named) {
  emu::machine.has_code = false;
  emu::machine.major = 7;
  emu::machine.minor = 5;
  const std::string old_card = ey::cuda::prepare(0).what;
  check_contains(old_card, "has compute capability 7.5 and this build has code for");
  check_contains(old_card, "8.0 is the oldest");
  emu::machine.major = 12;
  emu::machine.minor = 1;
  check_contains(ey::cuda::prepare(0).what, "rebuild with that architecture");
}

TEST(make_table_leaves_nothing_behind_when_memory_runs_out) {
  for (int allocations : {0, 1}) {
    emu::machine.allocations_left = allocations;
    ey::ExpertSet set{};
    set.num_experts = 3;
    const ey::ExpertPointers experts[3] = {};
    const ey::Status status = ey::cuda::make_table(0, experts, &set);
    check_contains(status.what, "out of memory");
    CHECK(set.experts == nullptr && set.bad_id == nullptr);
    CHECK(emu::machine.allocated.empty());
  }
  emu::machine.allocations_left = -1;
  {
    Problem problem(Shape{}, 1);
    CHECK(emu::machine.allocated.size() == 2);
  }
  CHECK(emu::machine.allocated.empty());
}

TEST(number_conversions) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float f = ey::cuda::ptx::f16_to_float(uint16_t(bits));
    const uint16_t back = ey::cuda::ptx::float_to_f16(f);
    CHECK(back == bits || std::isnan(f));
  }
  CHECK(ey::cuda::ptx::float_to_f16(65519.0f) == 0x7bff);    // the largest
  CHECK(ey::cuda::ptx::float_to_f16(65520.0f) == 0x7c00);    // infinity
  CHECK(ey::cuda::ptx::float_to_f16(0x1.002p0f) == 0x3c00);  // a tie goes to even
  CHECK(ey::cuda::ptx::float_to_f16(0x1.006p0f) == 0x3c02);
  CHECK(ey::cuda::ptx::float_to_bf16(0x1.01p0f) == 0x3f80);
  CHECK(ey::cuda::ptx::float_to_bf16(0x1.03p0f) == 0x3f82);
}

int main(int argc, char** argv) { return testing::main_of(argc, argv); }
