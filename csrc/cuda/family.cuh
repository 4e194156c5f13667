// SPDX-License-Identifier: Apache-2.0
// A way to do the whole op: some kernels, their workspace, and the launches for one run of tokens.
// experts.cu picks one and cuts a call into runs that fit the workspace.
#pragma once

#include "choice.cuh"

namespace ey::cuda {

struct Family {
  const char* isa;
  bool (*serves)(const MoeArgs& args);
  int64_t (*workspace_bytes)(const MoeArgs& args, int64_t tokens);  // grows with tokens
  // Queues the launches. tokens > 0, hidden_size > 0; top_k and intermediate_size may be 0.
  cudaError_t (*run)(const Chunk& chunk, int64_t tokens, void* workspace, cudaStream_t stream);
  cudaError_t (*load)();  // the kernels, onto the current device
};

extern const Family kRows, kTiles, kStream, kGrouped;
#if EXPERTYARD_HOPPER  // this build has code for sm_90a
extern const Family kWgmma, kWgmmaFast;
inline const Family* const kFamilies[] = {&kRows,    &kTiles, &kStream,
                                          &kGrouped, &kWgmma, &kWgmmaFast};
#else
inline const Family* const kFamilies[] = {&kRows, &kTiles, &kStream, &kGrouped};
#endif

constexpr int64_t kMostGridY = 65535;

}  // namespace ey::cuda
