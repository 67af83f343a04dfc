#include "cpu/policy_loss.h"

#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"

namespace qirl {
namespace {

// Tensors of float32 or float64, alike. Returns the loss, the ratio of each row, the fraction that
// was clipped, the KL estimate, and the gradient of the loss.
py::tuple forward(const Whole& logp_B, const Whole& logp_old_B, const Whole& advantage_B,
                  double clip_low, double clip_high, int) {
  PolicyArgs a{};
  a.is_double = logp_B.item == sizeof(double);
  a.rows = logp_B.count;
  const auto row = [&] { return new_real_output({a.rows}, a.is_double); };
  const auto number = [&] { return new_real_output({}, a.is_double); };
  const Output loss = number(), ratio_B = row(), clip_fraction = number(), approx_kl = number();
  const Output grad_B = row();
  a.logp_B = logp_B.data;
  a.logp_old_B = logp_old_B.data;
  a.advantage_B = advantage_B.data;
  a.loss = loss.data;
  a.ratio_B = ratio_B.data;
  a.clip_fraction = clip_fraction.data;
  a.approx_kl = approx_kl.data;
  a.grad_B = grad_B.data;
  a.low = 1.0 - clip_low;
  a.high = 1.0 + clip_high;
  {
    py::gil_scoped_release released;
    run_kernel(policy_loss_kernels, &a, 1, 1, 1);
  }
  return py::make_tuple(loss.tensor, ratio_B.tensor, clip_fraction.tensor, approx_kl.tensor,
                        grad_B.tensor);
}

const Binding binding([](py::module_& m) { m.def("policy_loss", &forward); });

}  // namespace

}  // namespace qirl
