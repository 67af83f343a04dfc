#include "cpu/recycled.h"

#include <memory>
#include <vector>

#include "bindings/cpu/ops.h"

namespace qirl {
namespace {

// The part of DLPack 0.x that a CPU tensor needs (dmlc/dlpack, include/dlpack/dlpack.h).
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

constexpr int32_t kDLCPU = 1;
constexpr const char* kUnused = "dltensor";

struct Output {
  DLManagedTensor managed;
  std::vector<int64_t> shape;
  size_t bytes;
};

void give_back(DLManagedTensor* managed) {
  std::unique_ptr<Output> output(static_cast<Output*>(managed->context));
  give_back_block(managed->tensor.data, output->bytes);
}

py::capsule recycled(const py::tuple& shape, uint8_t code, uint8_t bits) {
  auto output = std::make_unique<Output>();
  size_t bytes = bits / 8;
  for (const py::handle& size : shape) {
    output->shape.push_back(size.cast<int64_t>());
    bytes *= static_cast<size_t>(output->shape.back());
  }
  void* data = take_block(bytes);
  if (data == nullptr) {
    PyErr_Format(PyExc_MemoryError, "no memory left for an output of %zu bytes", bytes);
    throw py::error_already_set();
  }
  output->bytes = bytes;
  output->managed = {{data,
                      {kDLCPU, 0},
                      static_cast<int32_t>(output->shape.size()),
                      {code, bits, 1},
                      output->shape.data(),
                      nullptr,
                      0},
                     output.get(),
                     &give_back};
  return py::capsule(&output.release()->managed, kUnused, [](PyObject* capsule) {
    // Whoever takes the tensor renames the capsule, and calls the deleter.
    void* managed =
        PyCapsule_IsValid(capsule, kUnused) ? PyCapsule_GetPointer(capsule, kUnused) : nullptr;
    if (managed != nullptr) give_back(static_cast<DLManagedTensor*>(managed));
  });
}

const Binding binding([](py::module_& m) {
  m.def("recycled", &recycled,
        "DLPack capsule of an uninitialised array: shape, dtype code, bits.");
  m.def("kept_bytes", &kept_bytes, "Bytes of earlier outputs that wait for a next one.");
});

}  // namespace
}  // namespace qirl
