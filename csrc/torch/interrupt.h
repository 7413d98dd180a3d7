// Ctrl-C inside a compiled solve.
#pragma once

#include <atomic>
#include <cstdint>

namespace pycnf {

// Throws if the user has asked for an end. Cheap enough for every step; set by module.cpp, for only
// Python knows.
inline void (*check_interrupt)() = [] {};

// The same for threads that work side by side: the first of them, which Python's own is, hears it
// (and throws), and the others end.
class Interruption {
 public:
  bool go_on(int64_t thread) {
    if (thread == 0 && !stopped_) {
      try {
        check_interrupt();
      } catch (...) {
        stopped_ = true;
        throw;
      }
    }
    return !stopped_;
  }

  void stop() { stopped_ = true; }

 private:
  std::atomic<bool> stopped_ = false;
};

}  // namespace pycnf
