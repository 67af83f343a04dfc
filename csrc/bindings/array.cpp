#include "bindings/array.h"

#include <string>

#include "cpu/dtype.h"

namespace qirl {
namespace {

bool hidden = false;

// What is looked up once; never given back, as it may be used while Python ends.
struct Torch {
  py::object module = py::module_::import("torch"), tensor = module.attr("Tensor");
  py::object float32 = module.attr("float32"), bfloat16 = module.attr("bfloat16");
  const DLExchange* exchange = nullptr;

  Torch() {
    const char* name = "__dlpack_c_exchange_api__";
    if (!py::hasattr(tensor, name)) return;
    const py::object capsule = tensor.attr(name);
    void* found = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (found == nullptr) throw py::error_already_set();
    exchange = static_cast<const DLExchange*>(found);
    while (exchange != nullptr && exchange->version.major != 1) exchange = exchange->previous;
  }
};

const Torch& torch() {
  static const Torch* found = new Torch;
  return *found;
}

int code_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return -1;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return kFloat32;
  return t.dtype.code == kDLBfloat && t.dtype.bits == 16 ? kBFloat16 : -1;
}

// size(dim) and stride(dim) of a tensor of `dims` dimensions.
template <class Size, class Stride>
void set_dims(Array& a, int dims, Size size, Stride stride) {
  a.dims = dims;
  a.count = 1;
  if (dims > 0) a.last = size(dims - 1);
  a.step = a.last;
  int64_t vectors = 1;  // in t[r] of a dimension but the last
  for (int dim = dims; dim-- > 0;) {
    if (size(dim) != 1 && stride(dim) != a.count) {
      a.dense = false;
      if (dim > 0) a.dense_rows = false;
      if (dim == dims - 1) a.dense_vectors = a.even = false;
    }
    if (size(dim) != 1 && dim < dims - 1) {
      if (vectors == 1) a.step = stride(dim);
      if (stride(dim) != vectors * a.step) a.even = false;
      vectors *= size(dim);
    }
    a.count *= size(dim);
    if (dim >= Array::kDims) continue;
    a.size[dim] = size(dim);
    a.stride[dim] = stride(dim);
  }
}

Array by_attributes(py::handle tensor) {
  Array a;
  const py::object dtype = tensor.attr("dtype");
  a.code = dtype.is(torch().float32) ? kFloat32 : dtype.is(torch().bfloat16) ? kBFloat16 : -1;
  a.item = tensor.attr("itemsize").cast<int64_t>();
  const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
  set_dims(
      a, static_cast<int>(shape.size()), [&](int dim) { return shape[dim].cast<int64_t>(); },
      [&](int dim) { return strides[dim].cast<int64_t>(); });
  a.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  return a;
}

}  // namespace

int Array::dtype() const {
  if (code < 0) throw py::type_error("a kernel takes tensors of float32 or bfloat16 here.");
  return code;
}

py::handle tensor_type() { return torch().tensor; }

bool is_tensor(py::handle object) {
  return PyObject_TypeCheck(object.ptr(), (PyTypeObject*)tensor_type().ptr());
}

const DLExchange* exchange() { return hidden ? nullptr : torch().exchange; }

void hide_exchange(bool on) { hidden = on; }

Array look_at(py::handle tensor) {
  Array a;
  if (tensor.is_none()) return a;
  if (!is_tensor(tensor)) {
    throw py::type_error(std::string("a kernel takes tensors and None; got ") +
                         Py_TYPE(tensor.ptr())->tp_name + ".");
  }
  if (const DLExchange* from = exchange()) {
    DLTensor t;
    if (from->look(tensor.ptr(), &t) != 0) throw py::error_already_set();
    a.code = code_of(t);
    a.item = t.dtype.bits / 8;
    set_dims(
        a, t.ndim, [&](int dim) { return t.shape[dim]; }, [&](int dim) { return t.strides[dim]; });
    a.data = static_cast<char*>(t.data) + t.byte_offset;
  } else {
    a = by_attributes(tensor);
  }
  if (a.count == 0) a.data = nullptr;
  a.tensor = tensor;
  return a;
}

}  // namespace qirl
