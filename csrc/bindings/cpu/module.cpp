// qirl_fast._cpu: C++ kernels for CPU tensors.
#include <cmath>
#include <cstdlib>
#include <string>

#include "bindings/cpu/ops.h"
#include "cpu/isa.h"

namespace qirl {
namespace {

std::string join_names(bool only_supported) {
  std::string names;
  for (const Isa& isa : kIsaTable) {
    if (only_supported && !isa.supported()) continue;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  return names;
}

void force_isa_or_throw(const char* name, const char* asked_by) {
  if (force_isa(name)) return;
  throw py::value_error(std::string(asked_by) + "='" + name + "' cannot run here: built are " +
                        join_names(false) + "; this CPU supports " + join_names(true) + ".");
}

py::list available_isas() {
  py::list names;
  for (const Isa& isa : kIsaTable) {
    if (isa.supported()) names.append(isa.name);
  }
  return names;
}

}  // namespace

void require_finite(const char* op, const char* name, const float* values_B, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    if (std::isfinite(values_B[row])) continue;
    throw py::value_error(std::string(op) + ": " + name + "[" + std::to_string(row) + "] is " +
                          std::to_string(values_B[row]) + "; coefficients must be finite.");
  }
}

}  // namespace qirl

PYBIND11_MODULE(_cpu, m) {
  using namespace qirl;
  m.doc() = "C++ kernels for CPU tensors; arguments are tensors, None for absent.";
  m.def("available_isas", &available_isas, "Instruction sets this CPU can run, worst to best.");
  m.def("last_isa", &last_isa, "Instruction set of the kernel that ran last; '' before the first.");
  m.def("active_isa", [] { return kIsaTable[active_isa()].name; }, "The one that runs next.");
  m.def(
      "force_isa", [](const std::string& name) { force_isa_or_throw(name.c_str(), "force_isa"); },
      "Forces one by name; ValueError when it cannot run here.");
  m.def("unforce_isa", [] { force_isa(nullptr); }, "Back to the best supported one.");

  Binding::bind_all(m);

  const char* asked = std::getenv("QIRL_CPU_ISA");
  if (asked != nullptr && *asked != '\0') force_isa_or_throw(asked, "QIRL_CPU_ISA");
}
