// SPDX-License-Identifier: Apache-2.0
// Codes of the block layout as fp32, exactly, on whatever float vector a room has. For a format:
//
//   W::kStep                k of a step
//   W::prepare(dwords)      what is done once for all weights of a step
//   W::value<j>(prepared)   the j-th weight of a step as floats, divided by kUnit (a power of two)
//   W::kCentre              what has been subtracted from codes: zeros are told apart from it
//   W::kPanelFromTiles      tiles that would expand a weight each, from which on a panel of fp32
//                           weights pays; 0: never
//   W::kNan, W::kSubnormal  whether a code may be NaN; whether subnormal floats are made
//
// A code in the highest byte of a dword, and nothing below, is an integer 2^24 times too large: a
// shuffle and a conversion for each weight, and no shifts that spread its sign.
#pragma once

#include "../blocks.h"

namespace ey::cpu {
namespace {

template <class V>
struct Bf16Values {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kPanelFromTiles = 0;
  static constexpr int kStep = 2;
  static constexpr float kCentre = 0, kUnit = 1;
  static constexpr bool kNan = false, kSubnormal = false;  // theirs pass through as they are
  static typename V::I prepare(typename V::I d) { return d; }
  template <int j>
  static typename V::F value(typename V::I d) {
    return V::as_floats(j == 0 ? V::template shift_left<16>(d) : V::high_half(d));
  }
};

// Flipping the highest bit of a code makes it a signed integer.
template <class V>
struct Int8Values {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kPanelFromTiles = 4;
  static constexpr int kStep = 4;
  static constexpr float kCentre = 128, kUnit = 0x1p-24f;
  static constexpr bool kNan = false, kSubnormal = false;
  static typename V::I prepare(typename V::I d) { return V::flip(d, 0x80808080u); }
  template <int j>
  static typename V::F value(typename V::I d) {
    return V::to_floats(V::template top_byte<j>(d));
  }
};

// Codes of 4 bits, in bytes: the j-th is the j % 4-th byte of `low` or of `high`.
template <class V>
struct FourBitValues {
  static constexpr int kStep = 8;
  static constexpr bool kNan = false, kSubnormal = false;
  struct Halves {
    typename V::I low, high;
  };
  template <int j>
  static typename V::F value(const Halves& h) {
    return V::to_floats(V::template top_byte<j % 4>(j < 4 ? h.low : h.high));
  }
};

template <class V>
struct Int4Values : FourBitValues<V> {
  static constexpr Format kFormat = Format::kInt4;
  static constexpr int kPanelFromTiles = 4;
  static constexpr float kCentre = 8, kUnit = 0x1p-28f;
  static typename FourBitValues<V>::Halves prepare(typename V::I d) {  // each 16 times its integer
    const auto flipped = V::flip(d, 0x88888888u);
    return {V::mask(V::template shift_left<4>(flipped), 0xF0F0F0F0u),
            V::mask(flipped, 0xF0F0F0F0u)};
  }
};

// Twice an e2m1 value is an integer.
template <class V>
struct Mxfp4Values : FourBitValues<V> {
  static constexpr Format kFormat = Format::kMxfp4;
  static constexpr int kPanelFromTiles = 2;
  static constexpr float kCentre = 0, kUnit = 0x1p-25f;
  static typename FourBitValues<V>::Halves prepare(typename V::I d) {
    alignas(16) static constexpr int8_t kTwice[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                                      0, -1, -2, -3, -4, -6, -8, -12};
    return {V::look_up(kTwice, V::mask(d, 0x0F0F0F0Fu)),
            V::look_up(kTwice, V::mask(V::template shift_right<4>(d), 0x0F0F0F0Fu))};
  }
};

// e4m3: bias 7, subnormals, no infinity, NaN at 0x7F and 0xFF. With its bits where fp32 has them
// a number is 2^120 times too small, subnormals too.
template <class V>
struct Fp8Values {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr int kPanelFromTiles = 2;
  static constexpr int kStep = 4;
  static constexpr float kCentre = 0, kUnit = 1;
  static constexpr bool kNan = true, kSubnormal = true;
  static typename V::I prepare(typename V::I d) { return d; }
  template <int j>
  static typename V::F value(typename V::I d) {
    const auto number = V::template shift_right_signed<4>(V::template top_byte<j>(d));
    return V::mul(V::as_floats(V::mask(number, 0x87F00000u)), V::set(0x1p120f));
  }
};

// Whether a row has met a code that is NaN: its sum, whatever it is multiplied with, is then NaN.
template <class V, class W>
class Nans {
 public:
  void look_at([[maybe_unused]] typename V::I codes) {
    if constexpr (W::kNan) {  // 0x7F is the one magnitude to which adding 1 gives 0x80
      const auto next = V::add_int(V::mask(codes, 0x7F7F7F7Fu), 0x01010101u);
      found_ = V::or_int(found_, next);
    }
  }
  typename V::F put_into(typename V::F sum) const {
    if constexpr (W::kNan) return V::nan_unless_zero(V::mask(found_, 0x80808080u), sum);
    return sum;
  }

 private:
  typename V::I found_ = V::zero();
};

// All lanes' scales of a group, and zeros less the centre (0 where groups have none). head: its
// line's; part: the group's number in the line.
template <class V, class W>
void group_scales(const BlockShape& shape, const char* head, int part, float* scale,
                  float* offset) {
  const ScaleType type = shape.packing.scale_type;
  for (int lane = 0; lane < kLanes; lane += V::kLanes) {
    V::store(scale + lane, V::scales(type, head, part * kLanes + lane));
    auto less = V::set(0);
    if (shape.packing.zeros) {
      less = V::add(V::scales(type, head + shape.scale_bytes(), lane), V::set(-W::kCentre));
    }
    V::store(offset + lane, less);
  }
}

}  // namespace
}  // namespace ey::cpu
