// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <cstring>

#include "crossovers.cuh"

namespace ey::cuda {
namespace {

const char* name_of(Format format) {
  switch (format) {
    case Format::kBf16:
      return "bf16";
    case Format::kInt8:
      return "int8";
    case Format::kInt4:
      return "int4";
    case Format::kFp8:
      return "fp8";
    case Format::kMxfp4:
      return "mxfp4";
    default:
      return "";
  }
}

}  // namespace

Status find_crossovers(ExpertSet* set) {
  const char* const path = std::getenv(kCrossoversVariable);
  if (path == nullptr || *path == 0 || set->layout != Layout::kBlocks) return {};
  std::FILE* const file = std::fopen(path, "r");
  if (file == nullptr) {
    return failure("%s: %s cannot be read; unset it, or let bench/gpu_check.sh write it",
                   kCrossoversVariable, path);
  }
  Status status{};
  char line[256];
  for (int number = 1; status.ok && std::fgets(line, sizeof line, file); ++number) {
    if (char* const comment = std::strchr(line, '#')) *comment = 0;
    if (line[std::strspn(line, " \t\r\n")] == 0) continue;
    int capability, end = 0;
    char format[16];
    long long group, hidden, intermediate, experts;
    float stream, wgmma;
    const int read = std::sscanf(line, "%d %15s %lld %lld %lld %lld %f %f %n", &capability, format,
                                 &group, &hidden, &intermediate, &experts, &stream, &wgmma, &end);
    if (read != 8 || line[end] != 0 || !(stream >= 0) || !(wgmma >= 0)) {
      status = failure(
          "%s: %s:%d: expected capability format group_size hidden_size intermediate_size "
          "num_experts stream_pairs wgmma_pairs; let bench/gpu_check.sh write it",
          kCrossoversVariable, path, number);
    } else if (capability == set->capability && std::strcmp(format, name_of(set->format)) == 0 &&
               group == set->packing.group_size && hidden == set->hidden_size &&
               intermediate == set->intermediate_size && experts == set->num_experts) {
      if (stream > 0) set->stream_pairs = stream;
      if (wgmma > 0) set->wgmma_pairs = wgmma;
    }
  }
  std::fclose(file);
  return status;
}

}  // namespace ey::cuda
