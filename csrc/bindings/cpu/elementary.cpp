#include "cpu/elementary.h"

#include <string>

#include "bindings/cpu/ops.h"

namespace qirl {
namespace {

void apply(const std::string& function, const Array& x, const Array& y, bool scalar) {
  constexpr const char* kNames[] = {"exp", "log", "tanh", "sigmoid"};
  ElementaryArgs a{as_pointer<float>(x), as_pointer<float>(y), -1, scalar};
  for (int i = 0; i < 4; ++i) {
    if (function == kNames[i]) a.function = i;
  }
  if (a.function < 0) throw py::value_error("elementary: no function '" + function + "'.");
  py::gil_scoped_release released;
  run_kernel(elementary_kernels, &a, x.count, 4096, 1);
}

const Binding binding([](py::module_& m) { m.def("elementary", &apply); });

}  // namespace

}  // namespace qirl
