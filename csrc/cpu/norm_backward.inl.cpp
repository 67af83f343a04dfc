// Backward of norm_modulate, gate_residual and the two in one pass.
#include "cpu/norm_rows.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

// Tokens taken together, so that rows and sums are loaded once for all of them. Sums add them in
// order, as one at a time would.
constexpr int kTogether = 4;

// Where one chunk's sums go; null: not wanted.
struct Sums {
  float *gate, *scale, *shift;
};

struct Moments {
  F mean, rstd, mean_g, mean_gx;
};

template <int kTokens, class T>
QIRL_HD void first_pass(const NormArgs& a, const float* factor, int64_t at, Sums sums, Moments* m) {
  const T *x = element<const T>(a.x, at), *dy = element<const T>(a.dy, at);
  using Sum = SumWays<1>;
  Sum g_sum[kTokens], gx_sum[kTokens];
  for_parts<Sum::kParts>(a.width, [&](int64_t i, int n, int part) {
    F scale = sums.scale ? load_n(sums.scale + i, n) : F{};
    F shift = sums.shift ? load_n(sums.shift + i, n) : F{};
    const F one_scale = load(factor + i);
#pragma GCC unroll 4
    for (int k = 0; k < kTokens; ++k) {
      const F d = load_n(dy + k * a.width + i, n);
      const F xhat = norm_hat(load_n(x + k * a.width + i, n), m[k].mean, m[k].rstd);
      const F g = d * one_scale;
      scale += d * xhat;
      shift += d;
      g_sum[k].add(part, g);
      gx_sum[k].add(part, g * xhat);
    }
    if (sums.scale) store_n(sums.scale + i, scale, n, false);
    if (sums.shift) store_n(sums.shift + i, shift, n, false);
  });
  const float width = (float)a.width;
  for (int k = 0; k < kTokens; ++k) {
    m[k].mean_g = splat(a.mean ? g_sum[k].total() / width : 0.0f);
    m[k].mean_gx = splat(gx_sum[k].total() / width);
  }
}

template <bool kGated, bool kNorm, int kTokens, class T, class V>
QIRL_HD void second_pass(const NormArgs& a, const float* f, const float* factor, int64_t at,
                         Sums sums, const Moments* m) {
  const T *x = element<const T>(a.x, at), *dy = element<const T>(a.dy, at),
          *dout = element<const T>(a.dout, at);
  const V* u = element<const V>(a.u, at);
  T* dx = element<T>(a.y, at);
  V* du = element<V>(a.out, at);
  const bool has_dout = a.dout != nullptr, want_du = a.out != nullptr;
  for_vectors(a.width, [&](int64_t i, int n) {
    F gate = kGated && sums.gate ? load_n(sums.gate + i, n) : F{};
#pragma GCC unroll 4
    for (int k = 0; k < kTokens; ++k) {
      const int64_t j = k * a.width + i;
      F d = {};
      if (kNorm) {
        const F xhat = norm_hat(load_n(x + j, n), m[k].mean, m[k].rstd);
        d = norm_dx(load_n(dy + j, n) * load(factor + i), xhat, m[k].mean_g, m[k].mean_gx,
                    m[k].rstd);
      }
      if (kGated && (!kNorm || has_dout)) {
        const F direct = load_n(dout + j, n);
        d = kNorm ? d + direct : direct;
      }
      if (kNorm) store_n(dx + j, round_as(dx, d), n, a.stream);
      if (kGated && want_du) {
        store_n(du + j, round_as(du, load(f + i) * d), n, a.stream);
      }
      if (kGated && sums.gate) gate += d * load_n(u + j, n);
    }
    if (kGated && sums.gate) store_n(sums.gate + i, gate, n, false);
  });
}

template <bool kGated, bool kNorm, int kTokens, class T, class V>
QIRL_HD void tokens(const NormArgs& a, const NormScratch& scratch, int64_t token, bool at_t0,
                    Sums sums) {
  Moments m[kTokens] = {};
  const float* factor = scratch.row(at_t0, kScale);
  if (kNorm) {
    for (int k = 0; k < kTokens; ++k) {
      m[k].mean = splat(a.mean ? a.mean[token + k] : 0.0f);
      m[k].rstd = splat(a.rstd[token + k]);
    }
    first_pass<kTokens, T>(a, factor, token * a.width, sums, m);
  }
  second_pass<kGated, kNorm, kTokens, T, V>(a, scratch.row(at_t0, kGate), factor, token * a.width,
                                            sums, m);
}

QIRL_HD float* cleared(float* partial, int64_t row, int64_t width) {
  if (partial == nullptr) return nullptr;
  memset(partial + row * width, 0, sizeof(float) * width);
  return partial + row * width;
}

template <bool kGated, bool kNorm, class T, class V>
void backward_chunks(const NormArgs& a, int64_t begin, int64_t end) {
  NormScratch scratch(a);
  for_chunks(a, begin, end, [&](int64_t sample, int64_t chunk, int64_t first, int64_t last) {
    scratch.prepare(a, sample);
    const int64_t row = sample * norm_chunks(a.tokens) + chunk, base = sample * a.tokens;
    Sums sums[2];
    for (int k = 0; k < 2; ++k) {
      sums[k].gate = cleared(a.partial[k][kGate], row, a.width);
      sums[k].scale = cleared(a.partial[k][kScale], row, a.width);
      sums[k].shift = cleared(a.partial[k][kShift], row, a.width);
    }
    int64_t t = first;
    while (t < last) {
      const bool at_t0 = token_at_t0(a, sample, t);
      int64_t alike = 1;
      while (alike < kTogether && t + alike < last && token_at_t0(a, sample, t + alike) == at_t0) {
        ++alike;
      }
      if (alike == kTogether) {
        tokens<kGated, kNorm, kTogether, T, V>(a, scratch, base + t, at_t0, sums[at_t0]);
        t += kTogether;
      } else {
        tokens<kGated, kNorm, 1, T, V>(a, scratch, base + t, at_t0, sums[at_t0]);
        t += 1;
      }
    }
  });
  if (a.stream) stream_fence();
}

template <bool kNorm>
const char* gated_backward(const void* args, int64_t begin, int64_t end) {
  const NormArgs& a = *(const NormArgs*)args;
  const bool wide_u = a.u_dtype == kFloat32;
  if (a.x_dtype == kFloat32) {
    wide_u ? backward_chunks<true, kNorm, float, float>(a, begin, end)
           : backward_chunks<true, kNorm, float, bf16>(a, begin, end);
  } else {
    wide_u ? backward_chunks<true, kNorm, bf16, float>(a, begin, end)
           : backward_chunks<true, kNorm, bf16, bf16>(a, begin, end);
  }
  return kIsaName;
}

}  // namespace

const char* norm_modulate_backward(const void* args, int64_t begin, int64_t end) {
  const NormArgs& a = *(const NormArgs*)args;
  a.x_dtype == kFloat32 ? backward_chunks<false, true, float, float>(a, begin, end)
                        : backward_chunks<false, true, bf16, bf16>(a, begin, end);
  return kIsaName;
}

const char* gate_residual_backward(const void* args, int64_t begin, int64_t end) {
  return gated_backward<false>(args, begin, end);
}

const char* gate_residual_norm_modulate_backward(const void* args, int64_t begin, int64_t end) {
  return gated_backward<true>(args, begin, end);
}

const char* norm_finish(const void* args, int64_t begin, int64_t end) {
  const NormFinishArgs& a = *(const NormFinishArgs*)args;
  const int64_t per_sample = (a.width + kNormColumns - 1) / kNormColumns;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / per_sample, start = task % per_sample * kNormColumns;
    const int64_t left = a.width - start, at = sample * a.chunks * a.width,
                  gate_at = sample * a.gate.stride;
    for_vectors(left < kNormColumns ? left : kNormColumns, [&](int64_t k, int n) {
      const int64_t i = start + k;
      F sum = load_n(a.partial + at + i, n);
      for (int64_t c = 1; c < a.chunks; ++c) sum += load_n(a.partial + at + c * a.width + i, n);
      if (a.gate.p) {
        const F gate = a.gate.dtype == kFloat32 ? load_n((const float*)a.gate.p + gate_at + i, n)
                                                : load_n((const bf16*)a.gate.p + gate_at + i, n);
        sum *= gate_tanh_slope(hyperbolic_tangent<Ops>(gate));
      }
      store_n(a.out + sample * a.width + i, sum, n, false);
    });
  }
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
