// SPDX-License-Identifier: Apache-2.0
#include "nodes.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace ey::cpu {
namespace {

constexpr int kMaskBits = 1024;
constexpr int kWordBits = 8 * sizeof(unsigned long);

// The numbers of a list such as "0-3,8,10-11"; none if the file is not there.
std::vector<int> read_list(const std::string& path) {
  std::vector<int> numbers;
  std::FILE* file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return numbers;
  int first, last;
  while (std::fscanf(file, "%d", &first) == 1) {
    last = first;
    int c = std::fgetc(file);
    if (c == '-') {
      if (std::fscanf(file, "%d", &last) != 1) break;
      c = std::fgetc(file);
    }
    for (int i = first; i <= last && i < (1 << 20); ++i) numbers.push_back(i);
    if (c != ',') break;
  }
  std::fclose(file);
  return numbers;
}

bool has_own_policy() {
  int mode = MPOL_DEFAULT;
  return syscall(SYS_get_mempolicy, &mode, nullptr, 0, nullptr, 0) == 0 && mode != MPOL_DEFAULT;
}

const NodeMap& machine() {
  static const NodeMap map = [] {
    NodeMap one{{}, {0}};
    cpu_set_t set;
    if (has_own_policy() || sched_getaffinity(0, sizeof set, &set) != 0) return one;
    std::vector<bool> usable(CPU_SETSIZE);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) usable[cpu] = CPU_ISSET(cpu, &set);
    NodeMap found = read_nodes("/sys/devices/system/node", usable);
    return found.ids.size() > 1 ? found : one;
  }();
  return map;
}

std::atomic<int> pretended{0};
std::atomic<int> threads_seen{0};

// Memory that this thread writes first, while it lives, comes from a node as far as that has any.
class Preference {
 public:
  explicit Preference(int id) {
    unsigned long mask[kMaskBits / kWordBits] = {};
    mask[id / kWordBits] = 1ul << id % kWordBits;
    obeyed_ = id < kMaskBits && syscall(SYS_set_mempolicy, MPOL_PREFERRED, mask, kMaskBits) == 0;
  }
  ~Preference() {
    if (obeyed_) syscall(SYS_set_mempolicy, MPOL_DEFAULT, nullptr, 0);
  }
  bool obeyed() const { return obeyed_; }

 private:
  bool obeyed_;
};

// Writes a byte of each page that begins in begin .. end - 1.
void touch(char* begin, char* end) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  auto at = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  for (; at < reinterpret_cast<uintptr_t>(end); at += page) {
    *reinterpret_cast<volatile char*>(at) = 0;
  }
}

struct Placing {
  char* arena;
  const std::vector<int64_t>& blob_bytes;
  int64_t count, expert_bytes;
  std::atomic<bool> obeyed{true};
  Tasks tasks;
};

}  // namespace

NodeMap read_nodes(const std::string& root, const std::vector<bool>& usable_cpus) {
  NodeMap map{std::vector<int>(usable_cpus.size(), -1), {}};
  for (const int id : read_list(root + "/online")) {
    bool used = false;
    for (const int cpu : read_list(root + "/node" + std::to_string(id) + "/cpulist")) {
      if (cpu >= static_cast<int>(usable_cpus.size()) || !usable_cpus[cpu]) continue;
      map.node_of_cpu[cpu] = std::min(static_cast<int>(map.ids.size()), kMaxNodes - 1);
      used = true;
    }
    if (used) map.ids.push_back(id);
  }
  return map;
}

int num_nodes() {
  const int n = pretended.load(std::memory_order_relaxed);
  return n > 0 ? n : std::min(static_cast<int>(machine().ids.size()), kMaxNodes);
}

int node_here() {
  if (const int n = pretended.load(std::memory_order_relaxed); n > 0) {
    thread_local const int index = threads_seen++;
    return index % n;
  }
  const NodeMap& map = machine();
  if (map.ids.size() == 1) return 0;
  const int cpu = sched_getcpu();
  const bool known = cpu >= 0 && cpu < static_cast<int>(map.node_of_cpu.size());
  return known ? std::max(0, map.node_of_cpu[cpu]) : 0;
}

bool place_blobs(char* arena, const std::vector<int64_t>& blob_bytes, int64_t count, int threads) {
  const int nodes = num_nodes();
  if (nodes == 1 || blob_bytes.empty()) return true;
  Placing placing{arena, blob_bytes, count, 0, true, {}};
  for (const int64_t bytes : blob_bytes) placing.expert_bytes += bytes;
  const auto work = [](void* context, int, int) {
    auto& p = *static_cast<Placing*>(context);
    const int nodes = num_nodes();
    p.tasks.each(p.count * nodes, [&](int64_t task) {
      const int node = static_cast<int>(task % nodes);
      const NodeMap& map = machine();
      const Preference near(node < static_cast<int>(map.ids.size()) ? map.ids[node] : map.ids[0]);
      if (!near.obeyed()) {
        p.obeyed = false;
        return;
      }
      char* blob = p.arena + task / nodes * p.expert_bytes;
      for (const int64_t bytes : p.blob_bytes) {
        const auto part = share_of(bytes, node, nodes);
        touch(blob + part.begin, blob + part.end);
        blob += bytes;
      }
    });
  };
  run_team(threads, work, &placing);
  return placing.obeyed;
}

bool may_place() { return Preference(machine().ids[0]).obeyed(); }

void pretend_nodes(int n) { pretended = std::clamp(n, 0, kMaxNodes); }

}  // namespace ey::cpu
