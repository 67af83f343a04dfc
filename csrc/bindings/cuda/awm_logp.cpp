#include "cuda/awm_logp.h"

#include "bindings/cuda/ops.h"
#include "bindings/operand.h"

namespace qirl::cuda {
namespace {

using Inputs = std::tuple<Rows, Rows, Rows>;  // v, noise, x0

AwmArgs arguments(const Inputs& inputs) {
  AwmArgs args{};
  args.v = operand(std::get<0>(inputs));
  args.noise = operand(std::get<1>(inputs));
  args.x0 = operand(std::get<2>(inputs));
  args.rows = std::get<0>(inputs).rows();
  args.row_size = std::get<0>(inputs).row_size();
  return args;
}

// form: time_power, power, factor.
void forward(const Inputs& inputs, const Whole& time_B, const std::tuple<int, double, double>& form,
             const Array& sums, const Array& logp_B, const Array& slope_B, uintptr_t stream) {
  AwmArgs args = arguments(inputs);
  args.time_B = as_pointer<float>(time_B);
  args.form = {std::get<0>(form), std::get<1>(form), std::get<2>(form)};
  args.sums = as_pointer<float>(sums);
  args.logp_B = as_pointer<float>(logp_B);
  args.slope_out_B = as_pointer<float>(slope_B);
  check("awm_logp", awm_logp(args, as_pointer(stream)));
}

void backward(const Whole& grad_B, const Whole& slope_B, const Inputs& inputs, const Array& dv,
              uintptr_t stream) {
  AwmArgs args = arguments(inputs);
  args.grad_B = as_pointer<float>(grad_B);
  args.slope_B = as_pointer<float>(slope_B);
  args.dv = as_pointer(dv);
  check("awm_logp_backward", awm_logp_backward(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("awm_logp", &forward);
  m.def("awm_logp_backward", &backward);
});

}  // namespace

}  // namespace qirl::cuda
