// Stacks, and the switch from one to another: what a GPU thread is on a CPU. One thread of the operating system.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define AUXK_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define AUXK_ADDRESS_SANITIZER 1
#endif
#endif
#ifdef AUXK_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(AUXK_UCONTEXT)
#define AUXK_UCONTEXT 1
#endif
#ifdef AUXK_UCONTEXT
#include <ucontext.h>
#endif

namespace auxk {
namespace hw {
namespace model {

#ifdef AUXK_ADDRESS_SANITIZER
constexpr size_t kStackBytes = 256 * 1024;  // its red zones make frames several times as large
constexpr int64_t kGuardBytes = 0;          // and lie beside shared memory as well
#else
constexpr size_t kStackBytes = 64 * 1024;
constexpr int64_t kGuardBytes = 128;  // on either side of shared memory, to see a write that is just outside
#endif

struct Context {
  const void* stack = nullptr;  // lowest address; of the caller's own stack it is only learned for AddressSanitizer
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#ifdef AUXK_UCONTEXT
  ucontext_t registers;
#else
  void* top = nullptr;  // the registers are on the stack
#endif
};

// A stack with an unmapped page below, so that overflow is a segmentation fault and not another thread's data.
inline bool give_stack(Context& context) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) return false;
  context.stack = static_cast<char*>(memory) + page;
  context.stack_bytes = kStackBytes;
  return true;
}

#ifndef AUXK_UCONTEXT
// what a called function must preserve, less the floating-point modes, which nothing here changes
__attribute__((naked, noinline)) inline void jump(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}
#endif

// The next switch to `context` calls `entry`, which never returns.
inline void prepare(Context& context, void (*entry)()) {
#ifdef AUXK_ADDRESS_SANITIZER
  // frames that were left for good, of a kernel that ended in an error, are still marked
  __asan_unpoison_memory_region(context.stack, context.stack_bytes);
#endif
  char* const bottom = static_cast<char*>(const_cast<void*>(context.stack));
#ifdef AUXK_UCONTEXT
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = bottom;
  context.registers.uc_stack.ss_size = context.stack_bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#else
  // as a call leaves it: 8 bytes off a multiple of 16, a return address (to nowhere) on top
  void** top = reinterpret_cast<void**>(bottom + context.stack_bytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.top = top;
#endif
}

inline __attribute__((visibility("hidden"))) Context* left_last = nullptr;

// what was saved of the stack that now runs; null for a new one
inline void have_switched([[maybe_unused]] void* fake_stack) {
#ifdef AUXK_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake_stack, &left_last->stack, &left_last->stack_bytes);
#endif
}

// Returns when something switches back to `from`; if that is `for_good`, never.
inline void switch_stacks(Context& from, Context& to, [[maybe_unused]] bool for_good) {
  left_last = &from;
#ifdef AUXK_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef AUXK_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  jump(&from.top, to.top);
#endif
  have_switched(from.fake_stack);
}

}  // namespace model
}  // namespace hw
}  // namespace auxk
