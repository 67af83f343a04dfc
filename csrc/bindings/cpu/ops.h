// The op bindings of _cpu.
#pragma once

#include "bindings/bind.h"

namespace qirl {

// Throws ValueError naming the first row whose coefficient is not finite.
void require_finite(const char* op, const char* name, const float* values_B, int64_t rows);

void bind_flow_step(py::module_& m);
void bind_flow_logp(py::module_& m);
void bind_group_advantage(py::module_& m);
void bind_guide(py::module_& m);
void bind_policy_loss(py::module_& m);

}  // namespace qirl
