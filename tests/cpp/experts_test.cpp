// SPDX-License-Identifier: Apache-2.0
// Every kernel that this CPU can run, on odd shapes, against double precision. Each weight matrix
// is an allocation of exactly its size, so that an address sanitizer sees a read past a row's end.
#include "cpu/experts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "cpu/convert.h"
#include "cpu/nodes.h"
#include "packing.h"
#include "registry.h"

namespace {

using namespace ey;

struct Matrix {
  std::vector<double> exact;
  std::unique_ptr<char[]> raw;

  Matrix(int64_t count, double scale, Format format, std::mt19937& random) : exact(count) {
    std::normal_distribution<double> normal(0, scale);
    const int64_t size = size_of(format);
    raw.reset(new char[count * size]);
    for (int64_t i = 0; i < count; ++i) {
      const float v = static_cast<float>(normal(random));
      if (format == Format::kFp32) {
        std::memcpy(raw.get() + i * size, &v, sizeof v);
        exact[i] = v;
      } else {
        const bool bf16 = format == Format::kBf16;
        const uint16_t half = bf16 ? cpu::to_bf16(v) : cpu::to_fp16(v);
        std::memcpy(raw.get() + i * size, &half, sizeof half);
        exact[i] = bf16 ? cpu::from_bf16(half) : cpu::from_fp16(half);
      }
    }
  }
};

// rows x k codes with a scale (and a zero) a group, and the numbers they stand for.
struct Codes {
  std::vector<double> exact;
  std::vector<uint8_t> codes;
  std::vector<char> scales, zeros;

  Codes(int64_t rows, const BlockShape& shape, std::mt19937& random) : exact(rows * shape.k) {
    const int64_t k = shape.k, groups = (k + shape.group() - 1) / shape.group();
    const int64_t size = size_of(shape.packing.scale_type);
    const double gain = 1 / std::sqrt(static_cast<double>(k));
    scales.resize(rows * groups * size);
    zeros.resize(rows * groups * size);
    if (shape.format == Format::kBf16) {
      const Matrix m(rows * k, gain, Format::kBf16, random);
      exact = m.exact;
      codes.assign(m.raw.get(), m.raw.get() + rows * k * 2);
      return;
    }
    codes.resize(rows * k);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const auto at = (row * groups + g) * size;
        double zero = shape.format == Format::kInt8 ? 128 : shape.format == Format::kInt4 ? 8 : 0;
        double scale;
        if (shape.packing.scale_type == ScaleType::kE8m0) {
          const auto e = static_cast<uint8_t>(118 + random() % 8);
          scales[at] = static_cast<char>(e);
          scale = std::ldexp(1.0, e - 127);
        } else {
          const double unit = shape.format == Format::kInt8 ? 60 : 5;
          const float v = static_cast<float>(gain / unit * (0.5 + random() % 100 / 100.0));
          scale = stored(v, shape.packing.scale_type, scales.data() + at);
          if (shape.packing.zeros) {
            zero = stored(static_cast<float>(random() % 15), shape.packing.scale_type,
                          zeros.data() + at);
          }
        }
        for (int64_t c = g * shape.group(); c < std::min(k, (g + 1) * shape.group()); ++c) {
          uint8_t code = static_cast<uint8_t>(random());
          if (step_k(shape.format) == 8) code &= 15;
          if (shape.format == Format::kFp8 && (code & 0x7F) > 0x50) code &= 0x8F;
          codes[row * k + c] = code;
          exact[row * k + c] = scale * (number(shape.format, code) - zero);
        }
      }
    }
  }

  static double stored(float v, ScaleType type, char* to) {
    if (type == ScaleType::kFp32) {
      std::memcpy(to, &v, sizeof v);
      return v;
    }
    const uint16_t half = type == ScaleType::kBf16 ? cpu::to_bf16(v) : cpu::to_fp16(v);
    std::memcpy(to, &half, sizeof half);
    return type == ScaleType::kBf16 ? cpu::from_bf16(half) : cpu::from_fp16(half);
  }

  static double number(Format format, uint8_t code) {
    constexpr double e2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    if (format == Format::kMxfp4) return code & 8 ? -e2m1[code & 7] : e2m1[code & 7];
    if (format != Format::kFp8) return code;
    const int e = code >> 3 & 15, m = code & 7;
    const double v = e == 0 ? std::ldexp(m, -9) : std::ldexp(8 + m, e - 10);
    return code & 0x80 ? -v : v;
  }

  std::array<uintptr_t, 3> source() const {
    return {reinterpret_cast<uintptr_t>(codes.data()), reinterpret_cast<uintptr_t>(scales.data()),
            reinterpret_cast<uintptr_t>(zeros.data())};
  }
};

// A blob of exactly its size, aligned as kernels demand.
struct Blob {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> bytes;
  explicit Blob(int64_t size) : bytes(static_cast<char*>(std::aligned_alloc(64, size))) {}
};

struct Shape {
  int64_t tokens, hidden, inner, experts, top_k;
};

// Weights of a kernel's format: where it finds them, and what they are.
struct Weights {
  ExpertSet set{};
  std::vector<Matrix> matrices;
  std::vector<Blob> blobs;
  std::vector<ExpertPointers> pointers;
  std::vector<std::vector<double>> gate, up, down;

  Weights(const cpu::Kernel& kernel, const Packing& packing, const Shape& s, std::mt19937& random) {
    set.format = kernel.format;
    set.layout = kernel.layout;
    set.mode = kernel.mode;
    set.packing = packing;
    set.activation = Activation::kSiluGlu;
    set.num_experts = s.experts;
    set.hidden_size = s.hidden;
    set.intermediate_size = s.inner;
    if (kernel.layout == Layout::kRows) {
      set.gate_up_row_stride = s.hidden * size_of(kernel.format);
      set.down_row_stride = s.inner * size_of(kernel.format);
    }
    for (int64_t e = 0; e < s.experts; ++e) {
      kernel.layout == Layout::kRows ? add_rows(s, random) : add_blocks(s, random);
    }
    set.experts = pointers.data();
  }

 private:
  void add_rows(const Shape& s, std::mt19937& random) {
    const auto add = [&](int64_t count, int64_t k, std::vector<std::vector<double>>& exact) {
      matrices.emplace_back(count, 1 / std::sqrt(static_cast<double>(k)), set.format, random);
      exact.push_back(matrices.back().exact);
      return matrices.back().raw.get();
    };
    ExpertPointers p{};
    p.gate = add(s.inner * s.hidden, s.hidden, gate);
    p.up = add(s.inner * s.hidden, s.hidden, up);
    p.down = add(s.hidden * s.inner, s.inner, down);
    pointers.push_back(p);
  }

  void add_blocks(const Shape& s, std::mt19937& random) {
    const BlockShape w13{set.format, set.packing, s.hidden}, w2{set.format, set.packing, s.inner};
    const Codes g(s.inner, w13, random), u(s.inner, w13, random), d(s.hidden, w2, random);
    gate.push_back(g.exact);
    up.push_back(u.exact);
    down.push_back(d.exact);
    blobs.emplace_back(w13_blocks(s.inner, true) * w13.block_bytes());
    const std::array<uintptr_t, 3> both[] = {g.source(), u.source()};
    pack_matrices(w13, s.inner, both, 2, blobs.back().bytes.get());
    ExpertPointers p{};
    p.gate = p.up = blobs.back().bytes.get();
    blobs.emplace_back(w2_blocks(s.hidden) * w2.block_bytes());
    const std::array<uintptr_t, 3> one = d.source();
    pack_matrices(w2, s.hidden, &one, 1, blobs.back().bytes.get());
    p.down = blobs.back().bytes.get();
    pointers.push_back(p);
  }
};

// Relative L2 error of one call.
double error_of(const cpu::Kernel& kernel, const Packing& packing, const Shape& s, int threads) {
  std::mt19937 random(static_cast<unsigned>(s.tokens * 31 + s.hidden));
  const Weights w(kernel, packing, s, random);
  const Matrix x(s.tokens * s.hidden, 1, Format::kBf16, random);
  std::vector<int64_t> ids(s.tokens * s.top_k);
  std::vector<float> weights(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int64_t>(random() % (s.experts + 1));  // experts itself means none
    weights[i] = 0.1f + static_cast<float>(random() % 100) / 100;
  }
  std::unique_ptr<uint16_t[]> out(new uint16_t[s.tokens * s.hidden]);
  std::memset(out.get(), 0xFF, s.tokens * s.hidden * 2);  // NaN
  const MoeArgs args = {.num_tokens = s.tokens,
                        .top_k = s.top_k,
                        .hidden_states = x.raw.get(),
                        .out = out.get(),
                        .hidden_dtype = DType::kBF16,
                        .topk_ids = ids.data(),
                        .ids_are_int64 = true,
                        .topk_weights = weights.data(),
                        .weights_dtype = DType::kF32,
                        .set = &w.set};
  const Status status = cpu::moe_experts(kernel, args, threads);
  if (!status.ok) {
    std::printf("%s\n", status.what);
    return INFINITY;
  }

  double wrong = 0, norm = 0;
  std::vector<double> h(s.inner), y(s.hidden);
  for (int64_t t = 0; t < s.tokens; ++t) {
    std::fill(y.begin(), y.end(), 0.0);
    for (int64_t k = 0; k < s.top_k; ++k) {
      const int64_t e = ids[t * s.top_k + k];
      if (e == s.experts) continue;
      for (int64_t i = 0; i < s.inner; ++i) {
        double g = 0, u = 0;
        for (int64_t c = 0; c < s.hidden; ++c) {
          g += w.gate[e][i * s.hidden + c] * x.exact[t * s.hidden + c];
          u += w.up[e][i * s.hidden + c] * x.exact[t * s.hidden + c];
        }
        h[i] = g / (1 + std::exp(-g)) * u;
      }
      for (int64_t c = 0; c < s.hidden; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < s.inner; ++i) sum += w.down[e][c * s.inner + i] * h[i];
        y[c] += weights[t * s.top_k + k] * sum;
      }
    }
    for (int64_t c = 0; c < s.hidden; ++c) {
      const double d = cpu::from_bf16(out[t * s.hidden + c]) - y[c];
      wrong += d * d;
      norm += y[c] * y[c];
    }
  }
  return std::isnan(wrong) ? INFINITY : norm > 0 ? std::sqrt(wrong / norm) : std::sqrt(wrong);
}

}  // namespace

// The packings to test a kernel with.
std::vector<Packing> packings_of(const cpu::Kernel& kernel) {
  if (kernel.layout == Layout::kRows) return {{}};
  switch (kernel.format) {
    case Format::kBf16:
      return {{ScaleType::kNone, 0, false}};
    case Format::kMxfp4:
      return {{ScaleType::kE8m0, 32, false}};
    case Format::kInt4:
      return {{ScaleType::kBf16, 128, false},
              {ScaleType::kFp16, 32, true},
              {ScaleType::kFp32, 64, true}};
    default:
      return {{ScaleType::kFp32, 0, false},
              {ScaleType::kBf16, 128, false},
              {ScaleType::kFp16, 32, false}};
  }
}

int main() {
  const Shape shapes[] = {{1, 67, 35, 3, 2},   {5, 64, 48, 4, 3},   {40, 130, 37, 2, 2},
                          {33, 2113, 9, 2, 1}, {200, 40, 70, 2, 2}, {0, 32, 16, 2, 1}};
  int failures = 0, runs = 0;
  for (const cpu::Kernel* kernel : kernels()) {
    if (!runnable(*kernel)) continue;
    const double tolerance = kernel->mode == Mode::kFast ? 3e-2 : 3.5e-3;
    for (const Packing& packing : packings_of(*kernel)) {
      for (const Shape& shape : shapes) {
        for (const auto& [threads, nodes] : {std::pair{1, 1}, std::pair{3, 1}, std::pair{3, 2}}) {
          cpu::pretend_nodes(nodes);
          const double error = error_of(*kernel, packing, shape, threads);
          ++runs;
          if (error <= tolerance) continue;
          ++failures;
          std::printf("%s, groups of %lld: %lld tokens, %lld x %lld, %d nodes: error %g\n",
                      name_of(*kernel).c_str(), static_cast<long long>(packing.group_size),
                      static_cast<long long>(shape.tokens), static_cast<long long>(shape.hidden),
                      static_cast<long long>(shape.inner), nodes, error);
        }
      }
    }
  }
  std::printf("%d passed, %d failed\n", runs - failures, failures);
  return failures != 0 || runs == 0;
}
