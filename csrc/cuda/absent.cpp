// SPDX-License-Identifier: Apache-2.0
// cuda.h in a build without nvcc: the same functions, and one sentence.
#include "cuda.h"

namespace ey::cuda {
namespace {

Status absent() {
  return failure(
      "this build has no CUDA kernels: there was no nvcc when it was built. Put nvcc on PATH (or "
      "pip "
      "install 'cuda-toolkit[nvcc,cudart]==13.0.*') and build again; the CPU kernels work without "
      "it");
}

}  // namespace

Status device_count(int* count) {
  *count = 0;
  return absent();
}
Status device_facts(int, DeviceFacts* facts) {
  *facts = {};
  return absent();
}
int driver_version() { return 0; }
int runtime_version() { return 0; }
const char* architectures() { return ""; }
Status prepare(int) { return absent(); }
Status make_table(int, const ExpertPointers*, ExpertSet*) { return absent(); }
Status write_row(int, int64_t, const ExpertPointers&, ExpertSet*) { return absent(); }
Status free_table(int, ExpertSet*) { return {}; }
Status take_bad_id(const ExpertSet&) { return {}; }
int64_t workspace_bytes(const MoeArgs&) { return 0; }
const char* kernel_isa(const MoeArgs&) { return "absent"; }
Status moe_experts(int, const MoeArgs&, void*, void*) { return absent(); }

}  // namespace ey::cuda
