// What the op bindings share. Tensors cross as addresses: no torch headers here.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <tuple>

#include "math/fp8_out.h"

namespace qirl {

namespace py = pybind11;

// Rows of a tensor as Python passes them: address, row stride in elements, Dtype code; each row is
// dense. Address 0: absent.
using Rows = std::tuple<uintptr_t, int64_t, int>;

template <class T = void>
T* as_pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What Fp8Out holds: the addresses of q and scale, and the unit. Address 0: not wanted.
using Fp8 = std::tuple<uintptr_t, uintptr_t, int64_t>;

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

inline void* address_of(const Rows& rows) { return as_pointer(std::get<0>(rows)); }
inline int64_t stride_of(const Rows& rows) { return std::get<1>(rows); }
inline int dtype_of(const Rows& rows) { return std::get<2>(rows); }

inline Fp8Out fp8_out(const Fp8& fp8) {
  return {as_pointer<uint8_t>(std::get<0>(fp8)), as_pointer<float>(std::get<1>(fp8)),
          std::get<2>(fp8)};
}

}  // namespace qirl
