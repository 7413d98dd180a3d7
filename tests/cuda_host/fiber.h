// A function on a stack of its own that can be left and entered again.
#pragma once

#include <cstddef>

#if !defined(CUDA_HOST_UCONTEXT) && !(defined(__x86_64__) && defined(__linux__))
#define CUDA_HOST_UCONTEXT
#endif

#ifdef CUDA_HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_host {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(), which must not return; what ran here before is forgotten.
  void restart(void (*entry)());
  // Runs the fiber until it suspends.
  void resume();
  // From within the fiber: back to resume().
  void suspend();

 private:
#ifdef CUDA_HOST_UCONTEXT
  using Place = ucontext_t;
#else
  using Place = void*;  // the stack pointer; everything else is on the stack
#endif
  unsigned char* memory_;
  Place inside_, outside_;
};

}  // namespace cuda_host
