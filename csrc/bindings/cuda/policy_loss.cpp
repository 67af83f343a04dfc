#include "cuda/policy_loss.h"

#include "bindings/cuda/ops.h"

namespace qirl::cuda {
namespace {

void run(const Whole& logp_B, const Whole& logp_old_B, const Whole& advantage_B, const Array& loss,
         const Array& ratio_B, const Array& clip_fraction, const Array& approx_kl,
         const Array& grad_B, double low, double high, bool is_double, uintptr_t stream) {
  PolicyArgs args{};
  args.logp_B = as_pointer(logp_B);
  args.logp_old_B = as_pointer(logp_old_B);
  args.advantage_B = as_pointer(advantage_B);
  args.loss = as_pointer(loss);
  args.ratio_B = as_pointer(ratio_B);
  args.clip_fraction = as_pointer(clip_fraction);
  args.approx_kl = as_pointer(approx_kl);
  args.grad_B = as_pointer(grad_B);
  args.rows = logp_B.count;
  args.low = low;
  args.high = high;
  args.is_double = is_double;
  check("policy_loss", policy_loss(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) { m.def("policy_loss", &run); });

}  // namespace

}  // namespace qirl::cuda
