// SPDX-License-Identifier: Apache-2.0
// Codes and numbers out of what checkpoints pack: the part of reading GGUF, GPTQ and AWQ that costs
// time. What the layouts are: python/expertyard/loading/sources/.
#pragma once

#include <cstdint>

#include "status.h"

namespace ey {

// Writes the weights of `count` blocks in fp32; a block has `weights` of them.
struct BlockDecoder {
  void (*decode)(const uint8_t* blocks, int64_t count, float* out) = nullptr;
  int64_t weights = 1;
};

// Of q5_1, q5_k and q6_k, which no format of ours holds; empty for every other kind.
BlockDecoder block_decoder(const char* kind);

// A run of GGUF blocks. q5_0 and q4_k: one code a byte (q5_0: as int8 has them, integer + 128);
// what has a BlockDecoder: the weights in fp32. Fails for other kinds.
Status decode_ggml(const char* kind, const uint8_t* blocks, int64_t count, void* out);

// GPTQ, 4 bits: words [inputs / 8, outputs] -> codes [outputs, inputs].
void decode_gptq(const uint32_t* words, int64_t inputs, int64_t outputs, uint8_t* codes);

// AWQ "gemm", 4 bits: words [inputs, outputs / 8] -> codes [outputs, inputs].
void decode_awq(const uint32_t* words, int64_t inputs, int64_t outputs, uint8_t* codes);

}  // namespace ey
