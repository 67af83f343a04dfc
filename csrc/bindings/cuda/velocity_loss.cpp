#include "cuda/velocity_loss.h"

#include "bindings/cuda/ops.h"
#include "bindings/operand.h"

namespace qirl::cuda {
namespace {

// weight_B and dv may be absent. scratch: sums and terms.
void run(const Rows& v, const Rows& target, const Whole& weight_B,
         const std::tuple<Array, Array>& scratch, const Array& loss, const Array& mse_B,
         const Array& dv, uintptr_t stream) {
  VelocityArgs args{};
  args.v = operand(v);
  args.target = operand(target);
  args.weight_B = as_pointer<float>(weight_B);
  args.sums = as_pointer<float>(std::get<0>(scratch));
  args.terms_B = as_pointer<double>(std::get<1>(scratch));
  args.mse_B = as_pointer<float>(mse_B);
  args.loss = as_pointer<float>(loss);
  args.dv = as_pointer(dv);
  args.rows = v.rows();
  args.row_size = v.row_size();
  check("velocity_loss", velocity_loss(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) { m.def("velocity_loss", &run); });

}  // namespace

}  // namespace qirl::cuda
