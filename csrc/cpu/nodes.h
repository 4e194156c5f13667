// SPDX-License-Identifier: Apache-2.0
// NUMA: memory is near some CPUs and far from others, and each node's share of it has a channel of
// its own. So every expert's blocks are parted over the nodes, and a thread takes the blocks of the
// node it runs on first. On one node, which most machines are, all of this is one share.
//
// No thread is bound, and no libnuma needed. A process that was started under a memory policy
// (numactl) has decided for itself: it counts as one node.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "threads.h"

namespace ey::cpu {

constexpr int kMaxNodes = 8;

// Nodes that have CPUs which this process may run on; 1 where there is no such thing.
int num_nodes();
// 0 .. num_nodes() - 1: where the calling thread runs now.
int node_here();

// Gives a fresh arena of `count` times blobs of these sizes its pages, each part of a blob on its
// node. On one node nothing is done. False: the system refuses memory policies; pages will lie
// where they are first written.
bool place_blobs(char* arena, const std::vector<int64_t>& blob_bytes, int64_t count, int threads);

// Whether the system lets this process say where its memory shall lie; containers often may not.
bool may_place();

// For tests: n > 0 nodes among which threads are dealt out, all of them in the same memory; 0: as
// the machine is.
void pretend_nodes(int n);

// The node of each CPU by number, -1 for those that may not be used; nodes counted from 0 on, ids
// their names in the system. root: /sys/devices/system/node.
struct NodeMap {
  std::vector<int> node_of_cpu;
  std::vector<int> ids;
};
NodeMap read_nodes(const std::string& root, const std::vector<bool>& usable_cpus);

}  // namespace ey::cpu
