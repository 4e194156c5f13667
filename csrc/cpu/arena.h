// SPDX-License-Identifier: Apache-2.0
// Scratch memory of one calling thread, kept between calls: a call allocates nothing once warm.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

namespace ey::cpu {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(memory_); }

  // Forgets what was taken; the memory is whatever was left in it.
  bool reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    std::free(memory_);
    size_ = 0;
    constexpr size_t kHugePage = 2u << 20;
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    memory_ = static_cast<char*>(std::aligned_alloc(kHugePage, bytes));
    if (memory_ == nullptr) return false;
    madvise(memory_, bytes, MADV_HUGEPAGE);  // advice: failure costs speed only
    size_ = bytes;
    return true;
  }
  template <class T>
  T* take(size_t count) {
    auto* p = reinterpret_cast<T*>(memory_ + used_);
    used_ += bytes_of<T>(count);
    return p;
  }
  template <class T>
  static constexpr size_t bytes_of(size_t count) {
    return (count * sizeof(T) + 127) / 128 * 128;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
  size_t used_ = 0;
};

}  // namespace ey::cpu
