// SPDX-License-Identifier: Apache-2.0
#include "branch.h"
#include "status.cuh"
#if !defined(__CUDACC__)
#include "streams_emulator.h"
#endif

namespace ey::cuda {
namespace {

cudaError_t allocate(int64_t bytes, void** memory) {
  return cudaMalloc(memory, size_t(bytes > 0 ? bytes : 1));
}

cudaError_t make_event(void** event) {
  cudaEvent_t made = nullptr;
  const cudaError_t error = cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
  *event = made;
  return error;
}

// Copies then go from one to the other without a detour over the host. Where that is not possible
// they take the detour.
void let_reach(int device, int other) {
  int can = 0;
  if (cudaDeviceCanAccessPeer(&can, device, other) == cudaSuccess && can != 0) {
    cudaDeviceEnablePeerAccess(other, 0);  // an error if torch has done it
  }
  cudaGetLastError();
}

// On `there`, which is the current device.
cudaError_t make_there(Branch* b) {
  const BranchShape& s = b->shape;
  const int64_t values = s.num_tokens * s.hidden_size, pairs = s.num_tokens * s.top_k;
  void* share = nullptr;
  cudaStream_t aside = nullptr;
  cudaError_t error = allocate(values * size_of(s.hidden_dtype), &b->hidden_states);
  if (error == cudaSuccess) error = allocate(pairs * (s.ids_are_int64 ? 8 : 4), &b->topk_ids);
  if (error == cudaSuccess) error = allocate(pairs * size_of(s.weights_dtype), &b->topk_weights);
  if (error == cudaSuccess) error = allocate(values * int64_t(sizeof(float)), &share);
  b->share = static_cast<float*>(share);
  if (error == cudaSuccess) error = allocate(b->workspace_bytes, &b->workspace);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking);
  b->aside = aside;
  if (error == cudaSuccess) error = make_event(&b->done);
  return error;
}

}  // namespace

Status make_branch(int home, int there, const BranchShape& shape, int64_t workspace_bytes,
                   Branch* branch) {
  *branch = {};
  branch->home = home;
  branch->there = there;
  branch->shape = shape;
  branch->workspace_bytes = workspace_bytes;
  for (const int device : {home, there}) {
    if (Status s = check_device(device); !s.ok) return s;
  }
  const OutsideCapture outside;
  cudaError_t error;
  {
    const CurrentDevice current(there);
    error = current.error();
    if (error == cudaSuccess) let_reach(there, home);
    if (error == cudaSuccess) error = make_there(branch);
  }
  if (error == cudaSuccess) {
    const CurrentDevice current(home);
    error = current.error();
    if (error == cudaSuccess) let_reach(home, there);
    if (error == cudaSuccess) error = make_event(&branch->sent);
  }
  if (error == cudaSuccess) return {};
  free_branch(branch);
  cudaGetLastError();
  return cuda_failed(error, "memory for a part of a layer on another GPU");
}

void free_branch(Branch* branch) {
  const OutsideCapture outside;
  {
    const CurrentDevice current(branch->there);
    for (void* memory : {branch->hidden_states, branch->topk_ids, branch->topk_weights,
                         static_cast<void*>(branch->share), branch->workspace}) {
      cudaFree(memory);  // waits for what runs on this device
    }
    if (branch->done != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(branch->done));
    if (branch->aside != nullptr) cudaStreamDestroy(static_cast<cudaStream_t>(branch->aside));
  }
  const CurrentDevice current(branch->home);
  if (branch->sent != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(branch->sent));
  cudaGetLastError();
  *branch = {};
}

Status send(const Branch& b, const MoeArgs& args, float* arrived, void* stream) {
  const BranchShape& s = b.shape;
  if (workspace_bytes(args) > b.workspace_bytes) {
    return failure(
        "a part of a layer on cuda:%d needs a workspace of %lld bytes, its branch has %lld",
        b.there, static_cast<long long>(workspace_bytes(args)),
        static_cast<long long>(b.workspace_bytes));
  }
  const auto aside = static_cast<cudaStream_t>(b.aside);
  const int64_t values = s.num_tokens * s.hidden_size, pairs = s.num_tokens * s.top_k;
  const auto copy = [&](void* to, const void* from, int64_t bytes) {
    return bytes == 0 ? cudaSuccess
                      : cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, aside);
  };
  cudaError_t error;
  {
    const CurrentDevice current(b.home);
    error = current.error();
    if (error == cudaSuccess) {
      error = cudaEventRecord(static_cast<cudaEvent_t>(b.sent), static_cast<cudaStream_t>(stream));
    }
  }
  const CurrentDevice current(b.there);
  if (error == cudaSuccess) error = current.error();
  if (error == cudaSuccess) {
    error = cudaStreamWaitEvent(aside, static_cast<cudaEvent_t>(b.sent), 0);
  }
  if (error == cudaSuccess) {
    error = copy(b.hidden_states, args.hidden_states, values * size_of(s.hidden_dtype));
  }
  if (error == cudaSuccess)
    error = copy(b.topk_ids, args.topk_ids, pairs * (s.ids_are_int64 ? 8 : 4));
  if (error == cudaSuccess) {
    error = copy(b.topk_weights, args.topk_weights, pairs * size_of(s.weights_dtype));
  }
  if (error != cudaSuccess) return cuda_failed(error, "copying a question to another GPU");
  MoeArgs there = args;
  there.hidden_states = b.hidden_states;
  there.topk_ids = b.topk_ids;
  there.topk_weights = b.topk_weights;
  there.out = b.share;
  there.out_is_fp32 = true;
  if (Status done = moe_experts(b.there, there, b.workspace, aside); !done.ok) return done;
  error = copy(arrived, b.share, values * int64_t(sizeof(float)));
  if (error == cudaSuccess) error = cudaEventRecord(static_cast<cudaEvent_t>(b.done), aside);
  return error == cudaSuccess ? Status{} : cuda_failed(error, "copying a share from another GPU");
}

Status collect(const Branch& b, void* stream) {
  const CurrentDevice current(b.home);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const cudaError_t error =
      cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(b.done), 0);
  return error == cudaSuccess ? Status{} : cuda_failed(error, "waiting for another GPU");
}

}  // namespace ey::cuda
