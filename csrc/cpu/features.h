// SPDX-License-Identifier: Apache-2.0
// What this CPU can execute, asked once from cpuid and xgetbv (the operating system must save the
// wide registers too, or using them is an illegal instruction).
#pragma once

#include <cstdint>

namespace ey::cpu {

enum Feature : uint32_t {
  kFeatureAvx2 = 1u << 0,        // AVX2 with FMA and F16C
  kFeatureAvx512 = 1u << 1,      // AVX-512 F, BW, DQ, VL
  kFeatureAvx512Vnni = 1u << 2,  // vpdpbusd
  kFeatureAvx512Bf16 = 1u << 3,  // vdpbf16ps
  kFeatureAvx512Vbmi = 1u << 4,  // vpermi2b
};

struct FeatureName {
  Feature bit;
  const char* name;
};
inline constexpr FeatureName kFeatureNames[] = {
    {kFeatureAvx2, "avx2"},
    {kFeatureAvx512, "avx512"},
    {kFeatureAvx512Vnni, "avx512_vnni"},
    {kFeatureAvx512Bf16, "avx512_bf16"},
    {kFeatureAvx512Vbmi, "avx512_vbmi"},
};

uint32_t features();  // bits of Feature

}  // namespace ey::cpu
