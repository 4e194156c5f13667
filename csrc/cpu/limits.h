// SPDX-License-Identifier: Apache-2.0
// The machine's own limits, measured with the instructions that the kernels use: how fast threads
// together read memory, and how many multiply-adds they do in registers. A benchmark divides by
// these, taken in the same run, because a machine's speed changes from minute to minute.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace ey::cpu {

// GB/s (1e9) of num_threads threads that each read their part of [memory, memory + bytes) once.
double read_gbps(const Kernel& kernel, const char* memory, int64_t bytes, int num_threads);

// GFLOP/s (a multiply-add is two) of num_threads threads that do nothing else.
double peak_gflops(const Kernel& kernel, int num_threads);

// Microseconds that a run of num_threads threads costs that have nothing to do, back to back.
double dispatch_us(int num_threads);

}  // namespace ey::cpu
