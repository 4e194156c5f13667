// SPDX-License-Identifier: Apache-2.0
// handoff.h and branch.h in a build without CUDA.
#include "branch.h"
#include "handoff.h"

namespace ey::cuda {
namespace {

Status absent() { return failure("this build of Expertyard has no CUDA code"); }

}  // namespace

Status make_box(int, const BoxShape&, Box*) { return absent(); }
void free_box(Box*) {}
Status ring(const Box&, const Question&, uint32_t*, void*) { return absent(); }
Status collect(const Box&, const uint32_t*, const float*, void*, DType, int64_t, void*) {
  return absent();
}
Status capture_id(int, void*, uint64_t*) { return absent(); }
Status call_host(const Box&, void (*)(void*), void*, void*) { return absent(); }
Status call_host_aside(const Box&, void (*)(void*), void*, void*) { return absent(); }
Status join_host(const Box&, void*) { return absent(); }
BoxReport take_report(const Box&) { return BoxReport::kNone; }
Status revive(const Box&) { return absent(); }

Status make_branch(int, int, const BranchShape&, int64_t, Branch*) { return absent(); }
void free_branch(Branch*) {}
Status send(const Branch&, const MoeArgs&, float*, void*) { return absent(); }
Status collect(const Branch&, void*) { return absent(); }

}  // namespace ey::cuda
