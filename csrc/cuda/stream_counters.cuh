// SPDX-License-Identifier: Apache-2.0
// Counters for launches that do not overlap: one set for each stream, and for each stream of each
// CUDA graph that is captured (a graph's launches may run beside those of the stream it was
// captured on). They lie in the module's own memory, zero when it is loaded, and every launch
// leaves them as the next one needs them.
#pragma once

#include "stream.cuh"

namespace ey::cuda::stream {

// Of the current device. *counters = null: all sets are taken; the caller zeroes counters of its
// own.
cudaError_t counters_of(cudaStream_t stream, Counters** counters);

}  // namespace ey::cuda::stream
