// SPDX-License-Identifier: Apache-2.0
// Which CPU kernels this build has, and which one serves a call.
#pragma once

#include <string>

#include "cpu/kernel.h"
#include "status.h"

namespace ey {

struct KernelList {
  const cpu::Kernel* const* begin_;
  const cpu::Kernel* const* end_;
  const cpu::Kernel* const* begin() const { return begin_; }
  const cpu::Kernel* const* end() const { return end_; }
};
KernelList kernels();  // all that were compiled, also those this CPU cannot run

const char* name_of(Format format);
const char* name_of(DType dtype);
const char* name_of(Mode mode);
// What kernels of a kind have in common: "bf16", "bf16_packed", "int4", "int4_fast" ... A kernel's
// name is that, an underscore, and its isa.
std::string kind_of(Format format, Layout layout, Mode mode);
std::string name_of(const cpu::Kernel& kernel);
bool runnable(const cpu::Kernel& kernel);

// The highest ranked kernel for such weights and hidden dtype that the CPU can run; only from the
// forced instruction set if there is one. Never falls back from a forced one.
Status select_kernel(Format format, Layout layout, Mode mode, DType hidden_dtype,
                     const cpu::Kernel** out);

// Forces an instruction set by name for this process; null or "" lets the choice free again, and
// then EXPERTYARD_ISA is obeyed if it is set.
Status force_isa(const char* isa);
const char* forced_isa();  // null: none

}  // namespace ey
