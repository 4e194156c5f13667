// SPDX-License-Identifier: Apache-2.0
// A lane: one thread that lives as long as the process and works while its askers do something
// else. The host asks with a job; a GPU asks by writing into a mailbox that the lane watches.
//
// A lane that has nothing to do spins for a bounded time and then sleeps on a futex: a decode loop
// finds it awake, an idle process uses no CPU. Nothing Python runs on it. After a fork the child
// has no lanes; it makes its own at the first use.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../status.h"
#include "signal.h"

namespace ey::handoff {

// Shared by asker and lane, because an asker may give up waiting; so it owns what run() touches.
class Job {
 public:
  virtual ~Job() = default;
  virtual Status run() = 0;  // on the lane; must not throw

  Status status;  // what run() returned; these three once wait() has returned true
  int64_t begin_ns = 0, end_ns = 0;

 private:
  friend class Lane;
  Signal done_;
};

// What a GPU writes into and a lane looks at.
class Mailbox {
 public:
  virtual ~Mailbox() = default;
  virtual bool asked() = 0;   // a question is there that has no answer; quick
  virtual void answer() = 0;  // on the lane; must not throw
};

class Lane {
 public:
  // threads: how many its jobs may use in the pool; 1: the lane alone, which waits for nobody.
  Lane(const std::string& name, int threads);

  // Not ok where an earlier job was given up and still runs.
  Status submit(std::shared_ptr<Job> job);
  // Until the job has run, or timeout_ns nanoseconds. what: the job, for the message.
  Status wait(Job& job, int64_t timeout_ns, const std::string& what);

  void watch(Mailbox* box);
  void unwatch(Mailbox* box);  // returns when the lane no longer looks at it
  // A GPU will ask that many times. Until it has, or for timeout_ns after its last question, the
  // lane polls: at short intervals at first, then at longer ones. Any thread; never blocks.
  void expect(int questions, int64_t timeout_ns);

  const std::string& name() const { return name_; }

 private:
  void serve(int threads);
  std::shared_ptr<Job> next_job();
  bool answer_one();
  bool polling();

  const std::string name_;
  std::mutex mutex_;  // of what follows
  std::deque<std::shared_ptr<Job>> jobs_;
  std::string late_;  // what was given up and still runs
  std::mutex boxes_mutex_;
  std::vector<Mailbox*> boxes_;
  std::atomic<int64_t> expected_{0}, poll_until_{0}, poll_for_{0};
  Signal bell_;
};

// The lane of that name; made at the first use, with the threads asked for then.
Lane& lane(const std::string& name, int threads);

}  // namespace ey::handoff
