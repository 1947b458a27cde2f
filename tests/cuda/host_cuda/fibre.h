// Fibres: stacks that a thread of the operating system switches between. One runs one CUDA thread.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace host_cuda {

#if defined(__x86_64__)

// Saves the callee-saved registers on the current stack and restores those of another. Twenty times faster than swapcontext,
// which makes a system call for the signal mask.
extern "C" void host_cuda_switch(void** save, void* load);
asm(R"(
  .pushsection .text
  .weak host_cuda_switch
  .type host_cuda_switch,@function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .popsection
)");

struct Context {
  void* stack_pointer = nullptr;
};
inline void switch_context(Context& from, Context& to) { host_cuda_switch(&from.stack_pointer, to.stack_pointer); }
inline void make_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  // `ret` finds the entry where a call would have put it: the stack pointer is then 8 bytes off a multiple of 16
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;
  *top = reinterpret_cast<void*>(entry);
  for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
  c.stack_pointer = top - 6;
}

#else

struct Context {
  ucontext_t state;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
inline void make_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c.state);
  c.state.uc_stack.ss_sp = stack;
  c.state.uc_stack.ss_size = bytes;
  c.state.uc_link = nullptr;
  ::makecontext(&c.state, entry, 0);
}

#endif

// Memory for the stacks of a block's threads.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kBytes) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(p);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { munmap(base_, bytes_); }
  // Fibres leave their stacks without returning, so that the address sanitizer's record of their frames is stale.
  void forget() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(base_, bytes_);
#endif
  }
  // Staggered, so that the tops of the stacks do not all map to one cache set.
  char* of(size_t i) { return base_ + i * kBytes; }
  static size_t usable(size_t i) { return kBytes - (i % 16) * 64; }

  static constexpr size_t kBytes = 65536;

 private:
  size_t bytes_;
  char* base_ = nullptr;
};

}  // namespace host_cuda
