#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace cuda_host {
namespace {

constexpr size_t kStack = 128 << 10;

// Below the stack, where a kernel that needs more of it ends.
size_t guard_bytes() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, guard_bytes() + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard_bytes(), PROT_NONE);
  memory_ = static_cast<unsigned char*>(memory);
}

Fiber::~Fiber() { munmap(memory_, guard_bytes() + kStack); }

#ifdef CUDA_HOST_UCONTEXT

void Fiber::restart(void (*entry)()) {
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = memory_ + guard_bytes();
  inside_.uc_stack.ss_size = kStack;
  inside_.uc_link = nullptr;
  makecontext(&inside_, entry, 0);
}

void Fiber::resume() { swapcontext(&outside_, &inside_); }
void Fiber::suspend() { swapcontext(&inside_, &outside_); }

#else

// swapcontext() asks the kernel for the signal mask at every switch; without, tests run ten times
// as fast. Saves what a function must preserve on the stack and the stack's place in *leave, and
// restores the same from `enter`.
extern "C" void cuda_host_switch(void** leave, void* enter);

asm(R"(
  .text
  .globl cuda_host_switch
  .hidden cuda_host_switch
  .type cuda_host_switch, @function
cuda_host_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size cuda_host_switch, . - cuda_host_switch
)");

void Fiber::restart(void (*entry)()) {
  // The return address lies where entry() finds the stack aligned as after a call.
  constexpr int kSaved = 6;
  auto* top = reinterpret_cast<void**>(memory_ + guard_bytes() + kStack);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSaved; ++i) top[-3 - i] = nullptr;
  inside_ = top - 2 - kSaved;
}

void Fiber::resume() { cuda_host_switch(&outside_, inside_); }
void Fiber::suspend() { cuda_host_switch(&inside_, outside_); }

#endif

}  // namespace cuda_host
