// SPDX-License-Identifier: Apache-2.0
// One chunk of a block: 32 rows (lanes of blocks.h) x kChunkK of k, copied to shared memory by a
// warp and multiplied there with tokens by the same warp.
//
// A warp-wide load of 16 bytes a lane takes 4 steps of 128 bytes, a quad: lane (g = lane / 4, t =
// lane % 4) has rows 4 g .. 4 g + 3 of step t. Those 4 rows are rows g and g + 8 of two mma, since
// nothing ties the rows of an mma to an order, as nothing ties its k (format.cuh): so weights go
// from DRAM to the A operand without a shuffle, in 16-byte pieces that a lane copies for itself.
//
//   products[j][b]   rows 4 g + 2 j (elements 0, 1) and 4 g + 2 j + 1 (2, 3), columns 8 b + 2 t, +
//   1
//
// In shared memory: the heads (scales, zeros) of the chunk's lines, then its quads.
#pragma once

#include "format.cuh"
#include "scale.cuh"

namespace ey::cuda {

// One matrix of every expert, as its chunks lie; made by matrix_of, passed to kernels by value.
struct Matrix {
  int64_t block_bytes, line_bytes;
  int k;               // values of a token that count; a multiple of 8
  int padded_k;        // of the weights
  int num_blocks;      // of an expert
  int num_chunks;      // of a block
  int chunks_in_line;  // 1 if a line is no longer than a chunk
  int lines_in_chunk;  // 1 if a line is no shorter
  int quad_shift;      // log2 of the quads of a line in a chunk
  int group_mask;      // quads of a group in a chunk, less 1
  int head_bytes;      // of a line
  int scale_bytes;     // of it, before the zeros
  ScaleType scale_type;
  bool zeros;
};

template <class F>
struct ChunkShape {
  static constexpr int kQuadK = 4 * F::kStepK;
  static constexpr int kQuads = F::kChunkK / kQuadK;
  static constexpr int kQuadBytes = kQuads * 512;
  static constexpr int kTokenBytes = F::kChunkK * 2 + F::kTokenPad;  // of one token's row
  static constexpr int kPieces = F::kChunkK / 8;                     // 16-byte pieces of that row
};

inline int log2_of(int64_t n) {  // -1 if n is no power of 2
  for (int i = 0; i < 31; ++i) {
    if (n == int64_t(1) << i) return i;
  }
  return -1;
}

// False if the kernels of F have no chunks for such groups.
template <class F>
bool matrix_of(const ExpertSet& set, int64_t k, int64_t num_blocks, Matrix* m) {
  const BlockShape shape{set.format, set.packing, k};
  const int64_t line_k = shape.line_k(), group_k = shape.group();
  const bool one_line = line_k >= k;
  if (line_k >= F::kChunkK ? line_k % F::kChunkK != 0 && !one_line
                           : F::kChunkK % line_k != 0 && !one_line) {
    return false;
  }
  if (k > INT32_MAX / 2 || num_blocks > INT32_MAX) return false;
  m->block_bytes = shape.block_bytes();
  m->line_bytes = shape.line_bytes();
  m->padded_k = int(shape.padded_k());
  m->k = m->padded_k;
  m->num_blocks = int(num_blocks);
  m->num_chunks = int((shape.padded_k() + F::kChunkK - 1) / F::kChunkK);
  const bool short_lines = line_k < F::kChunkK && !one_line;
  m->lines_in_chunk = short_lines ? int(F::kChunkK / line_k) : 1;
  m->chunks_in_line = short_lines ? 1 : one_line ? m->num_chunks : int(line_k / F::kChunkK);
  constexpr int kQuadK = ChunkShape<F>::kQuadK;
  m->quad_shift = short_lines ? log2_of(line_k / kQuadK) : 30;
  // A group as long as a chunk or longer ends, for the sums' sake, with the chunk.
  const bool short_groups = group_k < F::kChunkK && group_k < k;
  if (short_groups && (group_k % (kQuadK * F::kQuads) != 0 || log2_of(group_k / kQuadK) < 0)) {
    return false;
  }
  m->group_mask = (short_groups ? int(group_k) / kQuadK : ChunkShape<F>::kQuads) - 1;
  m->head_bytes = int(shape.line_head());
  m->scale_bytes = int(shape.scale_bytes());
  m->scale_type = set.packing.scale_type;
  m->zeros = set.packing.zeros;
  return m->quad_shift >= 0;
}

inline int heads_bytes(const Matrix& m) { return m.head_bytes * m.lines_in_chunk; }

// Starts this warp's copies of a chunk. What is beyond the matrix becomes zeros.
template <class F>
__device__ __forceinline__ void copy_chunk(const Matrix& m, const char* block, int chunk,
                                           char* stage, int lane) {
  constexpr int kQuadK = ChunkShape<F>::kQuadK;
  const int g = lane / 4, t = lane % 4;
  const int line = m.lines_in_chunk > 1 ? chunk * m.lines_in_chunk : chunk / m.chunks_in_line;
  const int chunk_of_line = m.lines_in_chunk > 1 ? 0 : chunk % m.chunks_in_line;
  const char* const line_begin = block + line * m.line_bytes;
  if constexpr (F::kScaled) {
    for (int i = 0; i < m.lines_in_chunk; ++i) {
      const bool valid = chunk * F::kChunkK + (i << m.quad_shift) * kQuadK < m.padded_k;
      if (lane * 16 < m.head_bytes) {
        ptx::copy16_async(stage + i * m.head_bytes + lane * 16,
                          valid ? line_begin + i * m.line_bytes + lane * 16 : block, valid);
      }
    }
  }
  char* const quads = stage + m.head_bytes * m.lines_in_chunk + lane * 16;
  const char* const from = line_begin + m.head_bytes +
                           int64_t(chunk_of_line) * ChunkShape<F>::kQuadBytes + t * kStepBytes +
                           g * 16;
#pragma unroll
  for (int q = 0; q < ChunkShape<F>::kQuads; ++q) {
    const bool valid = chunk * F::kChunkK + q * kQuadK + t * F::kStepK < m.padded_k;
    const int heads = F::kScaled ? (q >> m.quad_shift) * m.head_bytes : 0;
    ptx::copy16_async(quads + q * 512, valid ? from + q * 512 + heads : block, valid);
  }
}

// sums[j][b] += the chunk times columns, for which `tokens` points to column 0's row in shared
// memory; columns from num_columns on are zeros and have no row.
template <class F, int kBlocks, bool kOrdered>
__device__ __forceinline__ void multiply_chunk(const Matrix& m, const char* stage,
                                               const char* tokens, int num_columns, int lane,
                                               float (&sums)[2][kBlocks][4]) {
  constexpr int kQuadK = ChunkShape<F>::kQuadK, kOperands = 2 * F::kSlices;
  const int g = lane / 4, t = lane % 4;
  const char* const quads = stage + m.head_bytes * m.lines_in_chunk + lane * 16;
  const char* const my_tokens = tokens + g * ChunkShape<F>::kTokenBytes;
  float products[2][kBlocks][4] = {};  // of one group; not used by formats without scales
  float token_sums[kBlocks][4] = {};   // of one group; only with zeros
  auto& target = F::kScaled ? products : sums;

#pragma unroll
  for (int q = 0; q < ChunkShape<F>::kQuads; q += F::kQuads) {
    uint32_t dwords[4][F::kQuads];
#pragma unroll
    for (int i = 0; i < F::kQuads; ++i) {
      const uint4 v = ptx::load_uint4(quads + (q + i) * 512);
      dwords[0][i] = v.x, dwords[1][i] = v.y, dwords[2][i] = v.z, dwords[3][i] = v.w;
    }
    uint32_t b[kBlocks][kOperands];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if (kBlocks > 2 && 8 * n >= num_columns) break;
      if (n * 8 + g < num_columns) {
        F::template tokens<kOrdered>(
            my_tokens + n * 8 * ChunkShape<F>::kTokenBytes + q * kQuadK * 2, t, b[n]);
      } else {
#pragma unroll
        for (int i = 0; i < kOperands; ++i) b[n][i] = 0;
      }
    }
#pragma unroll
    for (int s = 0; s < F::kSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t a0 = F::pair(dwords[2 * j], s, 0), a1 = F::pair(dwords[2 * j + 1], s, 0);
        const uint32_t a2 = F::pair(dwords[2 * j], s, 1), a3 = F::pair(dwords[2 * j + 1], s, 1);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          if (kBlocks > 2 && 8 * n >= num_columns) break;
          ptx::mma_bf16(target[j][n], a0, a1, a2, a3, b[n][2 * s], b[n][2 * s + 1]);
        }
      }
      if (F::kFormat == Format::kInt4 && m.zeros) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          ptx::mma_bf16(token_sums[n], kBf16Ones, kBf16Ones, kBf16Ones, kBf16Ones, b[n][2 * s],
                        b[n][2 * s + 1]);
        }
      }
    }
    if constexpr (F::kScaled) {
      if ((q & m.group_mask) != m.group_mask) continue;  // the group goes on
      float scales[4], zeros[4];
      const char* const head = stage + (q >> m.quad_shift) * m.head_bytes;
      if constexpr (F::kFormat == Format::kMxfp4) {
        load_e8m0(head + (q / (m.group_mask + 1)) % 2 * kLanes + 4 * g, scales);
      } else {
        const int bytes = m.scale_type == ScaleType::kFp32 ? 16 : 8;
        load_scales(head + bytes * g, m.scale_type, scales);
        if (F::kFormat == Format::kInt4 && m.zeros) {
          load_scales(head + m.scale_bytes + bytes * g, m.scale_type, zeros);
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                products[j][n][i] -= (zeros[2 * j + i / 2] - kInt4Middle) * token_sums[n][i];
              }
              token_sums[n][i] = 0.0f;
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[j][n][i] += scales[2 * j + i / 2] * products[j][n][i];
            products[j][n][i] = 0.0f;
          }
        }
      }
    }
  }
}

}  // namespace ey::cuda
