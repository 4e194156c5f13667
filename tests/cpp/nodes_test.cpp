// SPDX-License-Identifier: Apache-2.0
// Nodes as the system describes them, read from folders made here; shares that leave nothing out;
// placing memory, which must not change what a process was told about its own.
#include "cpu/nodes.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

using namespace ey::cpu;

void write(const std::string& path, const char* text) {
  std::FILE* file = std::fopen(path.c_str(), "w");
  std::fputs(text, file);
  std::fclose(file);
}

std::string folder(const char* online, const std::vector<const char*>& cpu_lists) {
  char name[] = "/tmp/nodes_test_XXXXXX";
  const std::string root = mkdtemp(name);
  write(root + "/online", online);
  for (size_t i = 0; i < cpu_lists.size(); ++i) {
    const std::string node = root + "/node" + std::to_string(i);
    mkdir(node.c_str(), 0700);
    write(node + "/cpulist", cpu_lists[i]);
  }
  return root;
}

std::vector<bool> first_cpus(int n) { return std::vector<bool>(n, true); }

bool two_sockets() {
  const NodeMap map = read_nodes(folder("0-1\n", {"0-1,4-5\n", "2-3,6-7\n"}), first_cpus(8));
  return map.ids == std::vector<int>{0, 1} &&
         map.node_of_cpu == std::vector<int>{0, 0, 1, 1, 0, 0, 1, 1};
}

// A node of memory alone, and one whose CPUs this process may not use.
bool nodes_without_cpus_are_left_out() {
  const NodeMap map = read_nodes(folder("0-3\n", {"0-1\n", "\n", "4-5\n", "2-3\n"}), first_cpus(4));
  return map.ids == std::vector<int>{0, 3} && map.node_of_cpu == std::vector<int>{0, 0, 1, 1};
}

bool no_folder_is_no_node() { return read_nodes("/nonexistent", first_cpus(4)).ids.empty(); }

bool shares_leave_nothing_out() {
  for (int64_t n : {0, 1, 5, 96, 97}) {
    int64_t next = 0;
    for (int node = 0; node < 3; ++node) {
      const auto share = share_of(n, node, 3);
      if (share.begin != next || share.end < share.begin) return false;
      next = share.end;
    }
    if (next != n) return false;
  }
  return true;
}

bool placed_memory_is_usable_and_the_policy_is_as_before() {
  pretend_nodes(2);
  std::vector<char> arena(3 * (40000 + 24000), 1);
  const bool obeyed = place_blobs(arena.data(), {40000, 24000}, 3, 2);
  pretend_nodes(0);
  int mode = -1;
  const bool asked = syscall(SYS_get_mempolicy, &mode, nullptr, 0, nullptr, 0) == 0;
  return obeyed == may_place() && (!asked || mode == MPOL_DEFAULT);
}

// On a machine of several nodes: whole pages of a part lie on its node. Else there is nothing to
// see.
bool pages_lie_on_their_nodes() {
  const int nodes = num_nodes();
  if (nodes == 1 || !may_place()) return true;
  constexpr int64_t kPages = 64, kPage = 4096;
  const int64_t blob = kPages * kPage * nodes;
  char* arena = static_cast<char*>(
      mmap(nullptr, 3 * blob, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  madvise(arena, 3 * blob, MADV_NOHUGEPAGE);
  bool ok = place_blobs(arena, {blob}, 3, 2);
  for (int64_t page = 0; page < 3 * kPages * nodes; ++page) {
    void* address = arena + page * kPage;
    int node = -1;
    syscall(SYS_move_pages, 0, 1ul, &address, nullptr, &node, 0);
    const int expected = static_cast<int>(page % (kPages * nodes) / kPages);
    if (node == expected) continue;  // nodes of this machine are taken to be called 0, 1, ...
    if (ok)
      std::printf("page %lld is on node %d, not %d\n", static_cast<long long>(page), node,
                  expected);
    ok = false;
  }
  munmap(arena, 3 * blob);
  std::printf("%d nodes; pages looked at\n", nodes);
  return ok;
}

bool one_node_places_nothing() {
  pretend_nodes(1);
  std::vector<char> arena(9000, 1);
  const bool obeyed = place_blobs(arena.data(), {9000}, 1, 2);
  pretend_nodes(0);
  for (const char c : arena) {
    if (c != 1) return false;
  }
  return obeyed;
}

}  // namespace

int main() {
  int failed = 0;
  const auto check = [&](const char* name, bool ok) {
    if (!ok) std::printf("failed: %s\n", name);
    failed += !ok;
  };
  check("two sockets", two_sockets());
  check("nodes without CPUs", nodes_without_cpus_are_left_out());
  check("no folder", no_folder_is_no_node());
  check("shares", shares_leave_nothing_out());
  check("placed memory", placed_memory_is_usable_and_the_policy_is_as_before());
  check("pages", pages_lie_on_their_nodes());
  check("one node", one_node_places_nothing());
  return failed != 0;
}
