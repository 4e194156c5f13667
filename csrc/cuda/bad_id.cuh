// SPDX-License-Identifier: Apache-2.0
// How a kernel tells the host of a topk_ids value that names no expert: one 8-byte word in pinned
// memory, 0 while all is well, else 1 | token (31 bits) | id (32 bits). The last writer wins.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace ey::cuda {

__host__ __device__ inline uint64_t bad_id_word(int64_t token, int64_t id) {
  const int32_t shown = id > INT32_MAX ? INT32_MAX : id < INT32_MIN ? INT32_MIN : int32_t(id);
  return uint64_t(1) << 63 | uint64_t(token & 0x7fffffff) << 32 | uint32_t(shown);
}

inline int64_t token_of_bad_id(uint64_t word) { return int64_t(word >> 32 & 0x7fffffff); }
inline int32_t id_of_bad_id(uint64_t word) { return int32_t(uint32_t(word)); }

}  // namespace ey::cuda
