// SPDX-License-Identifier: Apache-2.0
// int4 weights x bf16 activations: a step is 2 loads, 6 shifts, 8 table look-ups and 8 dot products
// a token. With 12 tokens 96 dots (48 cycles) hide the rest; with one token it is 22 instructions
// for 128 bytes of codes, faster than memory brings them.
#include "nibbles.h"

namespace ey::cpu {
namespace {

constexpr Table kInt4 = table_of([](int code) { return static_cast<float>(code - 8); });
using Int4 = Nibbles<Format::kInt4, 8, kInt4>;

constexpr Kernel int4_avx512_bf16 = exact_kernel<Int4, multiply_directly<Int4>>(0);

}  // namespace
EY_REGISTER_KERNEL(int4_avx512_bf16);
}  // namespace ey::cpu
