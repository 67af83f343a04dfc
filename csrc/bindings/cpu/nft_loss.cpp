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
using Inputs = std::tuple<Array, Array, Array, Array, Array>;

void finish_row(const NftArgs& args, const NftOptions& options, const float* sums, float advantage,
                int64_t row, int64_t rows, NftRow& out) {
  const int64_t blocks = blocks_per_row(args.row_size);
  double total[kNftSums];
  for (int k = 0; k < kNftSums; ++k) total[k] = ordered_sum(sums + k, blocks, kNftSums);
  out = nft_row(total, args.row_size, rows, args.sigma_B[row], advantage, options);
}

// coefficients: sigma and advantage, float32 [rows]. numbers: beta, adv_clip,
// ref_weight. metrics: [4, rows]. dv: absent when not wanted.
void nft_loss(const Inputs& inputs, const std::tuple<Array, Array>& coefficients,
              const std::tuple<double, double, double>& numbers, const Array& loss,
              const Array& metrics, const Array& dv, int threads) {
  const int64_t rows = std::get<0>(inputs).rows(), row_size = std::get<0>(inputs).row_size();
  NftArgs args{};
  args.v = operand(std::get<0>(inputs));
  args.v_old = operand(std::get<1>(inputs));
  args.v_ref = operand(std::get<2>(inputs));
  args.x_t = operand(std::get<3>(inputs));
  args.x0 = operand(std::get<4>(inputs));
  args.sigma_B = as_pointer<float>(std::get<0>(coefficients));
  const float* advantage_B = as_pointer<float>(std::get<1>(coefficients));
  require_finite("nft_loss", "sigma", args.sigma_B, rows);
  const NftOptions options{std::get<0>(numbers), std::get<1>(numbers), std::get<2>(numbers)};
  args.beta = options.beta;
  args.dv = as_pointer(dv);
  args.row_size = row_size;
  args.stream =
      args.dv != nullptr && worth_streaming(args.dv, row_size * dtype_bytes(args.v.dtype), rows);
  const int64_t blocks = blocks_per_row(row_size);
  const int64_t group = std::clamp<int64_t>(kGroupBytes / (row_size * 20), 1, rows);
  std::vector<float> sums(group * blocks * kNftSums);
  std::vector<NftRow> results(rows);
  args.sums = sums.data();
  args.rows = results.data();

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
    if (args.dv != nullptr) {
      run_kernel(nft_loss_gradient_kernels, &args, count * blocks, kRowGrain, threads);
    }
  }
  *as_pointer<float>(loss) = (float)(total / (double)rows);
  float* out = as_pointer<float>(metrics);
  for (int64_t row = 0; row < rows; ++row) {
    out[row] = (float)results[row].policy;
    out[rows + row] = (float)results[row].better_mse;
    out[2 * rows + row] = (float)results[row].worse_mse;
    out[3 * rows + row] = (float)results[row].ref_mse;
  }
}

const Binding binding([](py::module_& m) { m.def("nft_loss", &nft_loss); });

}  // namespace

}  // namespace qirl
