// SPDX-License-Identifier: Apache-2.0
// Which devices are there, and why the others are not.
#include "status.cuh"

#ifndef EXPERTYARD_CUDA_ARCHS
#error "the build says which architectures it compiles for: EXPERTYARD_CUDA_ARCHS"
#endif

namespace ey::cuda {

const char* architectures() { return EXPERTYARD_CUDA_ARCHS; }

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

Status device_count(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error == cudaSuccess && *count > 0) return {};
  cudaGetLastError();  // not to be found again by whoever asks next
  *count = 0;
  const int driver = driver_version();
  if (error == cudaErrorInsufficientDriver && driver > 0) {
    return failure(
        "the NVIDIA driver serves CUDA up to %d.%d and this build needs %d.%d (CUDA error "
        "%d: %s); update the driver, or build with the nvcc of an older CUDA; the CPU "
        "kernels work without one",
        driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10,
        int(error), cudaGetErrorString(error));
  }
  if (error == cudaErrorInsufficientDriver || driver == 0) {
    return failure(
        "no NVIDIA driver on this machine (CUDA error %d: %s); the CPU kernels work "
        "without one",
        int(error), cudaGetErrorString(error));
  }
  if (error == cudaErrorNoDevice || error == cudaSuccess) {
    return failure(
        "the NVIDIA driver shows no GPU (CUDA error %d: %s); CUDA_VISIBLE_DEVICES may "
        "hide them; the CPU kernels work without one",
        int(error), cudaGetErrorString(error));
  }
  return failure(
      "CUDA cannot be used on this machine (CUDA error %d: %s); the CPU kernels work "
      "without it",
      int(error), cudaGetErrorString(error));
}

Status check_device(int device) {
  int count = 0;
  if (Status s = device_count(&count); !s.ok) return s;
  if (device < 0 || device >= count) {
    return failure("cuda:%d: this machine has %d CUDA device%s, cuda:0 to cuda:%d", device, count,
                   count == 1 ? "" : "s", count - 1);
  }
  return {};
}

Status device_facts(int device, DeviceFacts* facts) {
  *facts = {};
  if (Status s = check_device(device); !s.ok) return s;
  cudaDeviceProp properties;
  if (cudaError_t e = cudaGetDeviceProperties(&properties, device); e != cudaSuccess) {
    return cuda_failed(e, "cudaGetDeviceProperties");
  }
  snprintf(facts->name, sizeof facts->name, "%s", properties.name);
  facts->major = properties.major;
  facts->minor = properties.minor;
  facts->multiprocessors = properties.multiProcessorCount;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return cuda_failed(current.error(), "cudaSetDevice");
  size_t free_bytes = 0, total_bytes = 0;
  if (cudaError_t e = cudaMemGetInfo(&free_bytes, &total_bytes); e != cudaSuccess) {
    return cuda_failed(e, "cudaMemGetInfo");
  }
  facts->free_bytes = int64_t(free_bytes);
  facts->total_bytes = int64_t(total_bytes);
  return {};
}

}  // namespace ey::cuda
