#include "bindings/cuda/ops.h"
#include "emulate/run.h"
#include "emulate/selftest.h"

namespace qirl::emulate {
namespace {

void run_selftest(const char* name, const Array& out) {
  cuda::check(name, selftest(name, as_pointer<float>(out)));
}

const Binding binding([](py::module_& m) {
  m.def("seed_order", &seed, "Seeds the order in which blocks and threads run from now on.");
  m.def("selftest", &run_selftest);
});

}  // namespace
}  // namespace qirl::emulate
