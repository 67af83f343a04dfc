#include "cpu/nft_loss.h"

#include <algorithm>
#include <vector>

#include "bindings/cpu/rows.h"
#include "math/nft_loss.h"

namespace qirl {
namespace {

// Rows whose sums and gradient are taken together: as many as fit a last-level cache with all
// inputs, so that the gradient's pass does not go to memory again.
constexpr int64_t kGroupBytes = 8 << 20;

// v, v_old, v_ref, x_t, x0
using Inputs = std::tuple<Rows, Rows, Rows, Rows, Rows>;

void finish_row(const NftArgs& args, const NftOptions& options, const float* sums, float advantage,
                int64_t row, int64_t rows, NftRow& out) {
  const int64_t blocks = blocks_per_row(args.row_size);
  double total[kNftSums];
  for (int k = 0; k < kNftSums; ++k) total[k] = ordered_sum(sums + k, blocks, kNftSums);
  out = nft_row(total, args.row_size, rows, args.sigma_B[row], advantage, options);
}

// sigma, advantage: float32 [rows]. numbers: beta, adv_clip, ref_weight. Returns the loss, the
// metrics [4, rows] and, for `want_grad`, dv.
py::tuple nft_loss(const Inputs& inputs, const Whole& sigma, const Whole& advantage,
                   const std::tuple<double, double, double>& numbers, bool want_grad, int threads) {
  const Rows& v = std::get<0>(inputs);
  const int64_t rows = v.rows(), row_size = v.row_size();
  NftArgs args{};
  args.v = operand(v);
  args.v_old = operand(std::get<1>(inputs));
  args.v_ref = operand(std::get<2>(inputs));
  args.x_t = operand(std::get<3>(inputs));
  args.x0 = operand(std::get<4>(inputs));
  args.sigma_B = as_pointer<float>(sigma);
  const float* advantage_B = as_pointer<float>(advantage);
  require_finite("nft_loss", "sigma", args.sigma_B, rows);
  const NftOptions options{std::get<0>(numbers), std::get<1>(numbers), std::get<2>(numbers)};
  args.beta = options.beta;
  const Output loss = new_output({}, kFloat32), metrics = new_output({4, rows}, kFloat32);
  const Output dv = want_grad ? output_like(v, v.dtype()) : no_output(v.dtype());
  args.dv = dv.data;
  args.row_size = row_size;
  args.stream = want_grad && streams(dv, v, v.dtype());
  const int64_t blocks = blocks_per_row(row_size);
  const int64_t group = std::clamp<int64_t>(kGroupBytes / (row_size * 20), 1, rows);
  std::vector<float> sums(group * blocks * kNftSums);
  std::vector<NftRow> results(rows);
  args.sums = sums.data();
  args.rows = results.data();
  {
    py::gil_scoped_release released;
    double total = 0.0;
    for (int64_t first = 0; first < rows; first += group) {
      const int64_t count = std::min(group, rows - first);
      args.first_row = first;
      run_kernel(nft_loss_kernels, &args, count * blocks, kRowGrain, threads);
      for (int64_t row = first; row < first + count; ++row) {
        finish_row(args, options, &sums[(row - first) * blocks * kNftSums], advantage_B[row], row,
                   rows, results[row]);
        total += nft_term(results[row], options);
      }
      if (want_grad) {
        run_kernel(nft_loss_gradient_kernels, &args, count * blocks, kRowGrain, threads);
      }
    }
    *loss.as<float>() = (float)(total / (double)rows);
    float* out = metrics.as<float>();
    for (int64_t row = 0; row < rows; ++row) {
      out[row] = (float)results[row].policy;
      out[rows + row] = (float)results[row].better_mse;
      out[2 * rows + row] = (float)results[row].worse_mse;
      out[3 * rows + row] = (float)results[row].ref_mse;
    }
  }
  return py::make_tuple(loss.tensor, metrics.tensor, dv.tensor);
}

const Binding binding([](py::module_& m) { m.def("nft_loss", &nft_loss); });

}  // namespace

}  // namespace qirl
