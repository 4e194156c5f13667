// SPDX-License-Identifier: Apache-2.0
// The experts op on a GPU: which kernel, in what chunks of tokens, in how much workspace.
#include "experts_rows.cuh"
#include "status.cuh"

namespace ey::cuda {
namespace {

// Larger calls go in chunks of whole tokens: the intermediate values h of 16384 tokens of a large
// model would be a gigabyte.
constexpr int64_t kMostWorkspace = int64_t(128) << 20;
constexpr int64_t kMostGridY = 65535;
constexpr int64_t kMostRows = kMostGridY * kWarps;

int64_t h_stride(const ExpertSet& set) { return (set.intermediate_size + 7) / 8 * 8; }

int64_t bytes_per_token(const MoeArgs& args) {
  return args.top_k * h_stride(*args.set) * int64_t(sizeof(float));
}

int64_t tokens_per_chunk(const MoeArgs& args) {
  const int64_t fitting = kMostWorkspace / (bytes_per_token(args) + 1);
  const int64_t at_least_one = fitting > 0 ? fitting : 1;
  return at_least_one < args.num_tokens ? at_least_one : args.num_tokens;
}

const void* advance(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }

template <class W>
cudaError_t run_chunk(const Chunk& chunk, int64_t tokens, cudaStream_t stream) {
  const int64_t pairs = tokens * chunk.top_k;
  const dim3 block(kThreads);
  const auto row_blocks = [](int64_t rows) { return unsigned((rows + kWarps - 1) / kWarps); };
  if (pairs > 0 && chunk.set.intermediate_size > 0) {
    const dim3 grid(unsigned(pairs), row_blocks(chunk.set.intermediate_size));
    const cudaError_t error =
        ptx::launch(gate_up_rows<W>, grid, block, kStage * sizeof(float), stream, chunk);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(unsigned(tokens), row_blocks(chunk.set.hidden_size));
  return ptx::launch(down_rows<W>, grid, block, 0, stream, chunk);
}

cudaError_t run_chunk(const Chunk& chunk, int64_t tokens, cudaStream_t stream) {
  switch (chunk.set.format) {
    case Format::kFp32:
      return run_chunk<Fp32>(chunk, tokens, stream);
    case Format::kBf16:
      return run_chunk<Bf16>(chunk, tokens, stream);
    case Format::kFp16:
      return run_chunk<Fp16>(chunk, tokens, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

Status prepare(int device) {
  DeviceFacts facts;
  if (Status s = device_facts(device, &facts); !s.ok) return s;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const OutsideCapture outside;
  const void* const kernels[] = {
      reinterpret_cast<const void*>(gate_up_rows<Bf16>),
      reinterpret_cast<const void*>(down_rows<Bf16>),
      reinterpret_cast<const void*>(gate_up_rows<Fp16>),
      reinterpret_cast<const void*>(down_rows<Fp16>),
      reinterpret_cast<const void*>(gate_up_rows<Fp32>),
      reinterpret_cast<const void*>(down_rows<Fp32>),
  };
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) continue;
    cudaGetLastError();
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      return failure(
          "cuda:%d (%s) has compute capability %d.%d and this build has code for %s only; "
          "%s; the CPU kernels work without it",
          device, facts.name, facts.major, facts.minor, architectures(),
          facts.major < 8 ? "8.0 is the oldest that Expertyard supports"
                          : "rebuild with that architecture in EXPERTYARD_CUDA_ARCHS");
    }
    return cuda_failed(error, "loading the CUDA kernels");
  }
  return {};
}

int64_t workspace_bytes(const MoeArgs& args) {
  return tokens_per_chunk(args) * bytes_per_token(args);
}

const char* kernel_isa(const ExpertSet&, DType, int64_t) { return "cuda_rows"; }

Status moe_experts(const MoeArgs& args, void* workspace, void* stream) {
  const ExpertSet& set = *args.set;
  if (Status s = take_bad_id(set); !s.ok) return s;
  if (args.num_tokens == 0 || set.hidden_size == 0) return {};
  if (set.hidden_size > kMostRows || set.intermediate_size > kMostRows) {
    return failure(
        "hidden_size %lld and intermediate_size %lld: this CUDA kernel serves up to %lld",
        (long long)set.hidden_size, (long long)set.intermediate_size, (long long)kMostRows);
  }
  const int64_t chunk_tokens = tokens_per_chunk(args);
  if (chunk_tokens * args.top_k > INT32_MAX) {
    return failure("top_k %lld is more than this CUDA kernel serves", (long long)args.top_k);
  }
  for (int64_t first = 0; first < args.num_tokens; first += chunk_tokens) {
    const int64_t left = args.num_tokens - first;
    const int64_t tokens = left < chunk_tokens ? left : chunk_tokens;
    const int64_t row_bytes = set.hidden_size * size_of(args.hidden_dtype);
    const int64_t first_pair = first * args.top_k;
    Chunk chunk{};
    chunk.set = set;
    chunk.hidden_states = advance(args.hidden_states, first * row_bytes);
    chunk.out = static_cast<char*>(args.out) + first * row_bytes;
    chunk.topk_ids = advance(args.topk_ids, first_pair * (args.ids_are_int64 ? 8 : 4));
    chunk.topk_weights = advance(args.topk_weights, first_pair * size_of(args.weights_dtype));
    chunk.h = static_cast<float*>(workspace);
    chunk.h_stride = h_stride(set);
    chunk.top_k = args.top_k;
    chunk.first_token = first;
    chunk.hidden_dtype = args.hidden_dtype;
    chunk.weights_dtype = args.weights_dtype;
    chunk.ids_are_int64 = args.ids_are_int64;
    const cudaError_t error = run_chunk(chunk, tokens, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) {
      return cuda_failed(error, "launching the CUDA experts kernel");
    }
  }
  return {};
}

}  // namespace ey::cuda
