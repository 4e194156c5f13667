// SPDX-License-Identifier: Apache-2.0
// fp16 weights in plain C++.
#include "vec.h"

namespace ey::cpu {
namespace {

struct Fp16 {
  static constexpr int kSize = 2;
  static float load(const char* p) { return from_fp16(load_16(p)); }
  static float load_tail(const char* p, int) {
    return load(p);
  }  // a tail of a vector of one: never
};

constexpr Kernel fp16_scalar = kernel<Fp16>(Format::kFp16);

}  // namespace
EY_REGISTER_KERNEL(fp16_scalar);
}  // namespace ey::cpu
