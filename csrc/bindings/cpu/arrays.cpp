// What the launchers ask of tensors before a kernel, and the memory of its outputs.
#include <pybind11/stl.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "bindings/array.h"
#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"
#include "cpu/recycled.h"

namespace qirl {
namespace {

constexpr size_t kRecycledFrom = size_t(1) << 20;  // bytes
constexpr const char* kUnused = "dltensor_versioned";

bool poisoned = false;

// ---- what tensors are like ----------------------------------------------------------------------
// False for what is no tensor, and where the exchange functions cannot tell.
bool look(py::handle tensor, DLTensor& t) {
  const DLExchange* from = exchange();
  if (from == nullptr || !is_tensor(tensor)) return false;
  if (from->look(tensor.ptr(), &t) == 0) return true;
  PyErr_Clear();
  return false;
}

// Whether these are plain tensors on the CPU, no subclass's, that every check of rows lets pass:
// `same` of one shape [B, ...] and dtype, float32 or bfloat16; `like` of that shape, each in one of
// the two; `per_row` float32 [B]; `modulation` [B, D] in one of the two or absent, for rows of
// [B, D] or [B, S, D]. False says nothing.
bool plain_rows(const py::tuple& same, const py::tuple& like, const py::tuple& per_row,
                const py::tuple& modulation) {
  const auto plain = [](py::handle tensor, DLTensor& t) {
    return py::type::handle_of(tensor).is(tensor_type()) && look(tensor, t) &&
           t.device.type == kDLCPU && t.dtype.lanes == 1;
  };
  const auto is_float = [](const DLTensor& t, int code, int bits) {
    return t.dtype.code == code && t.dtype.bits == bits;
  };
  DLTensor first, t;
  if (!plain(same[0], first) || first.ndim < 1) return false;
  for (int dim = 0; dim < first.ndim; ++dim) {
    if (first.shape[dim] == 0) return false;
  }
  const auto is_large = [&](const DLTensor& t) {
    return is_float(t, kDLFloat, 32) || is_float(t, kDLBfloat, 16);
  };
  const auto of_its_shape = [&](const DLTensor& t) {
    return is_large(t) && t.ndim == first.ndim &&
           std::equal(t.shape, t.shape + t.ndim, first.shape);
  };
  for (const py::handle& tensor : same) {
    if (!plain(tensor, t) || !of_its_shape(t) || t.dtype.code != first.dtype.code) return false;
  }
  for (const py::handle& tensor : like) {
    if (!plain(tensor, t) || !of_its_shape(t)) return false;
  }
  for (const py::handle& tensor : per_row) {
    const bool fits = plain(tensor, t) && is_float(t, kDLFloat, 32) && t.ndim == 1 &&
                      t.shape[0] == first.shape[0];
    if (!fits) return false;
  }
  for (const py::handle& tensor : modulation) {
    if (first.ndim != 2 && first.ndim != 3) return false;
    if (tensor.is_none()) continue;
    const bool fits = plain(tensor, t) && is_large(t) && t.ndim == 2 &&
                      t.shape[0] == first.shape[0] && t.shape[1] == first.shape[first.ndim - 1];
    if (!fits) return false;
  }
  return true;
}

// What `tensor` answers to a question without arguments.
bool says_yes(py::handle tensor, py::handle question) {
  const auto answer =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), question.ptr()));
  if (!answer) throw py::error_already_set();
  return answer.ptr() != Py_False;
}

// Whether a kernel may be handed this argument as it is: no tensor, or one of torch.Tensor itself
// or a parameter, looked at as `t`, whose elements are those in memory.
bool as_it_lies(py::handle argument, DLTensor& t) {
  static const py::handle parameter =
      py::object(py::module_::import("torch.nn").attr("Parameter")).release();
  static const py::handle is_negated = py::str("is_neg").release();
  static const py::handle is_conjugated = py::str("is_conj").release();
  if (!is_tensor(argument)) return true;
  const py::handle type = py::type::handle_of(argument);
  if (!type.is(tensor_type()) && !type.is(parameter)) return false;
  if (!look(argument, t) || t.data == nullptr || t.dtype.lanes != 1) return false;
  if (t.dtype.code == kDLComplex && says_yes(argument, is_conjugated)) return false;
  return !says_yes(argument, is_negated);
}

// A tensor's dtype in seven bits; kAbsent for one that has none there, and for no tensor.
constexpr uint64_t kAbsent = 127;

uint64_t kind_of(const DLTensor& t) {
  for (uint64_t size = 0; size < 5; ++size) {
    if (t.dtype.bits == 8 << size && t.dtype.code < 15) return size << 4 | t.dtype.code;
  }
  return kAbsent;
}

// A number for the device type of the first of an op's large tensors and the dtypes of all, another
// for others; None where a kernel cannot be handed the op's arguments as they are.
py::object kinds(const py::tuple& arguments, const py::tuple& large) {
  constexpr size_t kArguments = 32, kLarge = 8;
  struct Seen {
    uint64_t kind, device;
  } seen[kArguments];
  if (arguments.size() > kArguments || large.size() > kLarge) return py::none();
  size_t count = 0;
  for (const py::handle& argument : arguments) {
    DLTensor t{};
    if (!as_it_lies(argument, t)) return py::none();
    seen[count++] = {kind_of(t), static_cast<uint64_t>(t.device.type)};
    if (!PyList_Check(argument.ptr()) && !PyTuple_Check(argument.ptr())) continue;
    for (const py::handle& one : py::reinterpret_borrow<py::sequence>(argument)) {
      if (!as_it_lies(one, t)) return py::none();
    }
  }
  uint64_t number = 0, device = 0;
  for (const py::handle& place : large) {
    const size_t at = place.cast<size_t>();
    const Seen& tensor = seen[at];
    if (tensor.kind == kAbsent && !arguments[at].is_none()) return py::none();
    if (device == 0) device = tensor.device;
    number = number << 7 | tensor.kind;
  }
  return py::int_(number << 8 | device);
}

// ---- outputs ------------------------------------------------------------------------------------
struct Memory {
  DLManagedTensorVersioned managed;
  std::vector<int64_t> shape, strides;
  size_t bytes;
};

void give_back(DLManagedTensorVersioned* managed) {
  const std::unique_ptr<Memory> memory(static_cast<Memory*>(managed->context));
  give_back_block(managed->tensor.data, memory->bytes);
}

// Whoever takes the tensor renames the capsule, and calls the deleter.
void drop(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, kUnused)) return;
  give_back(static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, kUnused)));
}

// `say` of DLExchange's allocate.
void raise(void*, const char*, const char* message) { PyErr_SetString(PyExc_MemoryError, message); }

// A large one in recycled memory, a small one from PyTorch's allocator, which tools watch.
DLManagedTensorVersioned* take(std::vector<int64_t> shape, uint8_t code, uint8_t bits) {
  auto memory = std::make_unique<Memory>();
  memory->shape = std::move(shape);
  memory->strides.resize(memory->shape.size());
  int64_t count = 1;
  for (size_t dim = memory->shape.size(); dim-- > 0;) {
    memory->strides[dim] = count;
    count *= memory->shape[dim];
  }
  memory->bytes = static_cast<size_t>(count) * bits / 8;
  DLTensor tensor{nullptr,
                  {kDLCPU, 0},
                  static_cast<int32_t>(memory->shape.size()),
                  {code, bits, 1},
                  memory->shape.data(),
                  memory->strides.data(),
                  0};
  if (const DLExchange* from = memory->bytes < kRecycledFrom ? exchange() : nullptr) {
    DLManagedTensorVersioned* made = nullptr;
    if (from->allocate(&tensor, &made, nullptr, &raise) != 0) throw py::error_already_set();
    return made;
  }
  tensor.data = take_block(memory->bytes);
  if (tensor.data == nullptr) {
    PyErr_Format(PyExc_MemoryError, "no memory left for an output of %zu bytes", memory->bytes);
    throw py::error_already_set();
  }
  memory->managed = {{1, 0}, memory.get(), &give_back, 0, tensor};
  return &memory.release()->managed;
}

Output new_tensor(std::vector<int64_t> shape, uint8_t code, uint8_t bits) {
  DLManagedTensorVersioned* managed = take(std::move(shape), code, bits);
  const DLTensor& t = managed->tensor;
  void* data = t.data;
  if (poisoned && data != nullptr) {
    size_t bytes = bits / 8;
    for (int dim = 0; dim < t.ndim; ++dim) bytes *= static_cast<size_t>(t.shape[dim]);
    memset(data, 0xff, bytes);
  }
  if (const DLExchange* to = exchange()) {
    void* tensor = nullptr;
    if (to->to_python(managed, &tensor) != 0) throw py::error_already_set();
    return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor)), data};
  }
  const py::capsule capsule(managed, kUnused, &drop);
  return {py::module_::import("torch.utils.dlpack").attr("from_dlpack")(capsule), data};
}

// `value` for each row of a tensor [B, ...]: float32 [B]; None where that is not a plain tensor on
// the CPU, with memory of its own.
py::object filled_rows(py::handle like, float value) {
  DLTensor t;
  const bool plain = py::type::handle_of(like).is(tensor_type()) && look(like, t) &&
                     t.device.type == kDLCPU && t.ndim > 0 && t.data != nullptr;
  if (!plain) return py::none();
  const Output rows = new_output({t.shape[0]}, kFloat32);
  std::fill_n(rows.as<float>(), t.shape[0], value);
  return rows.tensor;
}

const Binding binding([](py::module_& m) {
  m.def("plain_rows", &plain_rows);
  m.def("filled_rows", &filled_rows);
  m.def("kinds", &kinds);
  m.def(
      "new_output",
      [](std::vector<int64_t> sizes, int dtype) {
        return new_output(std::move(sizes), dtype).tensor;
      },
      "An uninitialised output: sizes, 0 for float32 or 1 for bfloat16.");
  m.def("kept_bytes", &kept_bytes, "Bytes of earlier outputs that wait for a next one.");
  m.def("poison", [](bool on) { poisoned = on; }, "Outputs start as NaN, for the tests.");
  m.def("hide_exchange", &hide_exchange, "As with a PyTorch before 2.11, for the tests.");
  m.def("look_at", [](const Array& a) {
    py::list sizes, strides;
    for (int dim = 0; dim < Array::kDims; ++dim) {
      sizes.append(a.size[dim]);
      strides.append(a.stride[dim]);
    }
    return py::make_tuple(reinterpret_cast<uintptr_t>(a.data), a.code, a.count, a.last, sizes,
                          strides);
  });
  m.def("layout_of", [](const Array& a) {
    return py::make_tuple(a.dense, a.dense_rows, a.dense_vectors, a.even, a.step);
  });
});

}  // namespace

Output new_output(std::vector<int64_t> sizes, int dtype) {
  return dtype == kFloat32 ? new_tensor(std::move(sizes), kDLFloat, 32)
                           : new_tensor(std::move(sizes), kDLBfloat, 16);
}

Output new_real_output(std::vector<int64_t> sizes, bool is_double) {
  return new_tensor(std::move(sizes), kDLFloat, is_double ? 64 : 32);
}

Output new_fp8_output(std::vector<int64_t> sizes, bool e5m2) {
  if (exchange() != nullptr) {
    return new_tensor(std::move(sizes), e5m2 ? kDLFloat8_e5m2 : kDLFloat8_e4m3fn, 8);
  }
  Output bytes = new_tensor(std::move(sizes), kDLUInt, 8);
  const char* name = e5m2 ? "float8_e5m2" : "float8_e4m3fn";
  bytes.tensor = bytes.tensor.attr("view")(py::module_::import("torch").attr(name));
  return bytes;
}

std::vector<int64_t> sizes_of(const Array& array) {
  if (array.dims <= Array::kDims) return {array.size, array.size + array.dims};
  return array.tensor.attr("shape").cast<std::vector<int64_t>>();
}

Output output_like(const Array& like, int dtype) { return new_output(sizes_of(like), dtype); }

Output no_output(int dtype) { return {new_output({0}, dtype).tensor, nullptr}; }

Fp8Outputs::Fp8Outputs(std::vector<int64_t> sizes, const std::string& granularity, bool e5m2)
    : out{} {
  if (granularity.empty()) {
    q = {new_fp8_output({0}, e5m2).tensor, nullptr};
    scale = no_output(kFloat32);
    return;
  }
  const int64_t width = sizes.back(), unit = granularity == "block" ? kFp8Block : width;
  q = new_fp8_output(sizes, e5m2);
  sizes.back() = (width + unit - 1) / unit;
  scale =
      granularity == "tensor" ? new_output({1}, kFloat32) : new_output(std::move(sizes), kFloat32);
  out = {q.as<uint8_t>(), scale.as<float>(), unit};
}

}  // namespace qirl
