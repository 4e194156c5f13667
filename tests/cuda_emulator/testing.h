// SPDX-License-Identifier: Apache-2.0
// What the emulated tests share: named cases, checks, memory that faults past its end, and numbers.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "moe.h"

namespace testing {

inline constexpr ey::Activation kActivations[] = {ey::Activation::kSiluGlu,
                                                  ey::Activation::kGeluTanhGlu,
                                                  ey::Activation::kSwigluOai,
                                                  ey::Activation::kSiluGluClampBefore,
                                                  ey::Activation::kSiluGluClampAfter,
                                                  ey::Activation::kSoftcapGlu,
                                                  ey::Activation::kRelu2};

// moe.h's, in float64.
inline double activation(const ey::ExpertSet& set, double g, double u) {
  using ey::Activation;
  const double alpha = set.alpha, limit = set.limit;
  const auto silu = [](double x) { return x / (1 + std::exp(-x)); };
  const auto clamped = [&] { return std::clamp(u, -limit, limit); };
  switch (set.activation) {
    case Activation::kSiluGlu:
      return silu(g) * u;
    case Activation::kGeluTanhGlu:
      return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
    case Activation::kSwigluOai:
      g = std::min(g, limit);
      return (clamped() + 1) * g / (1 + std::exp(-alpha * g));
    case Activation::kSiluGluClampBefore:
      return silu(std::min(g, limit)) * clamped();
    case Activation::kSiluGluClampAfter:
      return std::min(silu(g), limit) * clamped();
    case Activation::kSoftcapGlu:
      return alpha * std::tanh(g / alpha) / (1 + std::exp(-g)) * limit * std::tanh(u / limit);
    case Activation::kRelu2:
      return std::max(u, 0.0) * std::max(u, 0.0);
  }
  abort();
}

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline int failures = 0;
inline bool stop_at_first = false;
inline std::string where;  // the problem under test, printed with a failure

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};
#define TEST(name)                                       \
  static void name();                                    \
  static testing::Register register_##name(#name, name); \
  static void name()

__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  ++failures;
  std::printf("FAIL ");
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  if (!where.empty()) std::printf("\n     in %s", where.c_str());
  std::printf("\n");
  if (stop_at_first) std::exit(1);
}
#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) testing::fail("%s:%d: %s", __FILE__, __LINE__, #condition); \
  } while (0)

inline void check_contains(const std::string& text, const char* part) {
  if (text.find(part) == std::string::npos) {
    fail("expected \"%s\" in \"%s\"", part, text.c_str());
  }
}

// Memory whose end (rounded up to the alignment) lies on a page that faults; starts as 0xff.
class Guarded {
 public:
  Guarded() = default;
  explicit Guarded(size_t bytes, size_t alignment = 2) {
    const size_t page = size_t(getpagesize());
    mapped_ = (bytes + alignment + page - 1) / page * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) abort();
    data_ = base_ + mapped_ - page - (bytes + alignment - 1) / alignment * alignment;
    std::memset(base_, 0xff, mapped_ - page);
  }
  ~Guarded() {
    if (base_) munmap(base_, mapped_);
  }
  Guarded(Guarded&& o) noexcept { *this = std::move(o); }
  Guarded& operator=(Guarded&& o) noexcept {
    std::swap(base_, o.base_);
    std::swap(data_, o.data_);
    std::swap(mapped_, o.mapped_);
    return *this;
  }
  char* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char *base_ = nullptr, *data_ = nullptr;
  size_t mapped_ = 0;
};

// Writes the value as the type, and returns what the type made of it.
inline double put(void* array, ey::DType type, size_t i, float value) {
  switch (type) {
    case ey::DType::kF32:
      static_cast<float*>(array)[i] = value;
      return value;
    case ey::DType::kBF16: {
      const uint16_t bits = ey::cuda::ptx::float_to_bf16(value);
      static_cast<uint16_t*>(array)[i] = bits;
      return std::bit_cast<float>(uint32_t(bits) << 16);
    }
    case ey::DType::kF16: {
      const uint16_t bits = ey::cuda::ptx::float_to_f16(value);
      static_cast<uint16_t*>(array)[i] = bits;
      return ey::cuda::ptx::f16_to_float(bits);
    }
  }
  abort();
}

inline double get(const void* array, ey::DType type, size_t i) {
  switch (type) {
    case ey::DType::kF32:
      return static_cast<const float*>(array)[i];
    case ey::DType::kBF16:
      return std::bit_cast<float>(uint32_t(static_cast<const uint16_t*>(array)[i]) << 16);
    case ey::DType::kF16:
      return ey::cuda::ptx::f16_to_float(static_cast<const uint16_t*>(array)[i]);
  }
  abort();
}

// Half of the type's last place, relative.
inline double rounding(ey::DType type) {
  return type == ey::DType::kF32 ? 0x1p-24 : type == ey::DType::kBF16 ? 0x1p-8 : 0x1p-11;
}

// --seed N picks schedules and problems; --stop ends at the first failure; further arguments pick
// cases whose names contain them.
inline int main_of(int argc, char** argv) {
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--seed" && i + 1 < argc) {
      emu::options.seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::string(argv[i]) == "--stop") {
      stop_at_first = true;
    } else {
      wanted.emplace_back(argv[i]);
    }
  }
  int ran = 0;
  for (const Case& c : cases()) {
    bool run = wanted.empty();
    for (const auto& w : wanted) run |= std::string(c.name).find(w) != std::string::npos;
    if (!run) continue;
    const int before = failures;
    where.clear();
    const emu::Machine machine = emu::machine;
    c.run();
    emu::machine = machine;
    std::printf("%s %s\n", failures == before ? "ok  " : "BAD ", c.name);
    std::fflush(stdout);
    ++ran;
  }
  std::printf("%d cases, %d failures\n", ran, failures);
  return failures || ran == 0;
}

}  // namespace testing
