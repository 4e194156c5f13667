// SPDX-License-Identifier: Apache-2.0
// The torch operator, through LibTorch's stable ABI (one binary for torch 2.11 and later). The only
// file that sees torch: it checks every tensor, fills a MoeArgs and calls.
//
//   expertyard::moe_experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights,
//                           int experts) -> Tensor
//   expertyard::moe_experts_into(..., Tensor(a!) out) -> ()   the same into memory of the caller's,
//                           in float32 or hidden_states' dtype: parts of a sum before rounding
//
// Shapes, dtypes and errors: python/expertyard/ops.py, which also registers the fake kernel and
// the backward that refuses.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>

#include "cpu/experts.h"
#include "cpu/threads.h"
#include "cuda/cuda.h"
#include "expert_sets.h"
#include "registry.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Every message starts with this mark; ops.py turns a RuntimeError that has it into a KernelError.
#define EY_CHECK(condition, ...) STD_TORCH_CHECK(condition, "expertyard: ", __VA_ARGS__)

std::optional<ey::DType> float_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return ey::DType::kF32;
    case ScalarType::BFloat16:
      return ey::DType::kBF16;
    case ScalarType::Half:
      return ey::DType::kF16;
    default:
      return std::nullopt;
  }
}

std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << ']';
  return out.str();
}

// The tensors of one call, checked and contiguous, and the args that point into them.
struct Call {
  Tensor hidden_states, topk_ids, topk_weights, out;
  std::shared_ptr<ey::ExpertSetEntry> entry;
  ey::MoeArgs args;
};

// into: where the result goes; null: a new tensor like hidden_states.
Call check(const Tensor& hidden_states, const Tensor& topk_ids, const Tensor& topk_weights,
           int64_t experts, const Tensor* into) {
  auto entry = ey::find_expert_set(experts);
  EY_CHECK(entry != nullptr, "experts: ", experts,
           " is not a live handle; pass PackedExperts.handle, and keep the PackedExperts alive");
  const ey::ExpertSet& set = entry->set;

  const auto hidden_dtype = float_dtype(hidden_states);
  EY_CHECK(hidden_states.dim() == 2 && hidden_states.size(1) == set.hidden_size &&
               hidden_dtype.has_value(),
           "hidden_states: expected [num_tokens, hidden_size=", set.hidden_size,
           "] bfloat16, float16 or float32, got ", shape_of(hidden_states), " ",
           torch::headeronly::toString(hidden_states.scalar_type()));
  const int64_t num_tokens = hidden_states.size(0);

  const auto id_type = topk_ids.scalar_type();
  EY_CHECK(topk_ids.dim() == 2 && topk_ids.size(0) == num_tokens &&
               (id_type == ScalarType::Int || id_type == ScalarType::Long),
           "topk_ids: expected [num_tokens=", num_tokens, ", top_k] int32 or int64, got ",
           shape_of(topk_ids), " ", torch::headeronly::toString(id_type));
  const int64_t top_k = topk_ids.size(1);

  const auto weights_dtype = float_dtype(topk_weights);
  EY_CHECK(topk_weights.dim() == 2 && topk_weights.size(0) == num_tokens &&
               topk_weights.size(1) == top_k && weights_dtype.has_value(),
           "topk_weights: expected [num_tokens=", num_tokens, ", top_k=", top_k,
           "] float32, bfloat16 or float16, got ", shape_of(topk_weights), " ",
           torch::headeronly::toString(topk_weights.scalar_type()));
  EY_CHECK(topk_ids.device() == hidden_states.device() &&
               topk_weights.device() == hidden_states.device(),
           "hidden_states, topk_ids and topk_weights must be on one device");
  if (into != nullptr) {
    const auto out_dtype = float_dtype(*into);
    EY_CHECK(into->dim() == 2 && into->size(0) == num_tokens && into->size(1) == set.hidden_size &&
                 (out_dtype == hidden_dtype || out_dtype == ey::DType::kF32) &&
                 into->is_contiguous() && into->device() == hidden_states.device(),
             "out: expected contiguous [num_tokens=", num_tokens, ", hidden_size=", set.hidden_size,
             "] float32 or ", torch::headeronly::toString(hidden_states.scalar_type()),
             " on hidden_states' device, got ", shape_of(*into), " ",
             torch::headeronly::toString(into->scalar_type()));
  }

  Call call{.hidden_states = torch::stable::contiguous(hidden_states),
            .topk_ids = torch::stable::contiguous(topk_ids),
            .topk_weights = torch::stable::contiguous(topk_weights),
            .out = into != nullptr
                       ? *into
                       : torch::stable::new_empty(hidden_states, {num_tokens, set.hidden_size}),
            .entry = entry,
            .args = {}};
  call.args = {.num_tokens = num_tokens,
               .top_k = top_k,
               .hidden_states = call.hidden_states.const_data_ptr(),
               .out = call.out.mutable_data_ptr(),
               .hidden_dtype = *hidden_dtype,
               .topk_ids = call.topk_ids.const_data_ptr(),
               .ids_are_int64 = id_type == ScalarType::Long,
               .topk_weights = call.topk_weights.const_data_ptr(),
               .weights_dtype = *weights_dtype,
               .set = &entry->set,
               .out_is_fp32 = float_dtype(call.out) == ey::DType::kF32};
  return call;
}

Tensor run_on_cpu(Call call) {
  EY_CHECK(call.entry->device < 0, "hidden_states: expected device cuda:", call.entry->device,
           ", where these experts are, got cpu");

  const ey::cpu::Kernel* kernel = nullptr;
  const ey::Status chosen =
      ey::select_kernel(call.entry->set.format, call.entry->set.layout, call.entry->set.mode,
                        call.args.hidden_dtype, &kernel);
  EY_CHECK(chosen.ok, chosen.what);

  const int wanted = static_cast<int>(torch::stable::get_num_threads());
  const int usable = std::min(ey::cpu::thread_limits().usable(), ey::cpu::callers_limit());
  const int threads = std::clamp(wanted, 1, usable);
  const ey::Status done = ey::cpu::moe_experts(*kernel, call.args, threads);
  EY_CHECK(done.ok, done.what);
  call.entry->last_isa.store(kernel->isa, std::memory_order_relaxed);
  call.entry->calls.fetch_add(1, std::memory_order_relaxed);
  return call.out;
}

// Torch's current stream. The function is in libtorch_cuda, which a CPU-only torch does not have;
// it is loaded by now if any tensor is on a GPU.
void* current_cuda_stream(int32_t device) {
  using Function = int32_t (*)(int32_t device, void** stream);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  EY_CHECK(function != nullptr && function(device, &stream) == 0,
           "this torch does not say what its current CUDA stream is "
           "(aoti_torch_get_current_cuda_stream); it needs a CUDA build of torch 2.11 or later");
  return stream;
}

// Everything is queued on the current stream, and all memory is torch's, so the call can be part of
// a CUDA graph.
Tensor run_on_cuda(Call call) {
  const int32_t device = call.hidden_states.get_device_index();
  EY_CHECK(call.entry->device >= 0,
           "hidden_states: expected device cpu, where these experts are, got cuda:", device);
  EY_CHECK(call.entry->device == device, "hidden_states: expected device cuda:", call.entry->device,
           ", where these experts are, got cuda:", device);

  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor workspace = torch::stable::new_empty(
      call.hidden_states, {ey::cuda::workspace_bytes(call.args)}, ScalarType::Byte);
  const ey::Status done = ey::cuda::moe_experts(device, call.args, workspace.mutable_data_ptr(),
                                                current_cuda_stream(device));
  EY_CHECK(done.ok, done.what);
  call.entry->last_isa.store(ey::cuda::kernel_isa(call.args), std::memory_order_relaxed);
  call.entry->calls.fetch_add(1, std::memory_order_relaxed);
  return call.out;
}

Tensor moe_experts_cpu(const Tensor& hidden_states, const Tensor& topk_ids,
                       const Tensor& topk_weights, int64_t experts) {
  return run_on_cpu(check(hidden_states, topk_ids, topk_weights, experts, nullptr));
}

Tensor moe_experts_cuda(const Tensor& hidden_states, const Tensor& topk_ids,
                        const Tensor& topk_weights, int64_t experts) {
  return run_on_cuda(check(hidden_states, topk_ids, topk_weights, experts, nullptr));
}

void moe_experts_into_cpu(const Tensor& hidden_states, const Tensor& topk_ids,
                          const Tensor& topk_weights, int64_t experts, const Tensor& out) {
  run_on_cpu(check(hidden_states, topk_ids, topk_weights, experts, &out));
}

void moe_experts_into_cuda(const Tensor& hidden_states, const Tensor& topk_ids,
                           const Tensor& topk_weights, int64_t experts, const Tensor& out) {
  run_on_cuda(check(hidden_states, topk_ids, topk_weights, experts, &out));
}

}  // namespace

STABLE_TORCH_LIBRARY(expertyard, m) {
  m.def(
      "moe_experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int experts) -> "
      "Tensor");
  m.def(
      "moe_experts_into(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int experts, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(expertyard, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts_cpu));
  m.impl("moe_experts_into", TORCH_BOX(&moe_experts_into_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(expertyard, CUDA, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts_cuda));
  m.impl("moe_experts_into", TORCH_BOX(&moe_experts_into_cuda));
}
