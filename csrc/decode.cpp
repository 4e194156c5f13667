// SPDX-License-Identifier: Apache-2.0
// Plain loops that compilers make vectors of, compiled for two widths. Products and sums are
// rounded one by one (CMakeLists.txt), so that every machine and the torch code before it make the
// same.
#include "decode.h"

#include <algorithm>
#include <cstring>

#include "cpu/convert.h"

// The choice between the two is made before the thread sanitizer is there to watch it.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define EY_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define EY_CLONES
#endif
#define EY_INLINE inline __attribute__((always_inline))

namespace ey {
namespace {

EY_INLINE float half_at(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return cpu::from_fp16(half);
}

// Codes of 32 weights whose fifth bits are in a word of their own.
EY_INLINE void five_bits(const uint8_t* high, const uint8_t* low, uint8_t* codes) {
  uint32_t bits;
  std::memcpy(&bits, high, 4);
  for (int i = 0; i < 16; ++i) {
    codes[i] = static_cast<uint8_t>((low[i] & 15) | ((bits >> i & 1) << 4));
    codes[16 + i] = static_cast<uint8_t>((low[i] >> 4) | ((bits >> (16 + i) & 1) << 4));
  }
}

EY_CLONES void q5_0(const uint8_t* block, int64_t count, uint8_t* out) {
  for (int64_t b = 0; b < count; ++b, block += 22, out += 32) {
    five_bits(block + 2, block + 6, out);
    for (int i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>(out[i] + 128 - 16);
  }
}

EY_CLONES void q5_1(const uint8_t* block, int64_t count, float* out) {
  for (int64_t b = 0; b < count; ++b, block += 24, out += 32) {
    const float scale = half_at(block), minimum = half_at(block + 2);
    uint8_t codes[32];
    five_bits(block + 4, block + 8, codes);
    for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(codes[i]) + minimum;
  }
}

EY_CLONES void q4_k(const uint8_t* block, int64_t count, uint8_t* out) {
  for (int64_t b = 0; b < count; ++b, block += 144) {
    for (int part = 0; part < 4; ++part, out += 64) {
      const uint8_t* low = block + 16 + 32 * part;
      for (int i = 0; i < 32; ++i) out[i] = low[i] & 15;
      for (int i = 0; i < 32; ++i) out[32 + i] = low[i] >> 4;
    }
  }
}

// Scale and minimum of group g, six bits each, out of the 12 bytes that hold all eight.
EY_INLINE void six_bits(const uint8_t* packed, int g, int* scale, int* minimum) {
  if (g < 4) {
    *scale = packed[g] & 63;
    *minimum = packed[g + 4] & 63;
    return;
  }
  *scale = (packed[g + 4] & 15) | ((packed[g - 4] >> 6) << 4);
  *minimum = (packed[g + 4] >> 4) | ((packed[g] >> 6) << 4);
}

EY_CLONES void q5_k(const uint8_t* block, int64_t count, float* out) {
  for (int64_t b = 0; b < count; ++b, block += 176) {
    const float d = half_at(block), dmin = half_at(block + 2);
    const uint8_t *high = block + 16, *low = block + 48;
    for (int g = 0; g < 8; ++g, out += 32) {
      int s, m;
      six_bits(block + 4, g, &s, &m);
      const float scale = d * static_cast<float>(s), minimum = dmin * static_cast<float>(m);
      const uint8_t* nibbles = low + 32 * (g / 2);
      const int shift = 4 * (g % 2);
      for (int i = 0; i < 32; ++i) {
        const int code = ((nibbles[i] >> shift) & 15) | (((high[i] >> g) & 1) << 4);
        out[i] = scale * static_cast<float>(code) - minimum;
      }
    }
  }
}

EY_CLONES void q6_k(const uint8_t* block, int64_t count, float* out) {
  for (int64_t b = 0; b < count; ++b, block += 210) {
    const float d = half_at(block + 208);
    const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
    for (int run = 0; run < 8; ++run, out += 32) {  // of 32 weights
      const uint8_t* low = block + 64 * (run / 4) + 32 * (run % 2);
      const uint8_t* high = block + 128 + 32 * (run / 4);
      const int shift = 4 * (run % 4 / 2), pair = 2 * (run % 4);
      for (int part = 0; part < 2; ++part) {
        const float step = static_cast<float>(scales[2 * run + part]) * d;
        for (int i = 16 * part; i < 16 * part + 16; ++i) {
          const int code = ((low[i] >> shift) & 15) | (((high[i] >> pair) & 3) << 4);
          out[i] = static_cast<float>(code - 32) * step;
        }
      }
    }
  }
}

// The eight nibbles of a word, one a byte, lowest first.
EY_INLINE uint64_t nibbles_of(uint32_t word) {
  uint64_t x = word;
  x = (x | x << 16) & 0x0000FFFF0000FFFF;
  x = (x | x << 8) & 0x00FF00FF00FF00FF;
  return (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
}

// Byte j of x[i] becomes byte i of x[j].
EY_INLINE void transpose(uint64_t (&x)[8]) {
  constexpr uint64_t kMasks[] = {0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF};
  for (int step = 0; step < 3; ++step) {
    const int distance = 1 << step, shift = 8 * distance;
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      const uint64_t swapped = ((x[i] >> shift) ^ x[i + distance]) & kMasks[step];
      x[i] ^= swapped << shift;
      x[i + distance] ^= swapped;
    }
  }
}

constexpr int kLine = 16;  // words of a cache line

}  // namespace

BlockDecoder block_decoder(const char* kind) {
  const auto is = [&](const char* name) { return std::strcmp(kind, name) == 0; };
  if (is("q5_1")) return {q5_1, 32};
  if (is("q5_k")) return {q5_k, 256};
  if (is("q6_k")) return {q6_k, 256};
  return {};
}

Status decode_ggml(const char* kind, const uint8_t* blocks, int64_t count, void* out) {
  const auto is = [&](const char* name) { return std::strcmp(kind, name) == 0; };
  if (is("q5_0")) return q5_0(blocks, count, static_cast<uint8_t*>(out)), Status{};
  if (is("q4_k")) return q4_k(blocks, count, static_cast<uint8_t*>(out)), Status{};
  const BlockDecoder plain = block_decoder(kind);
  if (plain.decode) return plain.decode(blocks, count, static_cast<float*>(out)), Status{};
  return failure("kind: expected q5_0, q5_1, q4_k, q5_k or q6_k, got %s", kind);
}

void decode_gptq(const uint32_t* words, int64_t inputs, int64_t outputs, uint8_t* codes) {
  for (int64_t first = 0; first < outputs; first += kLine) {
    const int64_t last = std::min<int64_t>(first + kLine, outputs);
    for (int64_t i = 0; i < inputs / 8; ++i) {
      for (int64_t o = first; o < last; ++o) {
        const uint64_t eight = nibbles_of(words[i * outputs + o]);
        std::memcpy(codes + o * inputs + 8 * i, &eight, 8);
      }
    }
  }
}

void decode_awq(const uint32_t* words, int64_t inputs, int64_t outputs, uint8_t* codes) {
  constexpr int kColumn[] = {0, 2, 4, 6, 1, 3, 5, 7};  // nibble -> column of a word's eight
  const int64_t width = outputs / 8;
  for (int64_t first = 0; first < width; first += kLine) {
    const int64_t last = std::min<int64_t>(first + kLine, width);
    for (int64_t i = 0; i < inputs; i += 8) {
      const int64_t rows = std::min<int64_t>(8, inputs - i);
      for (int64_t w = first; w < last; ++w) {
        uint64_t x[8] = {};
        for (int64_t r = 0; r < rows; ++r) x[r] = nibbles_of(words[(i + r) * width + w]);
        transpose(x);
        for (int n = 0; n < 8; ++n) {
          std::memcpy(codes + (8 * w + kColumn[n]) * inputs + i, &x[n], rows);
        }
      }
    }
  }
}

}  // namespace ey
