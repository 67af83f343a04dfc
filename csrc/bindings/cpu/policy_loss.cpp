#include "cpu/policy_loss.h"

#include "bindings/cpu/ops.h"

namespace qirl {
namespace {

void forward(const Whole& logp_B, const Whole& logp_old_B, const Whole& advantage_B,
             const Array& loss, const Array& ratio_B, const Array& clip_fraction,
             const Array& approx_kl, const Array& grad_B, double low, double high, bool is_double) {
  PolicyArgs a{};
  a.logp_B = as_pointer<void>(logp_B);
  a.logp_old_B = as_pointer<void>(logp_old_B);
  a.advantage_B = as_pointer<void>(advantage_B);
  a.loss = as_pointer<void>(loss);
  a.ratio_B = as_pointer<void>(ratio_B);
  a.clip_fraction = as_pointer<void>(clip_fraction);
  a.approx_kl = as_pointer<void>(approx_kl);
  a.grad_B = as_pointer<void>(grad_B);
  a.rows = logp_B.count;
  a.low = low;
  a.high = high;
  a.is_double = is_double;
  py::gil_scoped_release released;
  run_kernel(policy_loss_kernels, &a, 1, 1, 1);
}

const Binding binding([](py::module_& m) { m.def("policy_loss", &forward); });

}  // namespace

}  // namespace qirl
