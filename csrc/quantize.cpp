// SPDX-License-Identifier: Apache-2.0
// Compiled for three vector widths and chosen at run time. Lanes are added in the same order
// whatever the width, so that every machine makes the same file.
#include "quantize.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/convert.h"
#include "cpu/features.h"
#include "packing.h"

#define EY_INLINE inline __attribute__((always_inline))

namespace ey {
namespace {

using cpu::bits;

constexpr int kWidth = 16;           // lanes of a sum; vectors of N lanes take 16 / N turns
constexpr int64_t kScaleRows = 128;  // of an fp8 block
constexpr uint32_t kInfinity = 0x7F800000;
constexpr float kToEven = 0x1.8p23f;  // |x| < 2^22: (x + this) - this is x rounded to nearest even
constexpr int kShares = 29;           // of the plain scale that a search tries: 1 - i / 64

enum class Problem { kNone, kWeight, kScale };

struct Job {
  Format format;
  ScaleType scale_type;
  bool zeros, search;
  bool blocks;                       // 128 rows share scales
  int64_t k, group, groups, padded;  // padded: whole groups, and whole vectors
};

template <int N>
struct Vec {
  typedef float F __attribute__((vector_size(4 * N)));
  typedef int32_t I __attribute__((vector_size(4 * N)));
  typedef uint16_t H __attribute__((vector_size(2 * N)));
  typedef uint8_t B __attribute__((vector_size(N)));
};

template <class V>
EY_INLINE V load(const void* from) {
  V out;
  __builtin_memcpy(&out, from, sizeof out);
  return out;
}

template <class V>
EY_INLINE V at_least(V x, V low) {
  return x < low ? low : x;
}

template <class V>
EY_INLINE V at_most(V x, V high) {
  return x > high ? high : x;
}

// A scale as it is stored at `to`; its value.
EY_INLINE float store(float value, ScaleType type, char* to) {
  if (type == ScaleType::kFp32) {
    std::memcpy(to, &value, 4);
    return value;
  }
  const uint16_t half = type == ScaleType::kBf16 ? cpu::to_bf16(value) : cpu::to_fp16(value);
  std::memcpy(to, &half, 2);
  return type == ScaleType::kBf16 ? cpu::from_bf16(half) : cpu::from_fp16(half);
}

EY_INLINE float inverse_of(float step) {
  const float inverse = step > 0 ? 1.0f / step : 0.0f;
  return bits<uint32_t>(inverse) < kInfinity ? inverse : 0.0f;  // subnormal steps have none
}

// Weights of one group and what they become with one scale. `codes` and `error` differ only in what
// they do with a code, so that a search decides by exactly what is stored.
template <int N, Format F, bool kZeros>
struct Group {
  using V = typename Vec<N>::F;
  using I = typename Vec<N>::I;
  using B = typename Vec<N>::B;

  float step = 0, inverse = 0, zero = 0;

  // Codes of N weights as integers, and the numbers that they stand for.
  EY_INLINE void encode(V w, I* code, V* value) const {
    if constexpr (F == Format::kMxfp4) {
      const V scaled = w * inverse;
      const V magnitude = (V)((I)scaled & 0x7FFFFFFF);
      I index = {};
      for (const float bound : {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f}) {
        index -= (I)(magnitude > bound);
      }
      *code = index - (I)(scaled < 0.0f) * 8;
      // 0 .5 1 1.5 2 3 4 6: index is a float of one mantissa bit, exponent bias 1
      const I wide = (index << 22) + ((index > 1) & ((127 - 1) << 23));
      const V subnormal = __builtin_convertvector(index, V) * 0.5f;
      const V e2m1 = index > 1 ? (V)wide : subnormal;
      *value = (V)((I)e2m1 | ((I)(scaled < 0.0f) & INT32_MIN)) * step;
    } else if constexpr (F == Format::kFp8) {
      const V scaled = at_most(at_least(w * inverse, V{} - 448.0f), V{} + 448.0f);
      const I sign = (I)scaled & INT32_MIN, magnitude = (I)scaled & 0x7FFFFFFF;
      const I normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
      const V small = ((V)magnitude * 512.0f + kToEven) - kToEven;  // in units of 2^-9
      const I tiny = magnitude < 0x3C800000;                        // below 2^-6
      const I low = tiny ? __builtin_convertvector(small, I) : normal;
      *code = low | ((sign >> 24) & 0x80);
      const V rounded = tiny ? small * 0x1p-9f : (V)((normal + (120 << 3)) << 20);
      *value = (V)((I)rounded | sign) * step;
    } else {
      constexpr float kCentre = F == Format::kInt8 ? 128 : 8;
      constexpr float kLeast = kZeros ? 0 : F == Format::kInt8 ? -127 : -8;
      constexpr float kMost = kZeros ? 15 : kCentre - 1;
      const V exact = kZeros ? w * inverse + zero : w * inverse;
      const V held = at_most(at_least(exact, V{} + kLeast), V{} + kMost);
      const V rounded = (held + kToEven) - kToEven;
      *code = __builtin_convertvector(kZeros ? rounded : rounded + kCentre, I);
      *value = (kZeros ? rounded - zero : rounded) * step;
    }
  }

  EY_INLINE void codes(const float* w, int64_t n, uint8_t* out) const {
    for (int64_t i = 0; i < n; i += N) {
      I code;
      V value;
      encode(load<V>(w + i), &code, &value);
      const B narrow = __builtin_convertvector(code, B);
      __builtin_memcpy(out + i, &narrow, sizeof narrow);
    }
  }

  EY_INLINE float error(const float* w, int64_t n) const {
    V sums[kWidth / N] = {};
    for (int64_t i = 0; i < n; i += kWidth) {
      for (int part = 0; part < kWidth / N; ++part) {
        const V exact = load<V>(w + i + part * N);
        I code;
        V value;
        encode(exact, &code, &value);
        sums[part] += (value - exact) * (value - exact);
      }
    }
    float lanes[kWidth];
    std::memcpy(lanes, sums, sizeof lanes);
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }
};

// Least and greatest of n floats, as bits ordered like integers; n is a multiple of 16.
struct Range {
  int32_t low, high;

  EY_INLINE float magnitude() const { return std::max(std::max(value(high), -value(low)), 0.0f); }
  static EY_INLINE float value(int32_t ordered) {
    return bits<float>(ordered ^ ((ordered >> 31) & 0x7FFFFFFF));
  }
  EY_INLINE bool finite() const {
    const int32_t infinity = static_cast<int32_t>(kInfinity);
    return high < infinity && low > (~infinity);
  }
};

template <int N>
EY_INLINE Range range_of(const float* w, int64_t n) {
  using I = typename Vec<N>::I;
  I low = I{} + INT32_MAX, high = I{} + INT32_MIN;
  for (int64_t i = 0; i < n; i += N) {
    const I raw = load<I>(w + i);
    const I ordered = raw ^ ((raw >> 31) & 0x7FFFFFFF);
    low = at_most(ordered, low);
    high = at_least(ordered, high);
  }
  Range out{low[0], high[0]};
  for (int i = 1; i < N; ++i) {
    out.low = std::min(out.low, low[i]);
    out.high = std::max(out.high, high[i]);
  }
  return out;
}

// The scale of one share, stored at `scale` and `zero`. False if it is not finite.
template <int N, Format F, bool kZeros>
EY_INLINE bool choose(const Job& job, const Range& range, float largest, int share, char* scale,
                      char* zero, Group<N, F, kZeros>* group) {
  if constexpr (F == Format::kMxfp4) {
    const int exponent = static_cast<int>(bits<uint32_t>(largest) >> 23) - 127;
    const int biased = largest > 0 ? std::clamp(exponent - 2 + share + 127, 0, 254) : 0;
    *scale = static_cast<char>(biased);
    group->step = biased ? bits<float>(static_cast<uint32_t>(biased) << 23) : 0x1p-127f;
    group->inverse = bits<float>(static_cast<uint32_t>(254 - biased) << 23);
    return true;
  }
  const float part = 1.0f - static_cast<float>(share) / 64;
  if constexpr (kZeros) {
    const float low = std::min(Range::value(range.low), 0.0f) * part;
    const float high = std::max(Range::value(range.high), 0.0f) * part;
    group->step = store((high - low) / 15, job.scale_type, scale);
    group->inverse = inverse_of(group->step);
    const float exact = std::clamp(-low * group->inverse, 0.0f, 15.0f);
    group->zero = store((exact + kToEven) - kToEven, job.scale_type, zero);
  } else {
    constexpr double kLargest = F == Format::kFp8 ? 448 : F == Format::kInt8 ? 127 : 7;
    const float factor = static_cast<float>((1.0 - share / 64.0) / kLargest);
    group->step = store(largest * factor, job.scale_type, scale);
    group->inverse = inverse_of(group->step);
  }
  return bits<uint32_t>(group->step) < kInfinity;
}

template <int N, Format F, bool kZeros>
EY_INLINE Problem quantize_group(const Job& job, const float* w, const Range& range, float largest,
                                 uint8_t* codes, char* scale, char* zero) {
  Group<N, F, kZeros> group;
  int best = 0;
  if (job.search) {
    const int shares = F == Format::kMxfp4 ? 2 : kShares;  // powers of two only
    float least = 0;
    for (int share = 0; share < shares; ++share) {
      if (!choose(job, range, largest, share, scale, zero, &group)) return Problem::kScale;
      const float error = group.error(w, job.group);
      if (share == 0 || error < least) least = error, best = share;
    }
  }
  if (!choose(job, range, largest, best, scale, zero, &group)) return Problem::kScale;
  group.codes(w, job.group, codes);
  return Problem::kNone;
}

template <int N>
EY_INLINE void load_row(const Job& job, const PlainRows& rows, int64_t row, float* to) {
  const char* from = rows.data + row * rows.stride;
  if (rows.decoder.decode) {
    const auto* blocks = reinterpret_cast<const uint8_t*>(from);
    rows.decoder.decode(blocks, job.k / rows.decoder.weights, to);
    std::fill(to + job.k, to + job.padded, 0.0f);
    return;
  }
  int64_t done = 0;
  if (rows.dtype == DType::kBF16) {
    for (; done + N <= job.k; done += N) {
      const auto half = load<typename Vec<N>::H>(from + 2 * done);
      const auto wide = __builtin_convertvector(half, typename Vec<N>::I) << 16;
      __builtin_memcpy(to + done, &wide, sizeof wide);
    }
  }
  const int64_t size = rows.dtype == DType::kF32 ? 4 : 2;
  cpu::load_row_fp32(from + done * size, rows.dtype, job.k - done, job.padded - done, to + done);
}

template <int N, Format F, bool kZeros>
EY_INLINE Problem rows_of(const Job& job, const PlainRows& from, int64_t rows, float* row,
                          float* blocks, uint8_t* codes, int64_t code_stride, char* scales,
                          char* zeros) {
  const int64_t size = size_of(job.scale_type);
  const bool shared = F == Format::kFp8 && job.blocks;
  if (shared) {
    std::fill(blocks, blocks + job.groups, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      load_row<N>(job, from, r, row);
      for (int64_t g = 0; g < job.groups; ++g) {
        const Range range = range_of<N>(row + g * job.group, job.group);
        if (!range.finite()) return Problem::kWeight;
        blocks[g] = std::max(blocks[g], range.magnitude());
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    load_row<N>(job, from, r, row);
    for (int64_t g = 0; g < job.groups; ++g) {
      const float* w = row + g * job.group;
      const int64_t at = (r * job.groups + g) * size;
      const Range range = shared ? Range{0, 0} : range_of<N>(w, job.group);
      if (!range.finite()) return Problem::kWeight;
      const Problem problem = quantize_group<N, F, kZeros>(
          job, w, range, shared ? blocks[g] : range.magnitude(),
          codes + r * code_stride + g * job.group, scales + at, kZeros ? zeros + at : nullptr);
      if (problem != Problem::kNone) return problem;
    }
  }
  return Problem::kNone;
}

template <int N>
EY_INLINE Problem any_rows(const Job& job, const PlainRows& from, int64_t rows, float* row,
                           float* blocks, uint8_t* codes, int64_t stride, char* scales,
                           char* zeros) {
#define EY_ROWS(format, with) \
  rows_of<N, Format::format, with>(job, from, rows, row, blocks, codes, stride, scales, zeros)
  switch (job.format) {
    case Format::kInt8:
      return EY_ROWS(kInt8, false);
    case Format::kInt4:
      return job.zeros ? EY_ROWS(kInt4, true) : EY_ROWS(kInt4, false);
    case Format::kFp8:
      return EY_ROWS(kFp8, false);
    default:
      return EY_ROWS(kMxfp4, false);
  }
#undef EY_ROWS
}

using Rows = Problem(const Job&, const PlainRows&, int64_t, float*, float*, uint8_t*, int64_t,
                     char*, char*);

Problem rows_in_four(const Job& job, const PlainRows& from, int64_t rows, float* row, float* blocks,
                     uint8_t* codes, int64_t stride, char* scales, char* zeros) {
  return any_rows<4>(job, from, rows, row, blocks, codes, stride, scales, zeros);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) Problem rows_in_eight(const Job& job, const PlainRows& from,
                                                      int64_t rows, float* row, float* blocks,
                                                      uint8_t* codes, int64_t stride, char* scales,
                                                      char* zeros) {
  return any_rows<8>(job, from, rows, row, blocks, codes, stride, scales, zeros);
}

#ifndef EY_EMULATE_AVX512  // emulated are kernels only
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) Problem
rows_in_sixteen(const Job& job, const PlainRows& from, int64_t rows, float* row, float* blocks,
                uint8_t* codes, int64_t stride, char* scales, char* zeros) {
  return any_rows<16>(job, from, rows, row, blocks, codes, stride, scales, zeros);
}
#endif
#endif

Rows* widest() {
#ifdef __x86_64__
#ifndef EY_EMULATE_AVX512
  if (cpu::features() & cpu::kFeatureAvx512) return rows_in_sixteen;
#endif
  if (cpu::features() & cpu::kFeatureAvx2) return rows_in_eight;
#endif
  return rows_in_four;
}

Job job_of(const BlockShape& shape, bool search) {
  const int64_t group = shape.packing.group_size ? shape.packing.group_size
                                                 : round_up(std::max<int64_t>(shape.k, 1), kWidth);
  const int64_t groups = (shape.k + group - 1) / group;
  return {.format = shape.format,
          .scale_type = shape.packing.scale_type,
          .zeros = shape.packing.zeros,
          .search = search,
          .blocks = shape.format == Format::kFp8 && shape.packing.group_size > 0,
          .k = shape.k,
          .group = group,
          .groups = groups,
          .padded = groups * group};
}

Status status_of(Problem problem) {
  if (problem == Problem::kNone) return {};
  return failure("%s: expected finite numbers, got NaN or infinity",
                 problem == Problem::kWeight ? "weight" : "scales");
}

PlainRows from_row(PlainRows rows, int64_t first) {
  rows.data += first * rows.stride;
  return rows;
}

// Room for what `rows` rows of a matrix become.
struct Scratch {
  std::vector<uint8_t> codes;
  std::vector<char> scales, zeros;

  Scratch(const Job& job, int64_t rows)
      : codes(rows * job.padded),
        scales(rows * job.groups * size_of(job.scale_type)),
        zeros(job.zeros ? scales.size() : 0) {}
};

}  // namespace

Status quantize_rows(const BlockShape& shape, const PlainRows& from, int64_t rows, bool search,
                     uint8_t* codes, char* scales, char* zeros) {
  const Job job = job_of(shape, search);
  Rows* const run = widest();
  std::vector<float> row(job.padded), blocks(job.groups);
  std::vector<uint8_t> padded(job.padded == job.k ? 0 : kScaleRows * job.padded);
  const int64_t scale_stride = job.groups * size_of(job.scale_type);
  for (int64_t first = 0; first < rows; first += kScaleRows) {
    const int64_t count = std::min(kScaleRows, rows - first);
    const PlainRows part = from_row(from, first);
    uint8_t* to = codes + first * job.k;
    const Problem problem = run(
        job, part, count, row.data(), blocks.data(), padded.empty() ? to : padded.data(),
        job.padded, scales + first * scale_stride, zeros ? zeros + first * scale_stride : nullptr);
    if (problem != Problem::kNone) return status_of(problem);
    for (int64_t r = 0; r < count && !padded.empty(); ++r) {
      std::memcpy(to + r * job.k, padded.data() + r * job.padded, job.k);
    }
  }
  return {};
}

Status quantize_blob(const BlockShape& shape, int64_t rows, const PlainRows* sources,
                     int num_sources, bool search, char* out) {
  const Job job = job_of(shape, search);
  Rows* const run = widest();
  const int64_t block_rows = num_sources == 2 ? kLaneSet : kLanes;
  const int64_t run_rows = job.blocks ? kScaleRows : block_rows;
  const int64_t scale_stride = job.groups * size_of(job.scale_type);
  std::vector<float> row(job.padded), blocks(job.groups);
  std::vector<Scratch> made(num_sources, Scratch(job, run_rows));
  for (int64_t first = 0; first < rows; first += run_rows) {
    const int64_t count = std::min(run_rows, rows - first);
    for (int s = 0; s < num_sources; ++s) {
      const PlainRows part = from_row(sources[s], first);
      const Problem problem = run(job, part, count, row.data(), blocks.data(), made[s].codes.data(),
                                  job.padded, made[s].scales.data(), made[s].zeros.data());
      if (problem != Problem::kNone) return status_of(problem);
    }
    for (int64_t done = 0; done < count; done += block_rows, out += shape.block_bytes()) {
      LaneRows sets[2];
      for (int set = 0; set < 2; ++set) {
        const Scratch& from = made[num_sources == 2 ? set : 0];
        const int64_t begin = num_sources == 2 ? done : done + set * kLaneSet;
        sets[set] = {.codes = reinterpret_cast<const char*>(from.codes.data()) + begin * job.padded,
                     .code_stride = job.padded,
                     .scales = from.scales.data() + begin * scale_stride,
                     .zeros = from.zeros.data() + (job.zeros ? begin * scale_stride : 0),
                     .scale_stride = scale_stride,
                     .num_rows = static_cast<int>(std::clamp<int64_t>(count - begin, 0, kLaneSet))};
      }
      pack_block(shape, sets, out);
    }
  }
  return {};
}

}  // namespace ey
