// SPDX-License-Identifier: Apache-2.0
// Numbers that stand for native objects in Python.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace ey::handoff {

template <class T>
class Handles {
 public:
  int64_t add(std::unique_ptr<T> object) {
    const std::lock_guard<std::mutex> lock(mutex_);
    objects_[next_] = std::move(object);
    return next_++;
  }
  std::shared_ptr<T> find(int64_t handle) {  // null: there is none
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    return found == objects_.end() ? nullptr : found->second;
  }
  void remove(int64_t handle) {
    std::shared_ptr<T> last;  // freed without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    if (found == objects_.end()) return;
    last = std::move(found->second);
    objects_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<T>> objects_;
  int64_t next_ = 1;
};

}  // namespace ey::handoff
