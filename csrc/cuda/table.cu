// SPDX-License-Identifier: Apache-2.0
// The table of expert pointers in device memory, and the word in which kernels report a bad id.
#include <initializer_list>

#include "bad_id.cuh"
#include "crossovers.cuh"
#include "limits.cuh"
#include "status.cuh"

namespace ey::cuda {

namespace {

bool rows_are_aligned(const ExpertPointers* experts, int64_t count, const ExpertSet& set) {
  uintptr_t all = uintptr_t(set.gate_up_row_stride) | uintptr_t(set.down_row_stride);
  for (int64_t e = 0; e < count; ++e) {
    for (const void* p : {experts[e].gate, experts[e].up, experts[e].down}) {
      all |= reinterpret_cast<uintptr_t>(p);
    }
  }
  return all % 16 == 0;
}

}  // namespace

Status make_table(int device, const ExpertPointers* experts, ExpertSet* set) {
  if (Status s = prepare(device); !s.ok) return s;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const OutsideCapture outside;
  Limits limit{};
  if (cudaError_t e = limits(&limit); e != cudaSuccess) return cuda_failed(e, "asking the device");

  set->capability = limit.capability;
  if (Status s = find_crossovers(set); !s.ok) return s;

  const size_t bytes = sizeof(ExpertPointers) * size_t(set->num_experts);
  void* table = nullptr;
  void* word = nullptr;
  const char* what = "cudaMalloc of the table of experts";
  cudaError_t error = cudaMalloc(&table, bytes);
  if (error == cudaSuccess) {
    what = "cudaMemcpy of the table of experts";
    error = cudaMemcpy(table, experts, bytes, cudaMemcpyHostToDevice);
  }
  if (error == cudaSuccess) {
    what = "cudaHostAlloc of the word for bad ids";
    error = cudaHostAlloc(&word, sizeof(uint64_t), cudaHostAllocMapped | cudaHostAllocPortable);
  }
  if (error != cudaSuccess) {
    cudaFree(table);
    cudaGetLastError();
    return cuda_failed(error, what);
  }
  set->experts = static_cast<const ExpertPointers*>(table);
  set->bad_id = static_cast<uint64_t*>(word);
  *set->bad_id = 0;
  set->rows_are_aligned = rows_are_aligned(experts, set->num_experts, *set);
  return {};
}

Status write_row(int device, int64_t expert, const ExpertPointers& pointers, ExpertSet* set) {
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const OutsideCapture outside;
  auto* row = const_cast<ExpertPointers*>(set->experts) + expert;
  const cudaError_t error = cudaMemcpy(row, &pointers, sizeof pointers, cudaMemcpyHostToDevice);
  if (error != cudaSuccess)
    return cuda_failed(error, "cudaMemcpy of a row of the table of experts");
  set->rows_are_aligned = set->rows_are_aligned && rows_are_aligned(&pointers, 1, *set);
  return {};
}

Status free_table(int device, ExpertSet* set) {
  if (set->experts == nullptr && set->bad_id == nullptr) return {};
  const CurrentDevice current(device);
  const OutsideCapture outside;
  const cudaError_t freed = cudaFree(const_cast<ExpertPointers*>(set->experts));
  const cudaError_t freed_word =
      cudaFreeHost(set->bad_id);  // after cudaFree has waited for kernels
  set->experts = nullptr;
  set->bad_id = nullptr;
  cudaGetLastError();
  if (freed != cudaSuccess) return cuda_failed(freed, "cudaFree of the table of experts");
  if (freed_word != cudaSuccess) return cuda_failed(freed_word, "cudaFreeHost");
  return {};
}

Status take_bad_id(const ExpertSet& set) {
  if (set.bad_id == nullptr) return {};
  const uint64_t word = __atomic_exchange_n(set.bad_id, uint64_t(0), __ATOMIC_RELAXED);
  if (word == 0) return {};
  return failure(
      "topk_ids: expected -1 to %lld (-1 and %lld mean \"none\"), got %d at token %lld of an "
      "earlier call, whose row of the result is NaN",
      (long long)set.num_experts, (long long)set.num_experts, id_of_bad_id(word),
      (long long)token_of_bad_id(word));
}

}  // namespace ey::cuda
