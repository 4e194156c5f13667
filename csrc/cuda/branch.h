// SPDX-License-Identifier: Apache-2.0
// A GPU has its part of a layer computed by another GPU, in the middle of a stream that may be
// captured into a CUDA graph:
//
//   send      the other GPU's stream waits for ours, copies the question to itself, runs its
//             experts, and copies its share back
//   (our own experts run meanwhile)
//   collect   our stream waits for the other's
//
// Events and copies from device to device only, all of which a capture takes, and no thread of the
// host. The other GPU's memory is none of torch's, which gives a graph memory of its own on the
// device of the captured stream alone: a branch belongs to one capture, and lives as long as its
// graph is replayed. No CUDA header, no torch, no exception: as cuda.h.
#pragma once

#include <cstdint>

#include "../moe.h"
#include "../status.h"

namespace ey::cuda {

struct BranchShape {
  int64_t num_tokens, hidden_size, top_k;
  DType hidden_dtype, weights_dtype;
  bool ids_are_int64;
};

struct Branch {
  int home, there;  // devices
  BranchShape shape;
  int64_t workspace_bytes;
  // on `there`
  void* hidden_states;
  void* topk_ids;
  void* topk_weights;
  float* share;  // [num_tokens, hidden_size]
  void* workspace;
  void *aside, *sent, *done;  // a stream of `there`; an event of home, and one of `there`
};

// workspace_bytes: the most that the sets of experts need that will be asked.
Status make_branch(int home, int there, const BranchShape& shape, int64_t workspace_bytes,
                   Branch* branch);
// Waits for both devices' work.
void free_branch(Branch* branch);

// args: of home's tensors, which must stay as they are until collect; args.set: on `there`.
// arrived: [num_tokens, hidden_size] on home, written by the other GPU. One question at a time.
Status send(const Branch& branch, const MoeArgs& args, float* arrived, void* stream);
Status collect(const Branch& branch, void* stream);

}  // namespace ey::cuda
