// SPDX-License-Identifier: Apache-2.0
// The host side of handoff.h.
#include "handoff.cuh"
#include "status.cuh"

namespace ey::cuda {
namespace {

template <class T>
cudaError_t pinned(int64_t count, T** memory) {
  void* found = nullptr;
  const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64 + 64;  // also where count is 0
  const cudaError_t error =
      cudaHostAlloc(&found, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
  if (error == cudaSuccess) memset(found, 0, bytes);
  *memory = static_cast<T*>(found);
  return error;
}

cudaError_t make_state(BoxState** state) {
  void* found = nullptr;
  if (cudaError_t e = cudaMalloc(&found, sizeof(BoxState)); e != cudaSuccess) return e;
  *state = static_cast<BoxState*>(found);
  return cudaMemset(found, 0, sizeof(BoxState));
}

cudaError_t make_aside(Box* box) {
  cudaStream_t aside;
  if (cudaError_t e = cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking); e != cudaSuccess) {
    return e;
  }
  box->aside = aside;
  for (void** made : {&box->forked, &box->joined}) {
    cudaEvent_t event;
    const cudaError_t e = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (e != cudaSuccess) return e;
    *made = event;
  }
  return cudaSuccess;
}

}  // namespace

Status make_box(int device, const BoxShape& shape, Box* box) {
  *box = {};
  box->device = device;
  box->shape = shape;
  if (Status s = check_device(device); !s.ok) return s;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const OutsideCapture outside;
  const int64_t values = shape.num_tokens * shape.hidden_size;
  const int64_t pairs = shape.num_tokens * shape.top_k;
  char* hidden = nullptr;
  // loads the kernels: that is not allowed while a graph is captured
  cudaError_t error = ptx::allow_shared(handoff::ring, 16);
  if (error == cudaSuccess) error = ptx::allow_shared(handoff::collect, 16);
  if (error == cudaSuccess) error = pinned(1, &box->words);
  if (error == cudaSuccess) error = pinned(values * size_of(shape.hidden_dtype), &hidden);
  box->hidden_states = hidden;
  if (error == cudaSuccess) error = pinned(pairs, &box->topk_ids);
  if (error == cudaSuccess) error = pinned(pairs, &box->topk_weights);
  if (error == cudaSuccess) error = pinned(values, &box->answer);
  if (error == cudaSuccess) error = make_state(&box->state);
  if (error == cudaSuccess) error = make_aside(box);
  if (error == cudaSuccess) return {};
  free_box(box);
  cudaGetLastError();
  return cuda_failed(error, "memory for questions to the CPU");
}

void free_box(Box* box) {
  const CurrentDevice current(box->device);
  const OutsideCapture outside;
  cudaFree(box->state);  // waits for the kernels that use the rest
  for (void* memory :
       {static_cast<void*>(box->words), box->hidden_states, static_cast<void*>(box->topk_ids),
        static_cast<void*>(box->topk_weights), static_cast<void*>(box->answer)}) {
    cudaFreeHost(memory);
  }
  for (void* event : {box->forked, box->joined}) {
    if (event != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event));
  }
  if (box->aside != nullptr) cudaStreamDestroy(static_cast<cudaStream_t>(box->aside));
  cudaGetLastError();
  *box = {};
}

Status ring(const Box& box, const Question& question, uint32_t* ticket, void* stream) {
  const CurrentDevice current(box.device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const BoxShape& shape = box.shape;
  const int64_t bytes = shape.num_tokens * shape.hidden_size * size_of(shape.hidden_dtype);
  const cudaError_t error = ptx::launch(handoff::ring, dim3(1), dim3(handoff::kRingThreads), 16,
                                        static_cast<cudaStream_t>(stream),
                                        handoff::RingArgs{box, question, bytes, ticket});
  return error == cudaSuccess ? Status{} : cuda_failed(error, "asking the CPU");
}

Status collect(const Box& box, const uint32_t* ticket, const float* share, void* out,
               DType out_dtype, int64_t timeout_ns, void* stream) {
  const int64_t size = box.shape.num_tokens * box.shape.hidden_size;
  const CurrentDevice current(box.device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const int64_t blocks = (size + 4 * handoff::kCollectThreads - 1) / (4 * handoff::kCollectThreads);
  const int64_t grid = blocks < 1                             ? 1
                       : blocks < handoff::kMostCollectBlocks ? blocks
                                                              : handoff::kMostCollectBlocks;
  const cudaError_t error =
      ptx::launch(handoff::collect, dim3(unsigned(grid)), dim3(handoff::kCollectThreads), 16,
                  static_cast<cudaStream_t>(stream),
                  handoff::CollectArgs{box.words, box.state, box.answer, ticket, share, out,
                                       out_dtype, size, uint64_t(timeout_ns)});
  return error == cudaSuccess ? Status{} : cuda_failed(error, "collecting the CPU's answer");
}

Status capture_id(int device, void* stream, uint64_t* id) {
  *id = 0;
  if (stream == nullptr) return {};  // the default stream cannot be captured
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  cudaStreamCaptureStatus status;
  unsigned long long found = 0;
  const cudaError_t error =
      cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &found);
  if (error != cudaSuccess) return cuda_failed(error, "cudaStreamGetCaptureInfo");
  if (status != cudaStreamCaptureStatusNone) *id = found;
  return {};
}

Status call_host(const Box& box, void (*function)(void*), void* data, void* stream) {
  const CurrentDevice current(box.device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const cudaError_t error = cudaLaunchHostFunc(static_cast<cudaStream_t>(stream), function, data);
  return error == cudaSuccess ? Status{} : cuda_failed(error, "cudaLaunchHostFunc");
}

Status call_host_aside(const Box& box, void (*function)(void*), void* data, void* stream) {
  const CurrentDevice current(box.device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const auto aside = static_cast<cudaStream_t>(box.aside);
  const auto forked = static_cast<cudaEvent_t>(box.forked);
  cudaError_t error = cudaEventRecord(forked, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) error = cudaStreamWaitEvent(aside, forked, 0);
  if (error == cudaSuccess) error = cudaLaunchHostFunc(aside, function, data);
  if (error == cudaSuccess) error = cudaEventRecord(static_cast<cudaEvent_t>(box.joined), aside);
  return error == cudaSuccess ? Status{} : cuda_failed(error, "a host function of a CUDA graph");
}

Status join_host(const Box& box, void* stream) {
  const CurrentDevice current(box.device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const cudaError_t error = cudaStreamWaitEvent(static_cast<cudaStream_t>(stream),
                                                static_cast<cudaEvent_t>(box.joined), 0);
  return error == cudaSuccess ? Status{} : cuda_failed(error, "cudaStreamWaitEvent");
}

BoxReport take_report(const Box& box) {
  const uint64_t word = __atomic_exchange_n(&box.words->report, uint64_t(0), __ATOMIC_ACQ_REL);
  return static_cast<BoxReport>(uint32_t(word));
}

Status revive(const Box& box) {
  const uint32_t asked = __atomic_load_n(&box.words->asked, __ATOMIC_ACQUIRE);
  if (__atomic_load_n(&box.words->answered, __ATOMIC_ACQUIRE) != asked) {
    return failure("the CPU has not answered yet");
  }
  const CurrentDevice current(box.device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  const OutsideCapture outside;
  BoxState state{};
  state.epoch = asked;
  cudaError_t error = cudaDeviceSynchronize();
  if (error == cudaSuccess) {
    error = cudaMemcpy(box.state, &state, sizeof state, cudaMemcpyHostToDevice);
  }
  return error == cudaSuccess ? Status{} : cuda_failed(error, "reviving questions to the CPU");
}

}  // namespace ey::cuda
