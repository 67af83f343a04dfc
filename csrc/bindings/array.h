// Tensors as the bindings see them: where they lie, their sizes and strides. No torch headers: they
// are looked at through DLPack's exchange functions, which costs no call into Python.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include "bindings/dlpack.h"

namespace qirl {

namespace py = pybind11;

// A torch tensor, to which it holds no reference. None, and one without elements, are absent.
struct Array {
  static constexpr int kDims = 4;

  py::handle tensor;
  void* data = nullptr;  // null: absent
  int code = 0;          // of csrc/cpu/dtype.h; -1: a dtype that has none
  int dims = 0;
  int64_t item = 0;                              // bytes an element
  int64_t count = 0;                             // elements
  int64_t last = 1;                              // size of the last dimension
  int64_t size[kDims] = {}, stride[kDims] = {};  // of the first dimensions; strides in elements
  bool dense = true;                             // contiguous
  bool dense_rows = true;                        // each t[r] is, at any row stride
  bool dense_vectors = true;                     // each vector of the last dimension is
  bool even = true;                              // so, at one `step` from each to the next
  int64_t step = 0;                              // elements

  // Throws TypeError for a dtype without a code.
  int dtype() const;
  int64_t rows() const { return size[0]; }
  int64_t row_size() const { return count / size[0]; }
};

// Throws TypeError for what is neither a tensor nor None.
Array look_at(py::handle tensor);

// One of which this much is dense; another is copied to be so.
template <bool Array::* kDense>
struct Dense : Array {
  py::object copy;

  bool fits() const { return this->*kDense; }
};
using Whole = Dense<&Array::dense>;
using Rows = Dense<&Array::dense_rows>;
using Vectors = Dense<&Array::dense_vectors>;
using Matrix = Dense<&Array::even>;  // [..., K] as [count / K, K]

// The class torch.Tensor.
py::handle tensor_type();

// Of it or of a subclass.
bool is_tensor(py::handle object);

// Exchange functions of torch.Tensor, or null: PyTorch before 2.11 has none.
const DLExchange* exchange();

// As if PyTorch had none, for the tests.
void hide_exchange(bool hidden);

}  // namespace qirl

namespace pybind11::detail {

template <>
struct type_caster<qirl::Array> {
  PYBIND11_TYPE_CASTER(qirl::Array, const_name("torch.Tensor | None"));

  bool load(handle from, bool) {
    value = qirl::look_at(from);
    return true;
  }
};

template <bool qirl::Array::* kDense>
struct type_caster<qirl::Dense<kDense>> {
  PYBIND11_TYPE_CASTER(qirl::Dense<kDense>, const_name("torch.Tensor | None"));

  bool load(handle from, bool) {
    static_cast<qirl::Array&>(value) = qirl::look_at(from);
    if (value.fits()) return true;
    value.copy = from.attr("contiguous")();
    static_cast<qirl::Array&>(value) = qirl::look_at(value.copy);
    return true;
  }
};

}  // namespace pybind11::detail
