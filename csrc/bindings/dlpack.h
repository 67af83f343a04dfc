// The parts of DLPack that a binding needs (dmlc/dlpack 1.x, include/dlpack/dlpack.h).
#pragma once

#include <stdint.h>

namespace qirl {

enum DLTypeCode : uint8_t {
  kDLUInt = 1,
  kDLFloat = 2,
  kDLBfloat = 4,
  kDLComplex = 5,
  kDLFloat8_e4m3fn = 10,
  kDLFloat8_e5m2 = 12
};
constexpr int32_t kDLCPU = 1;

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

struct DLVersion {
  uint32_t major, minor;
};

struct DLManagedTensorVersioned {
  DLVersion version;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};

// Functions of the library that a tensor comes from; each gives 0, or -1 with a Python error set.
struct DLExchange {
  DLVersion version;
  DLExchange* previous;
  int (*allocate)(DLTensor* like, DLManagedTensorVersioned** made, void* context,
                  void (*say)(void* context, const char* kind, const char* message));
  void* from_python;
  int (*to_python)(DLManagedTensorVersioned* taken, void** object);
  int (*look)(void* object, DLTensor* borrowed);
};

}  // namespace qirl
