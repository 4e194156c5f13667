// SPDX-License-Identifier: Apache-2.0
// bf16 weights in plain C++.
#include "vec.h"

namespace ey::cpu {
namespace {

struct Bf16 {
  static constexpr int kSize = 2;
  static float load(const char* p) { return from_bf16(load_16(p)); }
  static float load_tail(const char* p, int) {
    return load(p);
  }  // a tail of a vector of one: never
};

constexpr Kernel bf16_scalar = kernel<Bf16>(Format::kBf16);

}  // namespace
EY_REGISTER_KERNEL(bf16_scalar);
}  // namespace ey::cpu
