// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../moe.h"
#include "../status.h"
#include "kernel.h"

namespace ey::cpu {

// Computes one call on up to max_threads threads. An id that is neither an expert nor "none" fails
// before anything is written.
Status moe_experts(const Kernel& kernel, const MoeArgs& args, int max_threads);

}  // namespace ey::cpu
