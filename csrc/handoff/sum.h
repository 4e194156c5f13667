// SPDX-License-Identifier: Apache-2.0
// The sum of parts, in fp32, rounded once.
#pragma once

#include <cstdint>

#include "../cpu/kernel.h"

namespace ey::handoff {

// out[i] = round(parts[0][i] + parts[1][i] + ...) for i < size, on up to max_threads threads.
void add_parts(const cpu::Kernel& kernel, const float* const* parts, int num_parts, int64_t size,
               DType dtype, void* out, int max_threads);

}  // namespace ey::handoff
