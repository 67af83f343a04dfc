// policy_loss: forward and gradient in one pass. In double, in row order, as one task: a batch
// holds tens to thousands of numbers.
#include "cpu/policy_loss.h"

#include "cpu/vec.h"
#include "math/policy_loss.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

template <class T>
QIRL_HD void all_rows(const PolicyArgs& a) {
  const double rows = (double)a.rows;
  double loss = 0.0, squares = 0.0, outside = 0.0;
  for (int64_t i = 0; i < a.rows; ++i) {
    const double log_ratio = (double)((const T*)a.logp_B)[i] - (double)((const T*)a.logp_old_B)[i];
    const double ratio = __builtin_exp(log_ratio);
    const double advantage = (double)((const T*)a.advantage_B)[i];
    const PolicyTerm<double> term = policy_term(ratio, advantage, a.low, a.high);
    loss += term.loss;
    squares += log_ratio * log_ratio;
    outside += term.outside ? 1.0 : 0.0;
    ((T*)a.ratio_B)[i] = (T)ratio;
    ((T*)a.grad_B)[i] = (T)(term.grad / rows);
  }
  *(T*)a.loss = (T)(loss / rows);
  *(T*)a.clip_fraction = (T)(outside / rows);
  *(T*)a.approx_kl = (T)(0.5 * squares / rows);
}

}  // namespace

const char* policy_loss(const void* args, int64_t, int64_t) {
  const PolicyArgs& a = *(const PolicyArgs*)args;
  a.is_double ? all_rows<double>(a) : all_rows<float>(a);
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
