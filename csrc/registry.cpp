// SPDX-License-Identifier: Apache-2.0
#include "registry.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/features.h"

// The linker makes these two for the section that EY_REGISTER_KERNEL fills.
extern "C" {
extern const ey::cpu::Kernel* const __start_ey_kernels[] __attribute__((visibility("hidden")));
extern const ey::cpu::Kernel* const __stop_ey_kernels[] __attribute__((visibility("hidden")));
}

namespace ey {
namespace {

std::atomic<const char*> forced_by_call{nullptr};

std::string isa_names() {
  std::string out;
  for (const cpu::Kernel* k : kernels()) {
    if (out.find(std::string(k->isa) + " ") != std::string::npos) continue;
    out += std::string(k->isa) + (runnable(*k) ? " " : " (not on this CPU) ");
  }
  if (!out.empty()) out.pop_back();
  return out;
}

const cpu::Kernel* any_of_isa(const char* isa) {
  for (const cpu::Kernel* k : kernels()) {
    if (std::strcmp(k->isa, isa) == 0) return k;
  }
  return nullptr;
}

Status check_isa(const char* isa) {
  const cpu::Kernel* k = any_of_isa(isa);
  if (k == nullptr) {
    return failure("EXPERTYARD_ISA: no instruction set is called '%s'; there are: %s", isa,
                   isa_names().c_str());
  }
  if (!runnable(*k)) {
    return failure("EXPERTYARD_ISA: this CPU cannot run %s; there are: %s", isa,
                   isa_names().c_str());
  }
  return {};
}

}  // namespace

KernelList kernels() { return {__start_ey_kernels, __stop_ey_kernels}; }

const char* name_of(Format format) {
  switch (format) {
    case Format::kFp32:
      return "fp32";
    case Format::kBf16:
      return "bf16";
    case Format::kFp16:
      return "fp16";
    case Format::kInt8:
      return "int8";
    case Format::kInt4:
      return "int4";
    case Format::kFp8:
      return "fp8";
    case Format::kMxfp4:
      return "mxfp4";
  }
  return "unknown";
}

const char* name_of(Mode mode) { return mode == Mode::kFast ? "fast" : "exact"; }

std::string kind_of(Format format, Layout layout, Mode mode) {
  const bool both_layouts = format == Format::kBf16;
  return std::string(name_of(format)) +
         (both_layouts && layout == Layout::kBlocks ? "_packed" : "") +
         (mode == Mode::kFast ? "_fast" : "");
}

std::string name_of(const cpu::Kernel& k) {
  return kind_of(k.format, k.layout, k.mode) + "_" + k.isa;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
  }
  return "unknown";
}

bool runnable(const cpu::Kernel& kernel) {
  return (cpu::features() & kernel.needs) == kernel.needs;
}

Status force_isa(const char* isa) {
  if (isa == nullptr || *isa == 0) {
    forced_by_call = nullptr;
    return {};
  }
  const Status status = check_isa(isa);
  if (status.ok) forced_by_call = any_of_isa(isa)->isa;  // a string that lives for ever
  return status;
}

const char* forced_isa() {
  if (const char* isa = forced_by_call) return isa;
  const char* isa = std::getenv("EXPERTYARD_ISA");
  return isa != nullptr && *isa != 0 ? isa : nullptr;
}

Status select_kernel(Format format, Layout layout, Mode mode, DType hidden_dtype,
                     const cpu::Kernel** out) {
  const char* forced = forced_isa();
  if (forced != nullptr) {
    if (const Status status = check_isa(forced); !status.ok) return status;
  }
  const cpu::Kernel* best = nullptr;
  for (const cpu::Kernel* k : kernels()) {
    if (k->format != format || k->layout != layout || k->mode != mode || !runnable(*k)) continue;
    if (k->bf16_inputs && hidden_dtype != DType::kBF16) continue;
    if (forced != nullptr && std::strcmp(k->isa, forced) != 0) continue;
    if (best == nullptr || k->rank > best->rank) best = k;
  }
  if (best == nullptr) {
    return failure(
        "no %s kernel for %s weights, mode %s, and %s hidden states; instruction sets: %s",
        forced != nullptr ? forced : "CPU", name_of(format), name_of(mode), name_of(hidden_dtype),
        isa_names().c_str());
  }
  *out = best;
  return {};
}

}  // namespace ey
