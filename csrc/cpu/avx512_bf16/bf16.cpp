// SPDX-License-Identifier: Apache-2.0
// bf16 weights x bf16 activations on AVX-512 BF16: vdpbf16ps adds two products to each fp32 lane.
//
// Few tokens of an expert: this file; many: panel.h.
// Tile: 4 rows x 6 tokens = 24 accumulators + 4 weight vectors + 1 activation of 32 zmm. A step of
// 32 values is 24 vdpbf16ps (12 cycles at two a cycle) against 10 loads (5 cycles).
// h is rounded to bf16 once: the only rounding between the input and the last sum. vdpbf16ps itself
// takes subnormal inputs and results as zero.
#include "../activation.h"
#include "../avx512/floats.h"
#include "../convert.h"
#include "../dot_tile.h"
#include "../features.h"
#include "../probe.h"
#include "panel.h"
#include "vec.h"

namespace ey::cpu {
namespace {

struct Bf16 {
  static constexpr int kSize = 2;
  static Vec::W load(const char* p) { return reinterpret_cast<Vec::W>(_mm512_loadu_si512(p)); }
  static Vec::W load_tail(const char* p, int n) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
    return reinterpret_cast<Vec::W>(_mm512_maskz_loadu_epi16(mask, p));
  }
};

struct FloatsToBf16 : Floats {
  using H = uint16_t;
  static void store_h(H* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
};

// dtype is bf16: the kernel serves no other (bf16_inputs)
void load_row(const LoadRowArgs& a) {
  const int64_t n = a.shape.k;
  __builtin_memcpy(a.row, a.from, n * sizeof(uint16_t));
  __builtin_memset(a.row + n * sizeof(uint16_t), 0, (round_up(n, kRowPad) - n) * sizeof(uint16_t));
}

void multiply(const MultiplyArgs& a) {
  if (a.many_tokens) {
    multiply_panels<sizeof(uint16_t), pack, panel>(a);
  } else {
    multiply_rows<rows<Vec, Bf16>>(a);
  }
}

int64_t longest_panel(int64_t k) { return panel_bytes(k < kPanelK ? k : kPanelK); }

constexpr Kernel bf16_avx512_bf16 = {.isa = "avx512_bf16",
                                     .format = Format::kBf16,
                                     .layout = Layout::kRows,
                                     .mode = Mode::kExact,
                                     .needs = kFeatureAvx512 | kFeatureAvx512Bf16,
                                     .rank = 3,
                                     .bf16_inputs = true,
                                     .row_bytes = padded_row_bytes<sizeof(uint16_t)>,
                                     .load_row = load_row,
                                     .load_group = nullptr,
                                     .h_size = sizeof(uint16_t),
                                     .panel_from_tokens = 16,
                                     .panel_bytes = longest_panel,
                                     .multiply = multiply,
                                     .activate = activate<FloatsToBf16>,
                                     .combine = combine<Floats>,
                                     .store_row = store_row_fp32,
                                     .peak = peak<Vec, 24>,
                                     .read = read_lines<Vec, 1>};

}  // namespace
EY_REGISTER_KERNEL(bf16_avx512_bf16);
}  // namespace ey::cpu
