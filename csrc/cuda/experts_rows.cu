// SPDX-License-Identifier: Apache-2.0
#include "experts_rows.cuh"
#include "family.cuh"

namespace ey::cuda {
namespace {

constexpr int kStageBytes = rows::kStage * int(sizeof(float));

int64_t h_stride(const ExpertSet& set) { return round_up(set.intermediate_size, 8); }

bool serves(const MoeArgs& args) {
  const int64_t most = kMostGridY * rows::kWarps;
  return args.set->hidden_size <= most && args.set->intermediate_size <= most;
}

int64_t workspace_bytes(const MoeArgs& args, int64_t tokens) {
  return tokens * args.top_k * h_stride(*args.set) * int64_t(sizeof(float));
}

template <class W>
cudaError_t run_format(const Chunk& chunk, int64_t tokens, float* h, cudaStream_t stream) {
  const dim3 block(rows::kThreads);
  const auto row_blocks = [](int64_t n) { return unsigned((n + rows::kWarps - 1) / rows::kWarps); };
  const int64_t stride = h_stride(chunk.set);
  if (chunk.top_k > 0 && chunk.set.intermediate_size > 0) {
    const dim3 grid(unsigned(tokens * chunk.top_k), row_blocks(chunk.set.intermediate_size));
    const cudaError_t error =
        ptx::launch(rows::gate_up_rows<W>, grid, block, kStageBytes, stream, chunk, h, stride);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(unsigned(tokens), row_blocks(chunk.set.hidden_size));
  return ptx::launch(rows::down_rows<W>, grid, block, 0, stream, chunk, h, stride);
}

cudaError_t run(const Chunk& chunk, int64_t tokens, void* workspace, cudaStream_t stream) {
  float* const h = static_cast<float*>(workspace);
  switch (chunk.set.format) {
    case Format::kFp32:
      return run_format<Fp32>(chunk, tokens, h, stream);
    case Format::kBf16:
      return run_format<Bf16>(chunk, tokens, h, stream);
    case Format::kFp16:
      return run_format<Fp16>(chunk, tokens, h, stream);
    default:  // there are no rows of packed formats
      return cudaErrorInvalidValue;
  }
}

template <class W>
cudaError_t load_format() {
  const cudaError_t error = ptx::allow_shared(rows::gate_up_rows<W>, kStageBytes);
  return error != cudaSuccess ? error : ptx::allow_shared(rows::down_rows<W>, 0);
}

cudaError_t load() {
  cudaError_t error = load_format<Bf16>();
  if (error == cudaSuccess) error = load_format<Fp16>();
  if (error == cudaSuccess) error = load_format<Fp32>();
  return error;
}

}  // namespace

const Family kRows = {"cuda_rows", serves, workspace_bytes, run, load};

}  // namespace ey::cuda
