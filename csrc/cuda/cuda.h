// SPDX-License-Identifier: Apache-2.0
// What the CUDA side offers to the rest of the extension. No CUDA header, no torch, no exception:
// every function that can fail returns a Status with a sentence for the user, on any machine, also
// on one without a driver or a GPU. Streams are cudaStream_t passed as void*.
#pragma once

#include <cstdint>

#include "../moe.h"
#include "../status.h"

namespace ey::cuda {

struct DeviceFacts {
  char name[256];
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t total_bytes, free_bytes;  // memory; free_bytes as of now
};

// Usable devices. Not ok with *count = 0 where there is none, and the sentence says why.
Status device_count(int* count);
Status device_facts(int device, DeviceFacts* facts);
int driver_version();         // 13000 = the newest CUDA that the driver serves; 0 = no driver
int runtime_version();        // of the CUDA runtime in this build
const char* architectures();  // that this build has code for: "80-real;86-real;..."

// Whether this build has code for the device. Loads the kernels, so that no later call loads them
// (loading is not allowed while a CUDA graph is captured).
Status prepare(int device);

// Copies the pointers [set->num_experts] to the device and writes set->experts and set->bad_id.
// Waits for the copy. Calls prepare(device).
Status make_table(int device, const ExpertPointers* experts, ExpertSet* set);
// Writes one row of that table, in its place: CUDA graphs that hold the table see it. Waits for the
// copy, not for kernels: call it between steps.
Status write_row(int device, int64_t expert, const ExpertPointers& pointers, ExpertSet* set);
// Frees both and nulls them. Waits for the device's work. Fine on a set that has no table.
Status free_table(int device, ExpertSet* set);

// Whether an earlier moe_experts on this set met an id outside -1..num_experts; reports it once.
// Neither waits nor touches the device: call it after a synchronisation to be sure of the answer.
Status take_bad_id(const ExpertSet& set);

// Bytes of 256-byte aligned device memory that moe_experts needs for these args; at most about
// 128 MiB, or a quarter of the weights up to 1 GiB, unless one token alone needs more.
int64_t workspace_bytes(const MoeArgs& args);

// The kernels that moe_experts picks: "cuda_rows", "cuda_tiles" for weights where they lie,
// "cuda_stream", "cuda_grouped" for packed ones. A string that lives for ever.
const char* kernel_isa(const MoeArgs& args);

// The op of moe.h on this device; all pointers are its memory, and the stream is its own. Queues
// work and returns: no wait, no allocation, can be captured in a CUDA graph. Calls that may overlap
// need workspaces of their own.
//
// An id outside -1..num_experts makes its token's row NaN, and the next call on this set (or
// take_bad_id) reports it: finding it earlier would mean waiting for the GPU.
Status moe_experts(int device, const MoeArgs& args, void* workspace, void* stream);

}  // namespace ey::cuda
