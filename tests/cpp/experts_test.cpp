// SPDX-License-Identifier: Apache-2.0
// Every kernel that this CPU can run, on odd shapes, against double precision. Each weight matrix
// is an allocation of exactly its size, so that an address sanitizer sees a read past a row's end.
#include "cpu/experts.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/convert.h"
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

struct Shape {
  int64_t tokens, hidden, inner, experts, top_k;
};

// Relative L2 error of one call.
double error_of(const cpu::Kernel& kernel, const Shape& s, int threads) {
  std::mt19937 random(static_cast<unsigned>(s.tokens * 31 + s.hidden));
  const Format f = kernel.format;
  std::vector<Matrix> gate, up, down;
  std::vector<ExpertPointers> pointers;
  for (int64_t e = 0; e < s.experts; ++e) {
    gate.emplace_back(s.inner * s.hidden, 1 / std::sqrt(s.hidden), f, random);
    up.emplace_back(s.inner * s.hidden, 1 / std::sqrt(s.hidden), f, random);
    down.emplace_back(s.hidden * s.inner, 1 / std::sqrt(s.inner), f, random);
    pointers.push_back({.gate = gate[e].raw.get(),
                        .up = up[e].raw.get(),
                        .down = down[e].raw.get(),
                        .gate_bias = nullptr,
                        .up_bias = nullptr,
                        .down_bias = nullptr});
  }
  const Matrix x(s.tokens * s.hidden, 1, Format::kBf16, random);
  std::vector<int64_t> ids(s.tokens * s.top_k);
  std::vector<float> weights(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int64_t>(random() % (s.experts + 1));  // experts itself means none
    weights[i] = 0.1f + static_cast<float>(random() % 100) / 100;
  }
  ExpertSet set{};
  set.format = f;
  set.activation = Activation::kSiluGlu;
  set.num_experts = s.experts;
  set.hidden_size = s.hidden;
  set.intermediate_size = s.inner;
  set.gate_up_row_stride = s.hidden * size_of(f);
  set.down_row_stride = s.inner * size_of(f);
  set.experts = pointers.data();
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
                        .set = &set};
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
          g += gate[e].exact[i * s.hidden + c] * x.exact[t * s.hidden + c];
          u += up[e].exact[i * s.hidden + c] * x.exact[t * s.hidden + c];
        }
        h[i] = g / (1 + std::exp(-g)) * u;
      }
      for (int64_t c = 0; c < s.hidden; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < s.inner; ++i) sum += down[e].exact[c * s.inner + i] * h[i];
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

int main() {
  const Shape shapes[] = {{1, 67, 35, 3, 2},   {5, 64, 48, 4, 3},   {40, 130, 37, 2, 2},
                          {33, 2113, 9, 2, 1}, {200, 40, 70, 2, 2}, {0, 32, 16, 2, 1}};
  int failures = 0, runs = 0;
  for (const cpu::Kernel* kernel : kernels()) {
    if (!runnable(*kernel)) continue;
    for (const Shape& shape : shapes) {
      for (const int threads : {1, 3}) {
        const double error = error_of(*kernel, shape, threads);
        ++runs;
        if (error <= 3.5e-3) continue;
        ++failures;
        std::printf("%s_%s: %lld tokens, %lld x %lld: error %g\n", name_of(kernel->format),
                    kernel->isa, static_cast<long long>(shape.tokens),
                    static_cast<long long>(shape.hidden), static_cast<long long>(shape.inner),
                    error);
      }
    }
  }
  std::printf("%d passed, %d failed\n", runs - failures, failures);
  return failures != 0 || runs == 0;
}
