// Tensors that a kernel writes and the binding returns.
#pragma once

#include <string>
#include <vector>

#include "bindings/array.h"
#include "cpu/dtype.h"
#include "math/fp8_out.h"

namespace qirl {

// Without a tensor: not one of the op's results, and not wanted.
struct Output {
  py::object tensor;
  void* data = nullptr;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// An uninitialised contiguous tensor of float32 or bfloat16. A large one lies in memory that an
// earlier one has given back, see cpu/recycled.h. Throws MemoryError where there is none.
Output new_output(std::vector<int64_t> sizes, int dtype);

// The same of float64 or float32.
Output new_real_output(std::vector<int64_t> sizes, bool is_double);

// The same of float8_e4m3fn or float8_e5m2.
Output new_fp8_output(std::vector<int64_t> sizes, bool e5m2);

// In the sizes of another.
Output output_like(const Array& like, int dtype);

// A result that is not wanted: no elements, its data null.
Output no_output(int dtype);

// All sizes of a tensor.
std::vector<int64_t> sizes_of(const Array& array);

// Numbers in 8-bit floats, and their scales.
struct Fp8Outputs {
  Output q, scale;
  Fp8Out out;

  // granularity: "row", "block", "tensor" (a unit is a row, though one scale serves all), or "",
  // not wanted.
  Fp8Outputs(std::vector<int64_t> sizes, const std::string& granularity, bool e5m2 = false);
};

// Bytes of an output's row past the caches: rows as worth_streaming() wants them.
inline bool streams(const Output& output, const Array& like, int dtype) {
  return output.data == nullptr ||
         worth_streaming(output.data, like.row_size() * dtype_bytes(dtype), like.rows());
}

}  // namespace qirl
