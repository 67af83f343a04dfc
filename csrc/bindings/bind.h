// What the op bindings share. Tensors cross as addresses: no torch headers here.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <tuple>

namespace qirl {

namespace py = pybind11;

// Rows of a tensor as Python passes them: address, row stride in elements, Dtype code; each row is
// dense. Address 0: absent.
using Rows = std::tuple<uintptr_t, int64_t, int>;

template <class T = void>
T* as_pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void* address_of(const Rows& rows) { return as_pointer(std::get<0>(rows)); }
inline int64_t stride_of(const Rows& rows) { return std::get<1>(rows); }
inline int dtype_of(const Rows& rows) { return std::get<2>(rows); }

}  // namespace qirl
