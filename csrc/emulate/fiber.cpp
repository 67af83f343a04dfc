// On x86-64 a switch saves six registers (2 ns); elsewhere ucontext does it, with a system call.
#include "emulate/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__) && !defined(QIRL_UCONTEXT)
#define QIRL_SWITCH_BY_HAND 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define QIRL_START_SWITCH(...) __sanitizer_start_switch_fiber(__VA_ARGS__)
#define QIRL_FINISH_SWITCH(...) __sanitizer_finish_switch_fiber(__VA_ARGS__)
#else
#define QIRL_START_SWITCH(...) ((void)0)
#define QIRL_FINISH_SWITCH(...) ((void)0)
#endif

namespace qirl::emulate {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 1 << 18;
#else
constexpr size_t kStackBytes = 1 << 16;
#endif

Fiber* entered = nullptr;  // the one that runs, or is being started

}  // namespace

#if defined(QIRL_SWITCH_BY_HAND)
// Saves the callee-saved registers and the stack pointer into *save, continues where `sp` was
// saved.
extern "C" void qirl_switch_stack(void** save, void* sp);
asm(R"(
.text
.globl qirl_switch_stack
.hidden qirl_switch_stack
.type qirl_switch_stack, @function
qirl_switch_stack:
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
.size qirl_switch_stack, .-qirl_switch_stack
)");

namespace {

void* first_sp(void* stack, void (*main)()) {
  void** top = (void**)((char*)stack + kStackBytes);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = (void*)main;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

void switch_stack(void** save, void* sp) { qirl_switch_stack(save, sp); }
void forget(void*) {}

}  // namespace
#else
namespace {

void* first_sp(void* stack, void (*main)()) {
  ucontext_t* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, main, 0);
  return context;
}

void switch_stack(void** save, void* sp) {
  if (*save == nullptr) *save = new ucontext_t;
  swapcontext((ucontext_t*)*save, (ucontext_t*)sp);
}

void forget(void* sp) { delete (ucontext_t*)sp; }

}  // namespace
#endif

Fiber::Fiber(void (*run)()) : run_(run) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("CUDA emulator: a fiber's stack");
    std::abort();
  }
  stack_ = (char*)memory + page;
  sp_ = first_sp(stack_, &Fiber::main);
}

Fiber::~Fiber() {
  forget(sp_);
  forget(caller_sp_);
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // frames of a thread that was abandoned
#endif
  munmap((char*)stack_ - page, kStackBytes + page);
}

void Fiber::main() {
  Fiber* self = entered;
  QIRL_FINISH_SWITCH(nullptr, &self->caller_bottom_, &self->caller_size_);
  for (;;) {
    self->run_();
    self->switch_out();
  }
}

void Fiber::enter() {
  entered = this;
  [[maybe_unused]] void* fake = nullptr;
  QIRL_START_SWITCH(&fake, stack_, kStackBytes);
  switch_stack(&caller_sp_, sp_);
  QIRL_FINISH_SWITCH(fake, nullptr, nullptr);
}

void Fiber::switch_out() {
  QIRL_START_SWITCH(&fake_stack_, caller_bottom_, caller_size_);
  switch_stack(&sp_, caller_sp_);
  QIRL_FINISH_SWITCH(fake_stack_, &caller_bottom_, &caller_size_);
}

void Fiber::leave() { switch_out(); }

}  // namespace qirl::emulate
