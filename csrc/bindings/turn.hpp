#pragma once
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "bindings/gil.hpp"

namespace fusedstep::bindings {

/// Lets one call at a time use an object. Two that change it do not go together, whoever makes
/// them: that is an error. One that only looks waits for others, and others wait for it: to poll
/// an optimizer from another thread must not disturb its training. The GIL must be held.
class Turn {
 public:
  enum class Kind : std::uint8_t { none, look, change };

  void take(Kind kind) {
    wait_for_others(kind);
    const std::lock_guard<std::mutex> lock(mutex_);
    kind_ = kind;
    thread_ = std::this_thread::get_id();
  }

  void end() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      kind_ = Kind::none;
    }
    ended_.notify_all();
  }

  /// Refuses to go on while a call changes the object.
  void check_idle() { wait_for_others(Kind::change); }

 private:
  void wait_for_others(Kind kind) {
    while (kind_ != Kind::none) {
      const bool waits = kind == Kind::look || kind_ == Kind::look;
      if (!waits || thread_ == std::this_thread::get_id()) {
        throw std::runtime_error(
            "the optimizer is already in use by another call: by another thread, or by code that "
            "a call of it runs");
      }
      without_gil([&] {
        std::unique_lock<std::mutex> lock(mutex_);
        ended_.wait(lock, [&] { return kind_ == Kind::none; });
      });
    }
  }

  std::mutex mutex_;  ///< for those that wait without the GIL
  std::condition_variable ended_;
  Kind kind_ = Kind::none;
  std::thread::id thread_;
};

/// A call that has its turn while this lives.
template <Turn::Kind kind>
class Taken {
 public:
  explicit Taken(Turn& turn) : turn_(turn) { turn_.take(kind); }
  ~Taken() { turn_.end(); }
  Taken(const Taken&) = delete;
  Taken& operator=(const Taken&) = delete;

 private:
  Turn& turn_;
};

}  // namespace fusedstep::bindings
