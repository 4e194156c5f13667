// SPDX-License-Identifier: Apache-2.0
// Codes of the block layout as bytes that byte_tile.h multiplies. For a format:
//
//   E::kStep, E::kDots     k in a step; dots of four k
//   E::kSigned             whether bytes are signed integers
//   E::kCentre, E::kUnit   what comes off unsigned ones; what an integer then stands for
//   E::bytes<i>(codes)     of dot i
#pragma once

#include "../blocks.h"

namespace ey::cpu {
namespace {

template <class V>
struct Int4Bytes {
  static constexpr Format kFormat = Format::kInt4;
  static constexpr int kStep = 8, kDots = 2, kCentre = 8;
  static constexpr float kUnit = 1;
  static constexpr bool kSigned = false;
  template <int i>
  static typename V::I bytes(typename V::I codes) {
    return i == 0 ? V::low_nibbles(codes) : V::high_nibbles(codes);
  }
};

// Twice an e2m1 value is an integer from -12 to 12.
template <class V>
struct Mxfp4Bytes {
  static constexpr Format kFormat = Format::kMxfp4;
  static constexpr int kStep = 8, kDots = 2, kCentre = 12;
  static constexpr float kUnit = 0.5f;
  static constexpr bool kSigned = false;
  template <int i>
  static typename V::I bytes(typename V::I codes) {
    alignas(16) static constexpr int8_t kTwice[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                      12, 11, 10, 9,  8,  6,  4,  0};
    return V::look_up(kTwice, i == 0 ? V::low_nibbles(codes) : V::high_nibbles(codes));
  }
};

template <class V>
struct Int8Bytes {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kStep = 4, kDots = 1, kCentre = 128;
  static constexpr float kUnit = 1;
  static constexpr bool kSigned = true;
  template <int i>
  static typename V::I bytes(typename V::I codes) {
    return V::flip(codes, 0x80808080u);
  }
};

}  // namespace
}  // namespace ey::cpu
