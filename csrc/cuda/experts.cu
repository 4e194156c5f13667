// SPDX-License-Identifier: Apache-2.0
// The experts op on a GPU: which kernels, in what runs of tokens, in how much workspace.
#include <cstdio>
#include <cstring>

#include "family_choice.cuh"
#include "status.cuh"

namespace ey::cuda {
namespace {

// Larger calls go in runs of whole tokens: what lies between the two products would be gigabytes
// for 16384 tokens of a large model. Every run reads the weights again, so a large layer gets more.
constexpr int64_t kLeastWorkspace = int64_t(128) << 20, kMostWorkspace = int64_t(1) << 30;

int64_t weight_bytes(const ExpertSet& set) {
  if (set.layout == Layout::kBlocks) {
    return set.num_experts *
           (w13_blocks(set.intermediate_size, has_gate(set.activation)) *
                BlockShape{set.format, set.packing, set.hidden_size}.block_bytes() +
            w2_blocks(set.hidden_size) *
                BlockShape{set.format, set.packing, set.intermediate_size}.block_bytes());
  }
  return set.num_experts * 3 * set.hidden_size * set.intermediate_size * size_of(set.format);
}

int64_t most_workspace(const ExpertSet& set) {
  const int64_t quarter = weight_bytes(set) / 4;
  const int64_t most = quarter > kLeastWorkspace ? quarter : kLeastWorkspace;
  return most < kMostWorkspace ? most : kMostWorkspace;
}

int64_t tokens_per_run(const MoeArgs& args, const Family& family) {
  // A pair's part of the workspace is linear but for rounding, which 1024 tokens even out.
  const int64_t a_token = family.workspace_bytes(args, 1024) / 1024 + 1;
  int64_t tokens = most_workspace(*args.set) / a_token;
  if (tokens * args.top_k > INT32_MAX) tokens = INT32_MAX / args.top_k;
  if (tokens < 1) tokens = 1;
  return tokens < args.num_tokens ? tokens : args.num_tokens;
}

const void* advance(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

}  // namespace

Status prepare(int device) {
  if (Status s = check_device(device); !s.ok) return s;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const OutsideCapture outside;
  cudaError_t error = cudaSuccess;
  for (const Family* family : kFamilies) {
    if (error == cudaSuccess) error = family->load();
  }
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction) {
    return cuda_failed(error, "loading the CUDA kernels");
  }
  DeviceFacts facts;
  if (Status s = device_facts(device, &facts); !s.ok) return s;
  return failure(
      "cuda:%d (%s) has compute capability %d.%d and this build has code for %s only; %s; the CPU "
      "kernels work without it",
      device, facts.name, facts.major, facts.minor, architectures(),
      facts.major < 8 ? "8.0 is the oldest that Expertyard supports"
                      : "rebuild with that architecture in EXPERTYARD_CUDA_ARCHS");
}

int64_t workspace_bytes(const MoeArgs& args) {
  if (args.num_tokens == 0) return 0;
  const Family& family = family_of(args);
  return family.workspace_bytes(args, tokens_per_run(args, family));
}

const char* kernel_isa(const MoeArgs& args) { return family_of(args).isa; }

Status moe_experts(int device, const MoeArgs& args, void* workspace, void* stream) {
  const ExpertSet& set = *args.set;
  if (Status s = take_bad_id(set); !s.ok) return s;
  if (args.num_tokens == 0 || set.hidden_size == 0) return {};
  const Family& family = family_of(args);
  if (forced_name() && !forced_family()) {
    char names[128] = "";
    for (const Family* f : kFamilies) {
      snprintf(names + strlen(names), sizeof names - strlen(names), " %s", f->isa);
    }
    return failure("EXPERTYARD_CUDA_KERNELS: no CUDA kernels are called '%s'; there are:%s",
                   forced_name(), names);
  }
  if (!family.serves(args)) {
    if (forced_name()) {
      return failure("EXPERTYARD_CUDA_KERNELS: %s do not serve this call; without it %s",
                     family.isa, "the kernels that do are chosen");
    }
    return failure(
        "hidden_size %lld and intermediate_size %lld: no CUDA kernel serves sizes that large",
        (long long)set.hidden_size, (long long)set.intermediate_size);
  }
  // Set in this runtime too: torch has a copy of its own, and in a thread that has no context yet
  // each copy believes in device 0.
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const int64_t run_tokens = tokens_per_run(args, family);
  for (int64_t first = 0; first < args.num_tokens; first += run_tokens) {
    const int64_t left = args.num_tokens - first;
    const int64_t tokens = left < run_tokens ? left : run_tokens;
    const int64_t row_bytes = set.hidden_size * size_of(args.hidden_dtype);
    const int64_t first_pair = first * args.top_k;
    Chunk chunk{};
    chunk.set = set;
    chunk.hidden_states = advance(args.hidden_states, first * row_bytes);
    chunk.out = static_cast<char*>(args.out) + first * set.hidden_size * size_of(out_dtype(args));
    chunk.topk_ids = advance(args.topk_ids, first_pair * (args.ids_are_int64 ? 8 : 4));
    chunk.topk_weights = advance(args.topk_weights, first_pair * size_of(args.weights_dtype));
    chunk.top_k = args.top_k;
    chunk.first_token = first;
    chunk.hidden_dtype = args.hidden_dtype;
    chunk.out_dtype = out_dtype(args);
    chunk.weights_dtype = args.weights_dtype;
    chunk.ids_are_int64 = args.ids_are_int64;
    const cudaError_t error =
        family.run(chunk, tokens, workspace, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return cuda_failed(error, "launching the CUDA experts kernels");
  }
  return {};
}

}  // namespace ey::cuda
