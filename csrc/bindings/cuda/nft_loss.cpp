#include "cuda/nft_loss.h"

#include "bindings/cuda/ops.h"
#include "bindings/operand.h"

namespace qirl::cuda {
namespace {

// inputs: v, v_old, v_ref, x_t, x0. coefficients: sigma, advantage. numbers: beta, adv_clip,
// ref_weight. scratch: sums, slopes, terms. dv: absent when not wanted.
void run(const std::tuple<Rows, Rows, Rows, Rows, Rows>& inputs,
         const std::tuple<Whole, Whole>& coefficients,
         const std::tuple<double, double, double>& numbers,
         const std::tuple<Array, Array, Array>& scratch, const Array& loss, const Array& metrics,
         const Array& dv, uintptr_t stream) {
  NftArgs args{};
  args.v = operand(std::get<0>(inputs));
  args.v_old = operand(std::get<1>(inputs));
  args.v_ref = operand(std::get<2>(inputs));
  args.x_t = operand(std::get<3>(inputs));
  args.x0 = operand(std::get<4>(inputs));
  args.sigma_B = as_pointer<float>(std::get<0>(coefficients));
  args.advantage_B = as_pointer<float>(std::get<1>(coefficients));
  args.options = {std::get<0>(numbers), std::get<1>(numbers), std::get<2>(numbers)};
  args.sums = as_pointer<float>(std::get<0>(scratch));
  args.slopes_B = as_pointer<float>(std::get<1>(scratch));
  args.terms_B = as_pointer<double>(std::get<2>(scratch));
  args.loss = as_pointer<float>(loss);
  args.metrics = as_pointer<float>(metrics);
  args.dv = as_pointer(dv);
  args.rows = std::get<0>(inputs).rows();
  args.row_size = std::get<0>(inputs).row_size();
  check("nft_loss", nft_loss(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) { m.def("nft_loss", &run); });

}  // namespace

}  // namespace qirl::cuda
