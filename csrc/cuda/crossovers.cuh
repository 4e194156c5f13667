// SPDX-License-Identifier: Apache-2.0
// Measured borders between the kernels of packed weights, from a file of lines
//
//   capability format group_size hidden_size intermediate_size num_experts stream_pairs wgmma_pairs
//   90 int4 128 2048 768 128 11.3 45.3
//
// which bench/gpu_check writes: up to how many pairs an expert cuda_stream is as fast as
// cuda_grouped, and from how many on the kernels of wgmma are faster (0: not measured, or none). A
// word that begins with # and what follows it are not read.
#pragma once

#include "status.cuh"

namespace ey::cuda {

inline constexpr const char* kCrossoversVariable = "EXPERTYARD_CUDA_CROSSOVERS";

// Writes set->stream_pairs and set->wgmma_pairs if the file that the variable names has a line for
// such experts. A file that cannot be read, or has a line that is none, is an error.
Status find_crossovers(ExpertSet* set);

}  // namespace ey::cuda
