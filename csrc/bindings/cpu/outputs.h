// Tensors that a kernel writes and the binding returns.
#pragma once

#include <vector>

#include "bindings/array.h"
#include "cpu/dtype.h"

namespace qirl {

struct Output {
  py::object tensor;
  void* data;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// An uninitialised contiguous tensor of float32 or bfloat16. A large one lies in memory that an
// earlier one has given back, see cpu/recycled.h. Throws MemoryError where there is none.
Output new_output(std::vector<int64_t> sizes, int dtype);

// In the sizes of another.
Output output_like(const Array& like, int dtype);

// One that is not wanted: no elements, its data null.
Output no_output(int dtype);

// Bytes of an output's row past the caches: rows as worth_streaming() wants them.
inline bool streams(const Output& output, const Array& like, int dtype) {
  return output.data == nullptr ||
         worth_streaming(output.data, like.row_size() * dtype_bytes(dtype), like.rows());
}

}  // namespace qirl
