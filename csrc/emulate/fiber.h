// A stack of its own for one thread of a block.
#pragma once

#include <stddef.h>

namespace qirl::emulate {

class Fiber {
 public:
  explicit Fiber(void (*run)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Runs until leave() or the end of run(); entered again after its end, it calls run() once more.
  void enter();
  void leave();  // called on the fiber

 private:
  static void main();
  void (*run_)();
  void* stack_;
  void* sp_ = nullptr;         // of the fiber while it is away
  void* caller_sp_ = nullptr;  // of whoever entered it
  // AddressSanitizer has to be told of every change of stack.
  void* fake_stack_ = nullptr;
  const void* caller_bottom_ = nullptr;
  size_t caller_size_ = 0;
  void switch_out();
};

}  // namespace qirl::emulate
