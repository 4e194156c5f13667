// SPDX-License-Identifier: Apache-2.0
// The activations of moe.h and the weighted combine, on whatever float vector F a room has.
//
// Those with a gate are u * g * sigmoid(z); gelu_tanh because 0.5 (1 + tanh y) = sigmoid(2 y). A
// NaN stays a NaN: F::min and F::max return their second operand if either is one.
#pragma once

#include <type_traits>

#include "kernel.h"

namespace ey::cpu {
namespace {

// exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2) / 2, exp(r) = 1 + r * p. The polynomial
// is Taylor's to r^7, whose rest is below half an ulp there. NaN stays NaN; large |x| saturates,
// never overflows.
template <class F>
struct ExpParts {
  typename F::V n, r, p;
  explicit ExpParts(typename F::V x) {
    x = F::min(F::set(88.0f), F::max(F::set(-87.0f), x));
    n = F::round(F::mul(x, F::set(1.44269504088896341f)));
    r = F::fma(n, F::set(-0.693359375f), x);  // ln 2 in two parts, the first exact in n * .
    r = F::fma(n, F::set(2.12194440054690583e-4f), r);
    p = F::set(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f}) {
      p = F::fma(p, r, F::set(c));
    }
  }
};

template <class F>
inline typename F::V exp(typename F::V x) {
  const ExpParts<F> e(x);
  return F::scale(F::fma(e.p, e.r, F::set(1.0f)), e.n);
}

template <class F>
inline typename F::V sigmoid(typename F::V z) {
  const auto one = F::set(1.0f);
  return F::div(one, F::add(one, exp<F>(F::mul(z, F::set(-1.0f)))));
}

// (exp(2 z) - 1) / (exp(2 z) + 1), with exp - 1 taken apart so that small z keep all their digits.
template <class F>
inline typename F::V tanh(typename F::V z) {
  const ExpParts<F> e(F::mul(z, F::set(2.0f)));
  const auto power = F::add(F::scale(F::set(1.0f), e.n), F::set(-1.0f));  // 2^n - 1: 0 for small z
  const auto less_one = F::add(F::scale(F::mul(e.p, e.r), e.n), power);
  return F::div(less_one, F::add(less_one, F::set(2.0f)));
}

template <class F>
inline typename F::V clamp(typename F::V x, float limit) {
  return F::min(F::set(limit), F::max(F::set(-limit), x));
}

template <class F>
inline typename F::V softcap(typename F::V x, float cap) {
  return F::mul(F::set(cap), tanh<F>(F::mul(x, F::set(1.0f / cap))));
}

template <class F, Activation kAct>
inline typename F::V gate_up(typename F::V g, typename F::V u, float alpha, float limit) {
  if constexpr (kAct == Activation::kSiluGlu) {
    return F::mul(F::mul(u, g), sigmoid<F>(g));
  } else if constexpr (kAct == Activation::kGeluTanhGlu) {
    const auto cubic = F::fma(F::mul(F::mul(g, g), F::set(0.044715f)), g, g);
    return F::mul(F::mul(u, g), sigmoid<F>(F::mul(cubic, F::set(1.59576912160573071f))));
  } else if constexpr (kAct == Activation::kSiluGluClampBefore) {
    return gate_up<F, Activation::kSiluGlu>(F::min(F::set(limit), g), clamp<F>(u, limit), 0, 0);
  } else if constexpr (kAct == Activation::kSiluGluClampAfter) {
    const auto silu = F::min(F::set(limit), F::mul(g, sigmoid<F>(g)));
    return F::mul(silu, clamp<F>(u, limit));
  } else if constexpr (kAct == Activation::kSoftcapGlu) {
    return F::mul(F::mul(softcap<F>(g, alpha), sigmoid<F>(g)), softcap<F>(u, limit));
  } else {
    static_assert(kAct == Activation::kSwigluOai);
    g = F::min(F::set(limit), g);
    const auto shifted = F::add(clamp<F>(u, limit), F::set(1.0f));
    return F::mul(F::mul(shifted, g), sigmoid<F>(F::mul(g, F::set(alpha))));
  }
}

// Without a gate a block is 32 rows of up, and makes 32 values of h.
template <class F>
void activate_relu2(const ActivateArgs& a) {
  float bias[kBlockRows] = {};
  for (int i = 0; i < a.num_rows; ++i) bias[i] = a.up_bias != nullptr ? a.up_bias[i] : 0.0f;
  for (int t = 0; t < a.num_tokens; ++t) {
    const float* c = a.c + t * kBlockRows;
    float clean[kBlockRows];  // rows that a last block does not have: h's padding must become zero
    if (a.num_rows < kBlockRows) {
      for (int i = 0; i < kBlockRows; ++i) clean[i] = i < a.num_rows ? c[i] : 0.0f;
      c = clean;
    }
    auto* h = reinterpret_cast<typename F::H*>(a.h + t * a.h_stride);
    for (int i = 0; i < kBlockRows; i += F::kWidth) {
      const auto u = F::max(F::set(0.0f), F::add(F::load(c + i), F::load(bias + i)));
      F::store_h(h + i, F::mul(u, u));
    }
  }
}

template <class F, Activation kAct>
void activate_as(const ActivateArgs& a) {
  float bias[kBlockRows] = {};
  for (int i = 0; i < a.num_rows; ++i) {
    if (a.gate_bias != nullptr) bias[i] = a.gate_bias[i];
    if (a.up_bias != nullptr) bias[kHalfRows + i] = a.up_bias[i];
  }
  for (int t = 0; t < a.num_tokens; ++t) {
    const float* c = a.c + t * kBlockRows;
    float clean[kBlockRows];  // an I that is no multiple of kHalfRows: h's padding must become zero
    if (a.num_rows < kHalfRows) {
      for (int i = 0; i < kBlockRows; ++i) clean[i] = i % kHalfRows < a.num_rows ? c[i] : 0.0f;
      c = clean;
    }
    auto* h = reinterpret_cast<typename F::H*>(a.h + t * a.h_stride);
    for (int i = 0; i < kHalfRows; i += F::kWidth) {
      const auto g = F::add(F::load(c + i), F::load(bias + i));
      const auto u = F::add(F::load(c + kHalfRows + i), F::load(bias + kHalfRows + i));
      F::store_h(h + i, gate_up<F, kAct>(g, u, a.alpha, a.limit));
    }
  }
}

template <class F>
void activate(const ActivateArgs& a) {
  switch (a.activation) {
    case Activation::kSiluGlu:
      return activate_as<F, Activation::kSiluGlu>(a);
    case Activation::kGeluTanhGlu:
      return activate_as<F, Activation::kGeluTanhGlu>(a);
    case Activation::kSwigluOai:
      return activate_as<F, Activation::kSwigluOai>(a);
    case Activation::kSiluGluClampBefore:
      return activate_as<F, Activation::kSiluGluClampBefore>(a);
    case Activation::kSiluGluClampAfter:
      return activate_as<F, Activation::kSiluGluClampAfter>(a);
    case Activation::kSoftcapGlu:
      return activate_as<F, Activation::kSoftcapGlu>(a);
    case Activation::kRelu2:
      return activate_relu2<F>(a);
  }
}

template <class F>
void combine(const CombineArgs& a) {
  float bias[kBlockRows] = {};
  if (a.bias != nullptr) __builtin_memcpy(bias, a.bias, a.num_rows * sizeof(float));
  for (int t = 0; t < a.num_tokens; ++t) {
    const float* c = a.c + t * kBlockRows;
    float* strip = a.strip + int64_t{a.token[t]} * kBlockRows;
    const auto weight = F::set(a.weight[t]);
    for (int r = 0; r < kBlockRows; r += F::kWidth) {
      const auto y = F::add(F::load(c + r), F::load(bias + r));
      F::store(strip + r, F::fma(weight, y, F::load(strip + r)));
    }
  }
}

}  // namespace
}  // namespace ey::cpu
