// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, BW, DQ, VL, VBMI, VNNI, BF16) as far as csrc/cpu uses it, on a CPU that has AVX2
// only: a room that is compiled with `-include` of this file, and EY_EMULATE_AVX512 defined, runs
// its kernels anywhere. For tests of what kernels compute; it says nothing about speed.
//
// Instructions that AVX2 has for half the width are done by halves, the others lane by lane, as
// Intel's manual defines them. Names of intrinsics are macros, because gcc's own functions of these
// names cannot be inlined without the instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ey_avx512 {

template <class H>
struct Two {
  H half[2];
};
template <class H, class V>
inline Two<H> split(V v) {
  Two<H> out;
  static_assert(sizeof out == sizeof v);
  __builtin_memcpy(&out, &v, sizeof v);
  return out;
}
template <class V, class H>
inline V join(H low, H high) {
  const Two<H> two = {{low, high}};
  V out;
  static_assert(sizeof out == sizeof two);
  __builtin_memcpy(&out, &two, sizeof out);
  return out;
}

// Lanes as an array
template <class T, int n>
struct Lanes {
  T of[n];
};
template <class T, class V>
inline auto lanes(V v) {
  Lanes<T, sizeof(V) / sizeof(T)> out;
  __builtin_memcpy(&out, &v, sizeof v);
  return out;
}
template <class V, class T, int n>
inline V vector(const Lanes<T, n>& from) {
  V out;
  static_assert(sizeof out == sizeof from);
  __builtin_memcpy(&out, &from, sizeof out);
  return out;
}

#define EY_BY_HALVES(name, V, H, op)                                    \
  inline V name(V a, V b) {                                             \
    const auto x = split<H>(a), y = split<H>(b);                        \
    return join<V>(op(x.half[0], y.half[0]), op(x.half[1], y.half[1])); \
  }
EY_BY_HALVES(add_ps, __m512, __m256, _mm256_add_ps)
EY_BY_HALVES(sub_ps, __m512, __m256, _mm256_sub_ps)
EY_BY_HALVES(mul_ps, __m512, __m256, _mm256_mul_ps)
EY_BY_HALVES(div_ps, __m512, __m256, _mm256_div_ps)
EY_BY_HALVES(min_ps, __m512, __m256, _mm256_min_ps)
EY_BY_HALVES(max_ps, __m512, __m256, _mm256_max_ps)
EY_BY_HALVES(xor_ps, __m512, __m256, _mm256_xor_ps)
EY_BY_HALVES(unpacklo_ps, __m512, __m256, _mm256_unpacklo_ps)
EY_BY_HALVES(unpackhi_ps, __m512, __m256, _mm256_unpackhi_ps)
EY_BY_HALVES(unpacklo_pd, __m512d, __m256d, _mm256_unpacklo_pd)
EY_BY_HALVES(unpackhi_pd, __m512d, __m256d, _mm256_unpackhi_pd)
EY_BY_HALVES(unpacklo_epi32, __m512i, __m256i, _mm256_unpacklo_epi32)
EY_BY_HALVES(unpackhi_epi32, __m512i, __m256i, _mm256_unpackhi_epi32)
EY_BY_HALVES(unpacklo_epi64, __m512i, __m256i, _mm256_unpacklo_epi64)
EY_BY_HALVES(unpackhi_epi64, __m512i, __m256i, _mm256_unpackhi_epi64)
EY_BY_HALVES(add_epi16, __m512i, __m256i, _mm256_add_epi16)
EY_BY_HALVES(add_epi32, __m512i, __m256i, _mm256_add_epi32)
EY_BY_HALVES(sub_epi8, __m512i, __m256i, _mm256_sub_epi8)
EY_BY_HALVES(and_si512, __m512i, __m256i, _mm256_and_si256)
EY_BY_HALVES(or_si512, __m512i, __m256i, _mm256_or_si256)
EY_BY_HALVES(xor_si512, __m512i, __m256i, _mm256_xor_si256)
EY_BY_HALVES(madd_epi16, __m512i, __m256i, _mm256_madd_epi16)
EY_BY_HALVES(maddubs_epi16, __m512i, __m256i, _mm256_maddubs_epi16)
EY_BY_HALVES(shuffle_epi8, __m512i, __m256i, _mm256_shuffle_epi8)
#undef EY_BY_HALVES

#define EY_SHIFT_BY_HALVES(name, op)                          \
  inline __m512i name(__m512i a, int n) {                     \
    const auto x = split<__m256i>(a);                         \
    return join<__m512i>(op(x.half[0], n), op(x.half[1], n)); \
  }
EY_SHIFT_BY_HALVES(slli_epi16, _mm256_slli_epi16)
EY_SHIFT_BY_HALVES(srli_epi16, _mm256_srli_epi16)
EY_SHIFT_BY_HALVES(slli_epi32, _mm256_slli_epi32)
EY_SHIFT_BY_HALVES(srli_epi32, _mm256_srli_epi32)
EY_SHIFT_BY_HALVES(srai_epi32, _mm256_srai_epi32)
#undef EY_SHIFT_BY_HALVES

template <class V, class H>
inline V both(H h) {
  return join<V>(h, h);
}
inline __m512 set1_ps(float v) { return both<__m512>(_mm256_set1_ps(v)); }
inline __m512i set1_epi8(int v) { return both<__m512i>(_mm256_set1_epi8(static_cast<char>(v))); }
inline __m512i set1_epi16(int v) { return both<__m512i>(_mm256_set1_epi16(static_cast<short>(v))); }
inline __m512i set1_epi32(int v) { return both<__m512i>(_mm256_set1_epi32(v)); }
inline __m512 setzero_ps() { return set1_ps(0); }
inline __m512i setzero_si512() { return set1_epi32(0); }
inline __m512i broadcast_i32x4(__m128i v) { return both<__m512i>(_mm256_broadcastsi128_si256(v)); }

template <class V>
inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// The aligned loads fault on other addresses, as theirs do.
template <class V>
inline V load_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
  return load<V>(p);
}
inline void storeu_ps(void* p, __m512 v) { __builtin_memcpy(p, &v, sizeof v); }
inline void storeu_si512(void* p, __m512i v) { __builtin_memcpy(p, &v, sizeof v); }

template <class T, class V>
inline V load_masked(uint64_t mask, const void* p) {
  auto out = lanes<T>(V{});
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) {
    out.of[i] = 0;
    if (mask >> i & 1) __builtin_memcpy(&out.of[i], static_cast<const T*>(p) + i, sizeof(T));
  }
  return vector<V>(out);
}
// a where the mask has a bit, else b
template <class T, class V>
inline V choose(uint64_t mask, V a, V b) {
  const auto x = lanes<T>(a);
  auto y = lanes<T>(b);
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) {
    if (mask >> i & 1) y.of[i] = x.of[i];
  }
  return vector<V>(y);
}
template <class T, class V, class F>
inline uint64_t mask_of(V a, V b, F holds) {
  const auto x = lanes<T>(a), y = lanes<T>(b);
  uint64_t mask = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(T); ++i) {
    mask |= uint64_t{holds(x.of[i], y.of[i])} << i;
  }
  return mask;
}
inline __mmask16 less_ps(__m512 a, __m512 b, int predicate) {
  if (predicate != _CMP_LT_OQ) __builtin_trap();  // the only one that is used
  return static_cast<__mmask16>(mask_of<float>(a, b, [](float x, float y) { return x < y; }));
}
inline __mmask16 cmpeq_epi32_mask(__m512i a, __m512i b) {
  return static_cast<__mmask16>(mask_of<int32_t>(a, b, [](int x, int y) { return x == y; }));
}
inline __mmask64 movepi8_mask(__m512i a) {
  return mask_of<int8_t>(a, a, [](int8_t x, int8_t) { return x < 0; });
}

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = split<__m256>(a), y = split<__m256>(b), z = split<__m256>(c);
  return join<__m512>(_mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]),
                      _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]));
}
inline __m512 abs_ps(__m512 a) {
  auto x = lanes<float>(a);
  for (float& v : x.of) v = __builtin_fabsf(v);
  return vector<__m512>(x);
}
inline __m512i abs_epi8(__m512i a) {
  const auto x = split<__m256i>(a);
  return join<__m512i>(_mm256_abs_epi8(x.half[0]), _mm256_abs_epi8(x.half[1]));
}
inline __m512 roundscale_ps(__m512 a, int mode) {
  if (mode != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
  const auto x = split<__m256>(a);
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return join<__m512>(_mm256_round_ps(x.half[0], kMode), _mm256_round_ps(x.half[1], kMode));
}
inline __m512 scalef_ps(__m512 a, __m512 n) {
  auto x = lanes<float>(a);
  const auto e = lanes<float>(n);
  for (int i = 0; i < 16; ++i) {
    const float power = __builtin_floorf(e.of[i] < -400 ? -400 : e.of[i] > 400 ? 400 : e.of[i]);
    x.of[i] = e.of[i] != e.of[i] ? e.of[i] : __builtin_ldexpf(x.of[i], static_cast<int>(power));
  }
  return vector<__m512>(x);
}
inline float reduce_add_ps(__m512 a) {
  const auto x = lanes<float>(a);
  float sum[16];
  __builtin_memcpy(sum, x.of, sizeof sum);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}
inline float reduce_max_ps(__m512 a) {
  const auto x = lanes<float>(a);
  float most = x.of[0];
  for (const float v : x.of) most = v > most ? v : most;
  return most;
}

inline __m512 cvtepi32_ps(__m512i a) {
  const auto x = split<__m256i>(a);
  return join<__m512>(_mm256_cvtepi32_ps(x.half[0]), _mm256_cvtepi32_ps(x.half[1]));
}
inline __m512i cvtps_epi32(__m512 a) {
  const auto x = split<__m256>(a);
  return join<__m512i>(_mm256_cvtps_epi32(x.half[0]), _mm256_cvtps_epi32(x.half[1]));
}
inline __m512 cvtph_ps(__m256i a) {
  const auto x = split<__m128i>(a);
  return join<__m512>(_mm256_cvtph_ps(x.half[0]), _mm256_cvtph_ps(x.half[1]));
}
template <class To, class From, class V>
inline auto convert(V a) {
  const auto x = lanes<From>(a);
  Lanes<To, sizeof(x) / sizeof(From)> out;
  for (unsigned i = 0; i < sizeof(x) / sizeof(From); ++i) out.of[i] = static_cast<To>(x.of[i]);
  return out;
}
inline __m512i cvtepu16_epi32(__m256i a) { return vector<__m512i>(convert<uint32_t, uint16_t>(a)); }
inline __m512i cvtepu8_epi32(__m128i a) { return vector<__m512i>(convert<uint32_t, uint8_t>(a)); }
inline __m128i cvtepi32_epi8(__m512i a) { return vector<__m128i>(convert<uint8_t, uint32_t>(a)); }

inline __m512i permutexvar_epi16(__m512i index, __m512i table) {
  auto i = lanes<uint16_t>(index);
  const auto t = lanes<uint16_t>(table);
  for (auto& v : i.of) v = t.of[v & 31];
  return vector<__m512i>(i);
}
inline __m512i permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
  auto i = lanes<uint8_t>(index);
  const auto x = lanes<uint8_t>(a), y = lanes<uint8_t>(b);
  for (auto& v : i.of) v = (v & 64 ? y : x).of[v & 63];
  return vector<__m512i>(i);
}
inline __m512i shuffle_i32x4(__m512i a, __m512i b, int imm) {
  struct Quarter {
    uint64_t half[2];
  };
  const auto x = lanes<Quarter>(a), y = lanes<Quarter>(b);
  Lanes<Quarter, 4> out;
  for (int i = 0; i < 4; ++i) out.of[i] = (i < 2 ? x : y).of[imm >> 2 * i & 3];
  return vector<__m512i>(out);
}
inline __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int imm) {
  const auto x = lanes<uint64_t>(a), y = lanes<uint64_t>(b), z = lanes<uint64_t>(c);
  Lanes<uint64_t, 8> out{};
  for (int i = 0; i < 8; ++i) {
    for (int row = 0; row < 8; ++row) {  // of the truth table: bits of a, b, c
      if (!(imm >> row & 1)) continue;
      out.of[i] |= (row & 4 ? x.of[i] : ~x.of[i]) & (row & 2 ? y.of[i] : ~y.of[i]) &
                   (row & 1 ? z.of[i] : ~z.of[i]);
    }
  }
  return vector<__m512i>(out);
}

// bf16: rounded to nearest even; subnormal inputs and results are zero.
inline uint32_t bits(float v) { return __builtin_bit_cast(uint32_t, v); }
inline float flushed(float v) {
  return (bits(v) & 0x7F800000u) == 0 ? __builtin_bit_cast(float, bits(v) & 0x80000000u) : v;
}
inline uint16_t to_bf16(float v) {
  const uint32_t b = bits(flushed(v));
  if ((b & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(b >> 16 | 0x40);
  return static_cast<uint16_t>((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}
inline __m256bh cvtneps_pbh(__m512 a) {
  const auto x = lanes<float>(a);
  Lanes<uint16_t, 16> out;
  for (int i = 0; i < 16; ++i) out.of[i] = to_bf16(x.of[i]);
  return vector<__m256bh>(out);
}
inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  return join<__m512bh>(cvtneps_pbh(low), cvtneps_pbh(high));
}
template <class V>
inline __m512 dpbf16_ps(__m512 sum, V a, V b) {
  auto s = lanes<float>(sum);
  const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  const auto number = [](uint16_t v) {
    return flushed(__builtin_bit_cast(float, uint32_t{v} << 16));
  };
  for (int i = 0; i < 16; ++i) {
    for (const int k : {2 * i + 1, 2 * i}) {
      s.of[i] = flushed(flushed(s.of[i]) + number(x.of[k]) * number(y.of[k]));
    }
  }
  return vector<__m512>(s);
}
inline __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  auto s = lanes<int32_t>(sum);
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  for (int i = 0; i < 64; ++i) s.of[i / 4] += x.of[i] * y.of[i];
  return vector<__m512i>(s);
}

}  // namespace ey_avx512

// clang-format off
#define _mm512_abs_epi8 ey_avx512::abs_epi8
#define _mm512_abs_ps ey_avx512::abs_ps
#define _mm512_add_epi16 ey_avx512::add_epi16
#define _mm512_add_epi32 ey_avx512::add_epi32
#define _mm512_add_ps ey_avx512::add_ps
#define _mm512_and_si512 ey_avx512::and_si512
#define _mm512_broadcast_i32x4 ey_avx512::broadcast_i32x4
#define _mm512_castpd_ps(v) __builtin_bit_cast(__m512, v)
#define _mm512_castps_pd(v) __builtin_bit_cast(__m512d, v)
#define _mm512_castps512_ps256(v) ey_avx512::split<__m256>(v).half[0]
#define _mm512_castsi256_si512(v) ey_avx512::both<__m512i>(v)
#define _mm512_castsi512_ps(v) __builtin_bit_cast(__m512, v)
#define _mm512_castsi512_si256(v) ey_avx512::split<__m256i>(v).half[0]
#define _mm512_cmp_ps_mask ey_avx512::less_ps
#define _mm512_cmpeq_epi32_mask ey_avx512::cmpeq_epi32_mask
#define _mm512_cvtepi32_epi8 ey_avx512::cvtepi32_epi8
#define _mm512_cvtepi32_ps ey_avx512::cvtepi32_ps
#define _mm512_cvtepu16_epi32 ey_avx512::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 ey_avx512::cvtepu8_epi32
#define _mm512_cvtne2ps_pbh ey_avx512::cvtne2ps_pbh
#define _mm512_cvtneps_pbh ey_avx512::cvtneps_pbh
#define _mm512_cvtph_ps ey_avx512::cvtph_ps
#define _mm512_cvtps_epi32 ey_avx512::cvtps_epi32
#define _mm512_div_ps ey_avx512::div_ps
#define _mm512_dpbf16_ps ey_avx512::dpbf16_ps
#define _mm512_extractf32x8_ps(v, i) ey_avx512::split<__m256>(v).half[i]
#define _mm512_fmadd_ps ey_avx512::fmadd_ps
#define _mm512_load_ps ey_avx512::load_aligned<__m512>
#define _mm512_load_si512 ey_avx512::load_aligned<__m512i>
#define _mm512_loadu_ps ey_avx512::load<__m512>
#define _mm512_loadu_si512 ey_avx512::load<__m512i>
#define _mm512_madd_epi16 ey_avx512::madd_epi16
#define _mm512_maddubs_epi16 ey_avx512::maddubs_epi16
#define _mm512_mask_blend_ps(mask, a, b) ey_avx512::choose<float>(mask, b, a)
#define _mm512_mask_mov_epi32(a, mask, b) ey_avx512::choose<int32_t>(mask, b, a)
#define _mm512_mask_mov_epi8(a, mask, b) ey_avx512::choose<int8_t>(mask, b, a)
#define _mm512_mask_sub_epi8(a, mask, b, c) \
  ey_avx512::choose<int8_t>(mask, ey_avx512::sub_epi8(b, c), a)
#define _mm512_maskz_loadu_epi16 ey_avx512::load_masked<int16_t, __m512i>
#define _mm512_maskz_loadu_ps ey_avx512::load_masked<float, __m512>
#define _mm512_max_ps ey_avx512::max_ps
#define _mm512_min_ps ey_avx512::min_ps
#define _mm512_movepi8_mask ey_avx512::movepi8_mask
#define _mm512_mul_ps ey_avx512::mul_ps
#define _mm512_or_si512 ey_avx512::or_si512
#define _mm512_permutex2var_epi8 ey_avx512::permutex2var_epi8
#define _mm512_permutexvar_epi16 ey_avx512::permutexvar_epi16
#define _mm512_reduce_add_ps ey_avx512::reduce_add_ps
#define _mm512_reduce_max_ps ey_avx512::reduce_max_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps ey_avx512::roundscale_ps
#define _mm512_scalef_ps ey_avx512::scalef_ps
#define _mm512_set1_epi16 ey_avx512::set1_epi16
#define _mm512_set1_epi32 ey_avx512::set1_epi32
#define _mm512_set1_epi8 ey_avx512::set1_epi8
#define _mm512_set1_ps ey_avx512::set1_ps
#define _mm512_setzero_ps ey_avx512::setzero_ps
#define _mm512_setzero_si512 ey_avx512::setzero_si512
#define _mm512_shuffle_epi8 ey_avx512::shuffle_epi8
#define _mm512_shuffle_i32x4 ey_avx512::shuffle_i32x4
#define _mm512_slli_epi16 ey_avx512::slli_epi16
#define _mm512_slli_epi32 ey_avx512::slli_epi32
#define _mm512_srai_epi32 ey_avx512::srai_epi32
#define _mm512_srli_epi16 ey_avx512::srli_epi16
#define _mm512_srli_epi32 ey_avx512::srli_epi32
#define _mm512_storeu_ps ey_avx512::storeu_ps
#define _mm512_storeu_si512 ey_avx512::storeu_si512
#define _mm512_sub_ps ey_avx512::sub_ps
#define _mm512_ternarylogic_epi32 ey_avx512::ternarylogic_epi32
#define _mm512_unpackhi_epi32 ey_avx512::unpackhi_epi32
#define _mm512_unpackhi_epi64 ey_avx512::unpackhi_epi64
#define _mm512_unpackhi_pd ey_avx512::unpackhi_pd
#define _mm512_unpackhi_ps ey_avx512::unpackhi_ps
#define _mm512_unpacklo_epi32 ey_avx512::unpacklo_epi32
#define _mm512_unpacklo_epi64 ey_avx512::unpacklo_epi64
#define _mm512_unpacklo_pd ey_avx512::unpacklo_pd
#define _mm512_unpacklo_ps ey_avx512::unpacklo_ps
#define _mm512_xor_ps ey_avx512::xor_ps
#define _mm512_xor_si512 ey_avx512::xor_si512
#define _mm256_maskz_loadu_epi16 ey_avx512::load_masked<int16_t, __m256i>
// clang-format on
