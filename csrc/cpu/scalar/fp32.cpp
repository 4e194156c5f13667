// SPDX-License-Identifier: Apache-2.0
// fp32 weights in plain C++.
#include "vec.h"

namespace ey::cpu {
namespace {

struct Fp32 {
  static constexpr int kSize = 4;
  static float load(const char* p) {
    float v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static float load_tail(const char* p, int) {
    return load(p);
  }  // a tail of a vector of one: never
};

constexpr Kernel fp32_scalar = kernel<Fp32>(Format::kFp32);

}  // namespace
EY_REGISTER_KERNEL(fp32_scalar);
}  // namespace ey::cpu
