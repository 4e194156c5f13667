// SPDX-License-Identifier: Apache-2.0
// The torch operator, through LibTorch's stable ABI (one binary for torch 2.11 and later). The only
// file that sees torch: it checks every tensor, fills a MoeArgs and calls.
//
//   expertyard::moe_experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights,
//                           int experts) -> Tensor
//   expertyard::moe_experts_into(..., Tensor(a!) out) -> ()   the same into memory of the caller's,
//                           in float32 or hidden_states' dtype: parts of a sum before rounding
//   expertyard::moe_parts(..., int[] experts, int[] lanes, float timeout, int layer, bool fp32)
//                         -> Tensor   the sum of several sets of experts, all in this machine's
//                         memory, each on the lane of its number (virtual GPUs); -1: the caller
//   expertyard::ask_cpu(..., int experts, int desk) -> Tensor      a GPU asks for the share of
//   expertyard::collect_cpu(Tensor ticket, Tensor share, int desk) -> Tensor     experts in RAM,
//                         and adds it to its own share; between the two its own experts run
//   expertyard::send_away(..., int experts, int away) -> Tensor     the same of experts on another
//   expertyard::collect_away(Tensor arrived, int away) -> ()        GPU, in a CUDA graph
//   expertyard::linear(Tensor input, Tensor weight, int out_features, int packing, int group_size)
//                         -> Tensor   a layer of packed weights that is no expert (cpu/linear.h)
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
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/experts.h"
#include "cpu/linear.h"
#include "cpu/threads.h"
#include "cuda/cuda.h"
#include "expert_sets.h"
#include "handoff/away.h"
#include "handoff/desk.h"
#include "handoff/lane.h"
#include "handoff/spans.h"
#include "handoff/sum.h"
#include "registry.h"
#include "torch_team.h"

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

const ey::cpu::Kernel& kernel_of(const ey::ExpertSetEntry& entry, ey::DType hidden_dtype) {
  EY_CHECK(entry.device < 0, "hidden_states: expected device cuda:", entry.device,
           ", where these experts are, got cpu");
  const ey::cpu::Kernel* kernel = nullptr;
  const ey::Status chosen =
      ey::select_kernel(entry.set.format, entry.set.layout, entry.set.mode, hidden_dtype, &kernel);
  EY_CHECK(chosen.ok, chosen.what);
  return *kernel;
}

void check_team() {
  const ey::Status known = ey::TorchTeam::check();
  EY_CHECK(known.ok, known.what);
}

ey::Status compute(const ey::cpu::Kernel& kernel, ey::ExpertSetEntry& entry,
                   const ey::MoeArgs& args, int threads) {
  ey::Status done = ey::cpu::moe_experts(kernel, args, threads);
  entry.last_isa.store(kernel.isa, std::memory_order_relaxed);
  entry.calls.fetch_add(1, std::memory_order_relaxed);
  return done;
}

Tensor run_on_cpu(Call call) {
  const ey::cpu::Kernel& kernel = kernel_of(*call.entry, call.args.hidden_dtype);
  check_team();
  const ey::TorchTeam team;
  const ey::Status done = compute(kernel, *call.entry, call.args, team.threads());
  EY_CHECK(done.ok, done.what);
  return call.out;
}

// One set's share of a sum. Each has memory of its own: nothing is shared with another call, nor
// with one that was given up.
class PartJob : public ey::handoff::Job {
 public:
  PartJob(std::shared_ptr<const Call> call, std::shared_ptr<ey::ExpertSetEntry> entry, int threads)
      : kernel_(kernel_of(*entry, call->args.hidden_dtype)),
        call_(std::move(call)),
        entry_(std::move(entry)),
        args_(call_->args),
        threads_(threads),
        share_(new (std::align_val_t(64)) float[args_.num_tokens * entry_->set.hidden_size]) {
    args_.set = &entry_->set;
    args_.out = share_.get();
    args_.out_is_fp32 = true;
  }
  ey::Status run() override { return compute(kernel_, *entry_, args_, threads_); }
  const float* share() const { return share_.get(); }
  const ey::cpu::Kernel& kernel() const { return kernel_; }

 private:
  struct Free {
    void operator()(float* p) const { operator delete[](p, std::align_val_t(64)); }
  };
  const ey::cpu::Kernel& kernel_;
  const std::shared_ptr<const Call> call_;  // keeps the tensors
  const std::shared_ptr<ey::ExpertSetEntry> entry_;
  ey::MoeArgs args_;
  const int threads_;
  const std::unique_ptr<float[], Free> share_;
};

struct PartOfCall {
  std::shared_ptr<PartJob> job;
  ey::handoff::Lane* lane;  // null: the caller
};

Tensor moe_parts_cpu(const Tensor& hidden_states, const Tensor& topk_ids,
                     const Tensor& topk_weights, std::vector<int64_t> experts,
                     std::vector<int64_t> lanes, double timeout, int64_t layer, bool fp32) {
  EY_CHECK(!experts.empty() && experts.size() == lanes.size(),
           "experts and lanes: expected one lane for each set of experts, got ", experts.size(),
           " and ", lanes.size());
  if (hidden_states.dim() != 2) {  // says so
    check(hidden_states, topk_ids, topk_weights, experts[0], nullptr);
  }
  const bool rounds = !fp32 && hidden_states.scalar_type() != ScalarType::Float;
  Tensor out =
      torch::stable::new_empty(hidden_states, {hidden_states.size(0), hidden_states.size(1)},
                               rounds ? hidden_states.scalar_type() : ScalarType::Float);
  const auto call =
      std::make_shared<const Call>(check(hidden_states, topk_ids, topk_weights, experts[0], &out));
  check_team();
  // own workers: lanes are more threads than CPUs, and a team of torch's waits for all of its
  const int threads = ey::TorchTeam().threads();
  std::vector<PartOfCall> parts;
  for (size_t i = 0; i < experts.size(); ++i) {
    auto entry = ey::find_expert_set(experts[i]);
    EY_CHECK(entry != nullptr, "experts: ", experts[i], " is not a live handle");
    EY_CHECK(entry->set.hidden_size == call->args.set->hidden_size &&
                 entry->set.num_experts == call->args.set->num_experts,
             "experts: parts of one layer have one hidden_size and num_experts");
    ey::handoff::Lane* lane =
        lanes[i] < 0 ? nullptr : &ey::handoff::lane("cuda:" + std::to_string(lanes[i]), 1);
    parts.push_back({std::make_shared<PartJob>(call, std::move(entry), lane ? 1 : threads), lane});
  }

  // Others first, then the caller's own; every one is waited for, whatever happens.
  ey::Status problem;
  const auto keep = [&](const ey::Status& status) {
    if (problem.ok && !status.ok) problem = status;
  };
  std::vector<bool> submitted(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].lane == nullptr) continue;
    const ey::Status accepted = parts[i].lane->submit(parts[i].job);
    submitted[i] = accepted.ok;
    keep(accepted);
  }
  const bool late = !problem.ok;  // of a device, not of a kernel
  for (const PartOfCall& part : parts) {
    if (part.lane != nullptr || late) continue;
    part.job->begin_ns = ey::handoff::now_ns();
    keep(part.job->status = part.job->run());
    part.job->end_ns = ey::handoff::now_ns();
  }
  bool gave_up = late;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!submitted[i]) continue;
    const ey::Status waited =
        parts[i].lane->wait(*parts[i].job, static_cast<int64_t>(timeout * 1e9),
                            "its part of layer " + std::to_string(layer));
    if (!waited.ok) {
      if (!gave_up) problem = waited;  // more serious than what a kernel says
      gave_up = true;
    } else {
      keep(parts[i].job->status);
    }
  }
  EY_CHECK(!gave_up, "device: ", problem.what);
  EY_CHECK(problem.ok, problem.what);

  std::vector<const float*> shares;
  auto& spans = ey::handoff::spans();
  spans.clear();
  for (size_t i = 0; i < parts.size(); ++i) {
    shares.push_back(parts[i].job->share());
    spans.push_back({lanes[i], parts[i].job->begin_ns, parts[i].job->end_ns});
  }
  const ey::MoeArgs& args = call->args;
  ey::handoff::add_parts(parts[0].job->kernel(), shares.data(), static_cast<int>(shares.size()),
                         args.num_tokens * args.set->hidden_size, out_dtype(args), args.out,
                         threads);
  return out;
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

std::shared_ptr<ey::handoff::Desk> live_desk(int64_t handle) {
  auto desk = ey::handoff::desks().find(handle);
  EY_CHECK(desk != nullptr, "desk: ", handle, " is not a live handle");
  return desk;
}

// Queues the question and returns its ticket, [1] int32.
Tensor ask_cpu_cuda(const Tensor& hidden_states, const Tensor& topk_ids, const Tensor& topk_weights,
                    int64_t experts, int64_t desk) {
  const auto found = live_desk(desk);
  const ey::cuda::BoxShape& shape = found->box().shape;
  const Tensor x = torch::stable::contiguous(hidden_states);
  const Call call = check(x, topk_ids, topk_weights, experts, &x);  // nothing is written into x
  EY_CHECK(call.entry->device < 0, "experts: expected experts on the CPU");
  EY_CHECK(x.get_device_index() == found->box().device &&
               call.args.num_tokens == shape.num_tokens &&
               call.args.set->hidden_size == shape.hidden_size && call.args.top_k == shape.top_k &&
               call.args.hidden_dtype == shape.hidden_dtype,
           "desk: expected calls of the shape that it was made for");
  const torch::stable::accelerator::DeviceGuard guard(found->box().device);
  Tensor ticket = torch::stable::new_empty(x, {1}, ScalarType::Int);
  const ey::cuda::Question question = {.hidden_states = call.args.hidden_states,
                                       .topk_ids = call.args.topk_ids,
                                       .ids_are_int64 = call.args.ids_are_int64,
                                       .topk_weights = call.args.topk_weights,
                                       .weights_dtype = call.args.weights_dtype,
                                       .experts = experts,
                                       .num_experts = call.args.set->num_experts};
  const ey::Status done = found->ask(question, static_cast<uint32_t*>(ticket.mutable_data_ptr()),
                                     current_cuda_stream(found->box().device));
  EY_CHECK(done.ok, done.what);
  return ticket;
}

// share: [num_tokens, hidden_size] float32, or with no elements: there is none.
Tensor collect_cpu_cuda(const Tensor& ticket, const Tensor& share, int64_t desk) {
  const auto found = live_desk(desk);
  const ey::cuda::BoxShape& shape = found->box().shape;
  EY_CHECK(share.scalar_type() == ScalarType::Float && share.is_contiguous() &&
               (share.numel() == 0 || share.numel() == shape.num_tokens * shape.hidden_size),
           "share: expected contiguous [num_tokens, hidden_size] float32, got ", shape_of(share));
  const auto dtype = shape.hidden_dtype == ey::DType::kF32    ? ScalarType::Float
                     : shape.hidden_dtype == ey::DType::kBF16 ? ScalarType::BFloat16
                                                              : ScalarType::Half;
  const torch::stable::accelerator::DeviceGuard guard(found->box().device);
  Tensor out = torch::stable::new_empty(ticket, {shape.num_tokens, shape.hidden_size}, dtype);
  const ey::Status done = found->collect(
      static_cast<const uint32_t*>(ticket.const_data_ptr()),
      share.numel() ? static_cast<const float*>(share.const_data_ptr()) : nullptr,
      out.mutable_data_ptr(), shape.hidden_dtype, current_cuda_stream(found->box().device));
  EY_CHECK(done.ok, done.what);
  return out;
}

std::shared_ptr<ey::handoff::Away> live_away(int64_t handle) {
  auto away = ey::handoff::aways().find(handle);
  EY_CHECK(away != nullptr, "away: ", handle, " is not a live handle");
  return away;
}

// Queues the question; returns where the share arrives, [num_tokens, hidden_size] float32, which is
// there after collect_away. All tensors must live until then, so none may need a copy.
Tensor send_away_cuda(const Tensor& hidden_states, const Tensor& topk_ids,
                      const Tensor& topk_weights, int64_t experts, int64_t away) {
  const auto found = live_away(away);
  const ey::cuda::BranchShape& shape = found->shape();
  EY_CHECK(
      hidden_states.is_contiguous() && topk_ids.is_contiguous() && topk_weights.is_contiguous(),
      "hidden_states, topk_ids and topk_weights: expected contiguous tensors");
  const torch::stable::accelerator::DeviceGuard guard(found->home());
  Tensor arrived = torch::stable::new_empty(
      hidden_states, {hidden_states.size(0), hidden_states.size(1)}, ScalarType::Float);
  const Call call = check(hidden_states, topk_ids, topk_weights, experts, &arrived);
  EY_CHECK(call.entry->device == found->there(),
           "experts: expected experts on cuda:", found->there(), ", got cuda:", call.entry->device);
  EY_CHECK(hidden_states.get_device_index() == found->home() &&
               call.args.num_tokens == shape.num_tokens &&
               call.args.set->hidden_size == shape.hidden_size && call.args.top_k == shape.top_k &&
               call.args.hidden_dtype == shape.hidden_dtype &&
               call.args.weights_dtype == shape.weights_dtype &&
               call.args.ids_are_int64 == shape.ids_are_int64,
           "away: expected calls of the shape that it was made for");
  const ey::Status done = found->send(call.args, static_cast<float*>(arrived.mutable_data_ptr()),
                                      current_cuda_stream(found->home()));
  EY_CHECK(done.ok, done.what);
  call.entry->last_isa.store(ey::cuda::kernel_isa(call.args), std::memory_order_relaxed);
  call.entry->calls.fetch_add(1, std::memory_order_relaxed);
  return arrived;
}

void collect_away_cuda(const Tensor&, int64_t away) {
  const auto found = live_away(away);
  const ey::Status done = found->collect(current_cuda_stream(found->home()));
  EY_CHECK(done.ok, done.what);
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

// packing: linear_packing() of bindings.cpp, which has checked it.
Tensor linear_cpu(const Tensor& input, const Tensor& weight, int64_t out_features, int64_t packing,
                  int64_t group_size) {
  const auto dtype = float_dtype(input);
  EY_CHECK(input.dim() == 2 && dtype.has_value(),
           "input: expected [num_tokens, in_features] bfloat16, float16 or float32, got ",
           shape_of(input), " ", torch::headeronly::toString(input.scalar_type()));
  const ey::LinearPacking p = ey::LinearPacking::decode(packing, group_size);
  EY_CHECK(ey::is_packing(p.format, p.packing) && out_features >= 0,
           "packing: expected _C.linear_packing()'s, got ", packing, " with group_size ",
           group_size, " and out_features ", out_features);
  const int64_t in_features = input.size(1);
  const int64_t bytes =
      ey::w2_blocks(out_features) * ey::BlockShape{p.format, p.packing, in_features}.block_bytes();
  EY_CHECK(weight.dim() == 1 && weight.scalar_type() == ScalarType::Byte &&
               weight.is_contiguous() && weight.numel() == bytes,
           "weight: expected uint8 [", bytes, "] for out_features=", out_features,
           ", in_features=", in_features, ", got ", shape_of(weight), " ",
           torch::headeronly::toString(weight.scalar_type()));
  const ey::cpu::Kernel* kernel = nullptr;
  const ey::Status chosen =
      ey::select_kernel(p.format, ey::Layout::kBlocks, ey::Mode::kExact, *dtype, &kernel);
  EY_CHECK(chosen.ok, chosen.what);
  const Tensor rows = torch::stable::contiguous(input);
  Tensor out = torch::stable::new_empty(input, {input.size(0), out_features});
  check_team();
  const ey::TorchTeam team;
  const ey::Status done = ey::cpu::linear(*kernel,
                                          {.num_tokens = rows.size(0),
                                           .in_features = in_features,
                                           .out_features = out_features,
                                           .input = rows.const_data_ptr(),
                                           .out = out.mutable_data_ptr(),
                                           .dtype = *dtype,
                                           .format = p.format,
                                           .packing = p.packing,
                                           .weight = weight.const_data_ptr()},
                                          team.threads());
  EY_CHECK(done.ok, done.what);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(expertyard, m) {
  m.def(
      "moe_experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int experts) -> "
      "Tensor");
  m.def(
      "moe_experts_into(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int experts, "
      "Tensor(a!) out) -> ()");
  m.def(
      "moe_parts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int[] experts, "
      "int[] lanes, float timeout, int layer, bool fp32) -> Tensor");
  m.def(
      "ask_cpu(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int experts, int desk) "
      "-> Tensor");
  m.def("collect_cpu(Tensor ticket, Tensor share, int desk) -> Tensor");
  m.def(
      "linear(Tensor input, Tensor weight, int out_features, int packing, int group_size) -> "
      "Tensor");
  m.def(
      "send_away(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, int experts, int "
      "away) "
      "-> Tensor");
  m.def("collect_away(Tensor(a!) arrived, int away) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(expertyard, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts_cpu));
  m.impl("moe_experts_into", TORCH_BOX(&moe_experts_into_cpu));
  m.impl("moe_parts", TORCH_BOX(&moe_parts_cpu));
  m.impl("linear", TORCH_BOX(&linear_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(expertyard, CUDA, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts_cuda));
  m.impl("moe_experts_into", TORCH_BOX(&moe_experts_into_cuda));
  m.impl("ask_cpu", TORCH_BOX(&ask_cpu_cuda));
  m.impl("collect_cpu", TORCH_BOX(&collect_cpu_cuda));
  m.impl("send_away", TORCH_BOX(&send_away_cuda));
  m.impl("collect_away", TORCH_BOX(&collect_away_cuda));
}
