// SPDX-License-Identifier: Apache-2.0
#include "sum.h"

#include <algorithm>
#include <cstring>

#include "../cpu/threads.h"

namespace ey::handoff {
namespace {

constexpr int64_t kChunk = 1024;           // sums of one step: 4 KB, in L1
constexpr int64_t kMaxRun = 16;            // chunks that a thread takes at once
constexpr int64_t kPerThread = 64 * 1024;  // a thread less than this is not worth waking

struct Sum {
  const cpu::Kernel& kernel;
  const float* const* parts;
  int num_parts;
  int64_t size;
  DType dtype;
  char* out;
  cpu::Tasks chunks;
};

void add_chunks(void* context, int, int threads) {
  Sum& s = *static_cast<Sum*>(context);
  const int64_t chunks = (s.size + kChunk - 1) / kChunk;
  alignas(64) float total[kChunk];
  for (;;) {
    const auto run = s.chunks.take(chunks, kMaxRun, threads);
    if (run.begin == run.end) return;
    for (int64_t c = run.begin; c < run.end; ++c) {
      const int64_t begin = c * kChunk, n = std::min(kChunk, s.size - begin);
      std::memcpy(total, s.parts[0] + begin, n * sizeof(float));
      for (int part = 1; part < s.num_parts; ++part) {
        const float* more = s.parts[part] + begin;
        for (int64_t i = 0; i < n; ++i) total[i] += more[i];
      }
      s.kernel.store_row(total, n, s.dtype, s.out + begin * size_of(s.dtype));
    }
  }
}

}  // namespace

void add_parts(const cpu::Kernel& kernel, const float* const* parts, int num_parts, int64_t size,
               DType dtype, void* out, int max_threads) {
  Sum sum{kernel, parts, num_parts, size, dtype, static_cast<char*>(out), {}};
  const auto useful = static_cast<int>(std::min<int64_t>(max_threads, 1 + size / kPerThread));
  cpu::run_team(useful, add_chunks, &sum);
}

}  // namespace ey::handoff
