// What the op bindings share.
#pragma once

#include <tuple>

#include "bindings/array.h"
#include "math/fp8_out.h"

namespace qirl {

template <class T = void>
T* as_pointer(const Array& array) {
  return static_cast<T*>(array.data);
}

// Throws TypeError where a tensor that is there has not the dtype that the kernel reads it in.
inline void require_dtype(const Array& tensor, int dtype) {
  if (tensor.data == nullptr || tensor.code == dtype) return;
  throw py::type_error("a kernel takes its large tensors in one dtype; got another one too.");
}

// A stream's handle.
inline void* as_pointer(uintptr_t handle) { return reinterpret_cast<void*>(handle); }

// What Fp8Out holds: q, scale and the unit. q absent: not wanted.
using Fp8 = std::tuple<Array, Array, int64_t>;

// What an op's file adds to its module: `static const Binding binding([](py::module_& m) {...});`
// The module binds all that are linked into it.
class Binding {
 public:
  using Bind = void (*)(py::module_&);

  explicit Binding(Bind bind) : bind_(bind), next_(first()) { first() = this; }

  static void bind_all(py::module_& m) {
    for (const Binding* b = first(); b != nullptr; b = b->next_) b->bind_(m);
  }

 private:
  static const Binding*& first() {
    static const Binding* head = nullptr;
    return head;
  }

  Bind bind_;
  const Binding* next_;
};

inline Fp8Out fp8_out(const Fp8& fp8) {
  const auto& [q, scale, unit] = fp8;
  return {as_pointer<uint8_t>(q), as_pointer<float>(scale), unit};
}

}  // namespace qirl
