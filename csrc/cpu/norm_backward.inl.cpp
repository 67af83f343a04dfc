// Backward of norm_modulate, gate_residual and the two in one pass.
#include "cpu/norm_rows.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

// Tokens taken together: rows and sums are loaded once for all of them, and adding the tokens up
// first keeps the sums accurate.
constexpr int kTogether = 4;

// Where one chunk's sums go, for the rows and for those at t0; null: not wanted.
struct Sums {
  float* of[2][kNormRows];
};

// One token: its moments, the rows it takes.
struct Token {
  const float *f, *factor;
  F mean, rstd, mean_g, mean_gx;
  int set;
};

// The terms of kTokens tokens, added to the chunk's sum; with kMixed they take different rows.
template <int kTokens, bool kMixed>
QIRL_HD void add_terms(const Sums& sums, int name, const Token* tokens, const F* terms, int64_t i,
                       int n) {
  if (kMixed) {
    for (int set = 0; set < 2; ++set) {
      F sum = {};
      for (int k = 0; k < kTokens; ++k) {
        if (tokens[k].set == set) sum += terms[k];
      }
      float* to = sums.of[set][name] + i;
      store_n(to, load_n(to, n) + sum, n, false);
    }
    return;
  }
  float* to = sums.of[tokens[0].set][name] + i;
  const F sum = kTokens == 4 ? (terms[0] + terms[1]) + (terms[2] + terms[3]) : terms[0];
  store_n(to, load_n(to, n) + sum, n, false);
}

template <int kTokens, bool kMixed, class T>
QIRL_HD void first_pass(const NormArgs& a, int64_t at, const Sums& sums, Token* tokens) {
  const T *x = element<const T>(a.x, at), *dy = element<const T>(a.dy, at);
  const bool want_scale = sums.of[0][kScale], want_shift = sums.of[0][kShift];
  using Sum = SumWays<1>;
  Sum g_sum[kTokens], gx_sum[kTokens];
  for_parts<Sum::kParts>(a.width, [&](int64_t i, int n, int part) {
    F d[kTokens], along[kTokens];
#pragma GCC unroll 4
    for (int k = 0; k < kTokens; ++k) {
      d[k] = load_n(dy + k * a.width + i, n);
      const F xhat = norm_hat(load_n(x + k * a.width + i, n), tokens[k].mean, tokens[k].rstd);
      const F g = d[k] * load(tokens[kMixed ? k : 0].factor + i);
      along[k] = d[k] * xhat;
      g_sum[k].add(part, g);
      gx_sum[k].add(part, g * xhat);
    }
    if (want_scale) add_terms<kTokens, kMixed>(sums, kScale, tokens, along, i, n);
    if (want_shift) add_terms<kTokens, kMixed>(sums, kShift, tokens, d, i, n);
  });
  const float width = (float)a.width;
  for (int k = 0; k < kTokens; ++k) {
    tokens[k].mean_g = splat(a.mean ? g_sum[k].total() / width : 0.0f);
    tokens[k].mean_gx = splat(gx_sum[k].total() / width);
  }
}

template <bool kGated, bool kNorm, int kTokens, bool kMixed, class T, class V>
QIRL_HD void second_pass(const NormArgs& a, int64_t at, const Sums& sums, const Token* tokens) {
  const T *x = element<const T>(a.x, at), *dy = element<const T>(a.dy, at);
  const T* dout = element<const T>(a.dout, at);
  const V* u = element<const V>(a.u, at);
  T* dx = element<T>(a.y, at);
  V* du = element<V>(a.out, at);
  const bool want_gate = kGated && sums.of[0][kGate];
  for_vectors(a.width, [&](int64_t i, int n) {
    F terms[kTokens] = {};
#pragma GCC unroll 4
    for (int k = 0; k < kTokens; ++k) {
      const Token &own = tokens[k], &rows = tokens[kMixed ? k : 0];
      const int64_t j = k * a.width + i;
      F d = {};
      if (kNorm) {
        const F xhat = norm_hat(load_n(x + j, n), own.mean, own.rstd);
        const F g = load_n(dy + j, n) * load(rows.factor + i);
        d = norm_dx(g, xhat, own.mean_g, own.mean_gx, own.rstd);
      }
      if (kGated && (!kNorm || dout)) {
        const F direct = load_n(dout + j, n);
        d = kNorm ? d + direct : direct;
      }
      if (kNorm) store_n(dx + j, round_as(dx, d), n, a.stream);
      if (kGated && du) store_n(du + j, round_as(du, load(rows.f + i) * d), n, a.stream);
      if (want_gate) terms[k] = d * load_n(u + j, n);
    }
    if (want_gate) add_terms<kTokens, kMixed>(sums, kGate, tokens, terms, i, n);
  });
}

template <bool kGated, bool kNorm, int kTokens, bool kMixed, class T, class V>
QIRL_HD void both_passes(const NormArgs& a, const NormScratch& scratch, int64_t sample,
                         int64_t first, const Sums& sums) {
  Token tokens[kTokens];
  const int64_t at = sample * a.tokens + first;
  for (int k = 0; k < kTokens; ++k) {
    Token& t = tokens[k];
    t = Token();
    t.set = token_at_t0(a, sample, first + k);
    t.f = scratch.row(t.set, kGate);
    t.factor = scratch.row(t.set, kScale);
    if (kNorm) {
      t.mean = splat(a.mean ? a.mean[at + k] : 0.0f);
      t.rstd = splat(a.rstd[at + k]);
    }
  }
  if (kNorm) first_pass<kTokens, kMixed, T>(a, at * a.width, sums, tokens);
  second_pass<kGated, kNorm, kTokens, kMixed, T, V>(a, at * a.width, sums, tokens);
}

QIRL_HD bool alike(const NormArgs& a, int64_t sample, int64_t first) {
  for (int k = 1; k < kTogether; ++k) {
    if (token_at_t0(a, sample, first + k) != token_at_t0(a, sample, first)) return false;
  }
  return true;
}

template <bool kGated, bool kNorm, class T, class V>
void backward_chunks(const NormArgs& a, int64_t begin, int64_t end) {
  NormScratch scratch(a);
  for_chunks(a, begin, end, [&](int64_t sample, int64_t chunk, int64_t first, int64_t last) {
    scratch.prepare(a, sample);
    const int64_t row = sample * norm_chunks(a) + chunk;
    Sums sums;
    for (int set = 0; set < 2; ++set) {
      for (int name = 0; name < kNormRows; ++name) {
        float* sum = element<float>(a.partial[set][name], row * a.width);
        if (sum) memset(sum, 0, sizeof(float) * a.width);
        sums.of[set][name] = sum;
      }
    }
    int64_t t = first;
    for (; t + kTogether <= last; t += kTogether) {
      if (a.t0 == nullptr || alike(a, sample, t)) {
        both_passes<kGated, kNorm, kTogether, false, T, V>(a, scratch, sample, t, sums);
      } else {
        both_passes<kGated, kNorm, kTogether, true, T, V>(a, scratch, sample, t, sums);
      }
    }
    for (; t < last; ++t) both_passes<kGated, kNorm, 1, false, T, V>(a, scratch, sample, t, sums);
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
      F sum = load_n(a.partial + at + i, n), lost = {};
      for (int64_t c = 1; c < a.chunks; ++c) {
        add_exactly(sum, lost, load_n(a.partial + at + c * a.width + i, n));
      }
      sum += select(lost == lost, lost, F{});  // NaN: the sum is not finite
      if (a.gate.p) {
        const F gate = a.gate.dtype == kFloat32 ? load_n((const float*)a.gate.p + gate_at + i, n)
                                                : load_n((const bf16*)a.gate.p + gate_at + i, n);
        sum *= gate_tanh_slope<Ops>(gate);
      }
      store_n(a.out + sample * a.width + i, sum, n, false);
    });
  }
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
