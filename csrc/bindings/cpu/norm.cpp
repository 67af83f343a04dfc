#include "cpu/norm.h"

#include <string>

#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"
#include "bindings/norm.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

constexpr int64_t kChunk = 32;       // tokens of one sample that a task of the backward adds up
constexpr int64_t kChunkAlone = 64;  // tokens of a task that makes no sums

void run(const Kernel (&table)[kIsaCount], NormArgs& a, int out_dtype, int threads) {
  const int64_t count = a.samples * a.tokens, y_bytes = a.width * dtype_bytes(a.x_dtype);
  const int64_t out_bytes = a.width * dtype_bytes(out_dtype);
  a.stream = (a.y == nullptr || worth_streaming(a.y, y_bytes, count)) &&
             (a.out == nullptr || worth_streaming(a.out, out_bytes, count));
  const int64_t chunk = a.width * (a.tokens < a.chunk ? a.tokens : a.chunk);
  const int64_t grain = 1 + 16384 / chunk;
  py::gil_scoped_release released;
  run_kernel(table, &a, a.samples * norm_chunks(a), grain, threads);
}

// ---- forward ------------------------------------------------------------------------------------
// What a norm makes of x: y, the statistics of its tokens, y in fp8.
struct Normed {
  Output y, mean, rstd;
  Fp8Outputs fp8;

  Normed(const Array& x, bool rms, const std::string& quantize)
      : y(output_like(x, x.dtype())),
        mean(rms ? no_output(kFloat32) : new_output({x.size[0], x.size[1]}, kFloat32)),
        rstd(new_output({x.size[0], x.size[1]}, kFloat32)),
        fp8(sizes_of(x), quantize) {}

  void store_in(NormArgs& a, double eps) const {
    a.y = y.data;
    a.mean = mean.as<float>();
    a.rstd = rstd.as<float>();
    a.fp8 = fp8.out;
    a.eps = static_cast<float>(eps);
  }
};

py::tuple norm_modulate(const Whole& x, const Rows& scale, const Rows& shift, const Array& t0,
                        const Rows& scale_t0, const Rows& shift_t0, bool rms, double eps,
                        const std::string& quantize, int threads) {
  NormArgs a =
      norm_args(x, {Array{}, scale, shift}, {Array{}, scale_t0, shift_t0}, t0, kChunkAlone, false);
  norm_inputs(a, x, {});
  const Normed n(x, rms, quantize);
  n.store_in(a, eps);
  run(norm_modulate_kernels, a, a.x_dtype, threads);
  return py::make_tuple(n.y.tensor, n.mean.tensor, n.rstd.tensor, n.fp8.q.tensor,
                        n.fp8.scale.tensor);
}

py::object gate_residual(const Whole& residual, const Whole& u, const Rows& gate, const Array& t0,
                         const Rows& gate_t0, bool tanh, int threads) {
  NormArgs a = norm_args(residual, {gate}, {gate_t0}, t0, kChunkAlone, tanh);
  norm_inputs(a, residual, u);
  const Output out = output_like(residual, a.x_dtype);
  a.out = out.data;
  run(gate_residual_kernels, a, a.x_dtype, threads);
  return out.tensor;
}

py::tuple gate_residual_norm_modulate(const Whole& residual, const Whole& u, const Rows& gate,
                                      const Rows& scale, const Rows& shift, const Array& t0,
                                      const Rows& gate_t0, const Rows& scale_t0,
                                      const Rows& shift_t0, bool tanh, bool rms, double eps,
                                      const std::string& quantize, int threads) {
  NormArgs a = norm_args(residual, {gate, scale, shift}, {gate_t0, scale_t0, shift_t0}, t0,
                         kChunkAlone, tanh);
  norm_inputs(a, residual, u);
  const Output out = output_like(residual, a.x_dtype);
  a.out = out.data;
  const Normed n(residual, rms, quantize);
  n.store_in(a, eps);
  run(gate_residual_norm_modulate_kernels, a, a.x_dtype, threads);
  return py::make_tuple(n.y.tensor, out.tensor, n.mean.tensor, n.rstd.tensor, n.fp8.q.tensor,
                        n.fp8.scale.tensor);
}

// ---- backward -----------------------------------------------------------------------------------
// A gradient in the dtype of x, which the kernels take it in.
Whole in_dtype_of(const Array& x, const Whole& grad) {
  if (grad.data == nullptr || grad.code == x.dtype()) return grad;
  Whole cast;
  cast.copy = grad.tensor.attr("to")(x.tensor.attr("dtype"));
  static_cast<Array&>(cast) = look_at(cast.copy);
  return cast;
}

// The sums over tokens of the rows that are wanted, float32 [samples, width], and the memory of the
// chunks' own.
struct Sums {
  Output sum[2][kNormRows], partial[2][kNormRows];

  // wanted: gate, scale, shift. Points a.partial there; a.chunk follows from it.
  Sums(NormArgs& a, const bool (&wanted)[kNormRows]) {
    a.chunk = wanted[kGate] || wanted[kScale] || wanted[kShift] ? kChunk : kChunkAlone;
    for (int k = 0; k < (a.t0 == nullptr ? 1 : 2); ++k) {
      for (int r = 0; r < kNormRows; ++r) {
        if (!wanted[r]) continue;
        sum[k][r] = new_output({a.samples, a.width}, kFloat32);
        partial[k][r] = new_output({a.samples, norm_chunks(a), a.width}, kFloat32);
        a.partial[k][r] = partial[k][r].as<float>();
      }
    }
  }

  void finish(const NormArgs& a, int threads) const {
    float* out[2][kNormRows];
    for (int k = 0; k < 2; ++k) {
      for (int r = 0; r < kNormRows; ++r) out[k][r] = sum[k][r].as<float>();
    }
    py::gil_scoped_release released;
    for (const NormFinishArgs& f : norm_finish_args(a, out)) {
      const int64_t blocks = (f.width + kNormColumns - 1) / kNormColumns;
      run_kernel(norm_finish_kernels, &f, f.samples * blocks, 1 + 128 / f.chunks, threads);
    }
  }

  py::object operator()(int which, NormRowName row) const {
    const Output& made = sum[which][row];
    return made.tensor ? made.tensor : no_output(kFloat32).tensor;
  }
};

py::tuple norm_modulate_backward(const Whole& grad, const Whole& x, const Whole& mean,
                                 const Whole& rstd, const Rows& scale, const Array& t0,
                                 const Rows& scale_t0, bool, bool want_mod, bool has_shift,
                                 int threads) {
  const Whole dy = in_dtype_of(x, grad);
  NormArgs a = norm_args(x, {Array{}, scale}, {Array{}, scale_t0}, t0, 0, false);
  norm_inputs(a, x, {});
  norm_gradients(a, dy, {}, mean, rstd);
  const Output dx = output_like(x, a.x_dtype);
  a.y = dx.data;
  const Sums sums(a, {false, want_mod, want_mod && has_shift});
  run(norm_modulate_backward_kernels, a, a.u_dtype, threads);
  sums.finish(a, threads);
  return py::make_tuple(dx.tensor, sums(0, kScale), sums(0, kShift), sums(1, kScale),
                        sums(1, kShift));
}

py::tuple gate_residual_backward(const Whole& dout, const Whole& u, const Rows& gate,
                                 const Array& t0, const Rows& gate_t0, bool tanh, bool want_du,
                                 bool want_dgate, int threads) {
  NormArgs a = norm_args(dout, {gate}, {gate_t0}, t0, 0, tanh);
  norm_inputs(a, {}, u);
  norm_gradients(a, {}, dout, {}, {});
  const Output du = want_du ? output_like(u, a.u_dtype) : no_output(a.u_dtype);
  a.out = du.data;
  const Sums sums(a, {want_dgate, false, false});
  run(gate_residual_backward_kernels, a, a.u_dtype, threads);
  sums.finish(a, threads);
  return py::make_tuple(du.tensor, sums(0, kGate), sums(1, kGate));
}

py::tuple gate_residual_norm_modulate_backward(const Whole& grad_y, const Whole& grad_out,
                                               const Whole& out, const Whole& u, const Whole& mean,
                                               const Whole& rstd, const Rows& gate,
                                               const Rows& scale, const Array& t0,
                                               const Rows& gate_t0, const Rows& scale_t0, bool tanh,
                                               bool, bool want_du, bool want_gate, bool want_mod,
                                               bool has_shift, int threads) {
  const Whole dy = in_dtype_of(out, grad_y), dout = in_dtype_of(out, grad_out);
  NormArgs a = norm_args(out, {gate, scale}, {gate_t0, scale_t0}, t0, 0, tanh);
  norm_inputs(a, out, u);
  norm_gradients(a, dy, dout, mean, rstd);
  const Output dresidual = output_like(out, a.x_dtype);
  const Output du = want_du ? output_like(u, a.u_dtype) : no_output(a.u_dtype);
  a.y = dresidual.data;
  a.out = du.data;
  const Sums sums(a, {want_gate, want_mod, want_mod && has_shift});
  run(gate_residual_norm_modulate_backward_kernels, a, a.u_dtype, threads);
  sums.finish(a, threads);
  return py::make_tuple(dresidual.tensor, du.tensor, sums(0, kGate), sums(1, kGate),
                        sums(0, kScale), sums(0, kShift), sums(1, kScale), sums(1, kShift));
}

const Binding binding([](py::module_& m) {
  m.def("norm_modulate", &norm_modulate);
  m.def("norm_modulate_backward", &norm_modulate_backward);
  m.def("gate_residual", &gate_residual);
  m.def("gate_residual_backward", &gate_residual_backward);
  m.def("gate_residual_norm_modulate", &gate_residual_norm_modulate);
  m.def("gate_residual_norm_modulate_backward", &gate_residual_norm_modulate_backward);
});

}  // namespace

}  // namespace qirl
