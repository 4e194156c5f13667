// SPDX-License-Identifier: Apache-2.0
// mxfp4 weights x bf16 activations: int4's loop with another table (every e2m1 value is a bf16).
#include "nibbles.h"

namespace ey::cpu {
namespace {

constexpr float e2m1(int code) {
  constexpr float magnitude[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  return code < 8 ? magnitude[code] : -magnitude[code - 8];
}
constexpr Table kE2m1 = table_of(e2m1);
using Mxfp4 = Nibbles<Format::kMxfp4, 0, kE2m1>;

constexpr Kernel mxfp4_avx512_bf16 = exact_kernel<Mxfp4, multiply_directly<Mxfp4>>(0);

}  // namespace
EY_REGISTER_KERNEL(mxfp4_avx512_bf16);
}  // namespace ey::cpu
