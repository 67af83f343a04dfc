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
QIRL_HD void add_terms(const Sums& sums, int name, const Token* tokens, const Pair* terms,
                       int64_t i, int n) {
  const auto add = [&](float* to, int k, F sum) {
    const int left = n - k * kLanes, used = left < 0 ? 0 : left < kLanes ? left : kLanes;
    to += i + k * kLanes;
    store_n(to, load_n(to, used) + sum, used, false);
  };
  for (int k = 0; k < 2; ++k) {
    if (kMixed) {
      for (int set = 0; set < 2; ++set) {
        F sum = {};
        for (int t = 0; t < kTokens; ++t) {
          if (tokens[t].set == set) sum += part_of(terms[t], k);
        }
        add(sums.of[set][name], k, sum);
      }
      continue;
    }
    const auto term = [&](int t) { return part_of(terms[kTokens == 4 ? t : 0], k); };
    const F sum = kTokens == 4 ? (term(0) + term(1)) + (term(2) + term(3)) : term(0);
    add(sums.of[tokens[0].set][name], k, sum);
  }
}

template <int kTokens, bool kMixed, bool kSplit, class T>
QIRL_HD void first_pass(const NormArgs& a, int64_t at, const Sums& sums, Token* tokens) {
  const T *x = element<const T>(a.x, at), *dy = element<const T>(a.dy, at);
  const bool want_scale = sums.of[0][kScale], want_shift = sums.of[0][kShift];
  using Sum = SumWays<2, kSplit>;
  Sum g_sum[kTokens], gx_sum[kTokens];
  for_pairs<Sum::kPairs>(a.width, [&](int64_t i, int n, int pair) {
    Pair d[kTokens], along[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      d[t] = load_pair<kSplit>(dy + t * a.width + i, n);
      const Pair value = load_pair<kSplit>(x + t * a.width + i, n);
      const Pair by = scratch_pair(tokens[kMixed ? t : 0].factor + i);
      Pair g, gx;
      g = both([&](int k) { return part_of(d[t], k) * part_of(by, k); });
      const Pair xhat =
          both([&](int k) { return norm_hat(part_of(value, k), tokens[t].mean, tokens[t].rstd); });
      along[t] = both([&](int k) { return part_of(d[t], k) * part_of(xhat, k); });
      gx = both([&](int k) { return part_of(g, k) * part_of(xhat, k); });
      g_sum[t].add(pair, g);
      gx_sum[t].add(pair, gx);
    }
    if (want_scale) add_terms<kTokens, kMixed>(sums, kScale, tokens, along, i, n);
    if (want_shift) add_terms<kTokens, kMixed>(sums, kShift, tokens, d, i, n);
  });
  const float width = (float)a.width;
  for (int t = 0; t < kTokens; ++t) {
    tokens[t].mean_g = splat(a.mean ? g_sum[t].total() / width : 0.0f);
    tokens[t].mean_gx = splat(gx_sum[t].total() / width);
  }
}

template <bool kGated, bool kNorm, int kTokens, bool kMixed, bool kSplit, class T, class V>
QIRL_HD void second_pass(const NormArgs& a, int64_t at, const Sums& sums, const Token* tokens) {
  const T *x = element<const T>(a.x, at), *dy = element<const T>(a.dy, at);
  const T* dout = element<const T>(a.dout, at);
  const V* u = element<const V>(a.u, at);
  T* dx = element<T>(a.y, at);
  V* du = element<V>(a.out, at);
  const bool want_gate = kGated && sums.of[0][kGate];
  for_pairs<1>(a.width, [&](int64_t i, int n, int) {
    Pair terms[kTokens] = {};
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const Token &own = tokens[t], &rows = tokens[kMixed ? t : 0];
      const int64_t j = t * a.width + i;
      Pair d = {};
      if (kNorm) {
        const Pair value = load_pair<kSplit>(x + j, n), given = load_pair<kSplit>(dy + j, n);
        const Pair by = scratch_pair(rows.factor + i);
        d = both([&](int k) {
          const F xhat = norm_hat(part_of(value, k), own.mean, own.rstd);
          const F g = part_of(given, k) * part_of(by, k);
          return norm_dx(g, xhat, own.mean_g, own.mean_gx, own.rstd);
        });
      }
      if (kGated && (!kNorm || dout)) {
        const Pair direct = load_pair<kSplit>(dout + j, n);
        d = kNorm ? Pair{d.a + direct.a, d.b + direct.b} : direct;
      }
      if (kNorm) store_pair<kSplit>(dx + j, round_pair<kSplit>(dx, d), n, a.stream);
      if (kGated && du) {
        const Pair by = scratch_pair(rows.f + i);
        store_pair<kSplit>(du + j, round_pair<kSplit>(du, {by.a * d.a, by.b * d.b}), n, a.stream);
      }
      if (want_gate) {
        const Pair branch = load_pair<kSplit>(u + j, n);
        terms[t] = {d.a * branch.a, d.b * branch.b};
      }
    }
    if (want_gate) add_terms<kTokens, kMixed>(sums, kGate, tokens, terms, i, n);
  });
}

template <bool kGated, bool kNorm, int kTokens, bool kMixed, bool kSplit, class T, class V>
QIRL_HD void both_passes(const NormArgs& a, const NormScratch<kSplit>& scratch, int64_t sample,
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
  if (kNorm) first_pass<kTokens, kMixed, kSplit, T>(a, at * a.width, sums, tokens);
  second_pass<kGated, kNorm, kTokens, kMixed, kSplit, T, V>(a, at * a.width, sums, tokens);
}

QIRL_HD bool alike(const NormArgs& a, int64_t sample, int64_t first) {
  for (int k = 1; k < kTogether; ++k) {
    if (token_at_t0(a, sample, first + k) != token_at_t0(a, sample, first)) return false;
  }
  return true;
}

template <bool kGated, bool kNorm>
struct Backward {
  template <class T, class V, bool kSplit>
  void of(const NormArgs& a, int64_t begin, int64_t end) const {
    NormScratch<kSplit> scratch(a);
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
          both_passes<kGated, kNorm, kTogether, false, kSplit, T, V>(a, scratch, sample, t, sums);
        } else {
          both_passes<kGated, kNorm, kTogether, true, kSplit, T, V>(a, scratch, sample, t, sums);
        }
      }
      for (; t < last; ++t) {
        both_passes<kGated, kNorm, 1, false, kSplit, T, V>(a, scratch, sample, t, sums);
      }
      for (int set = 0; set < 2; ++set) {
        for (int name = 0; name < kNormRows; ++name) {
          in_row_order<kSplit>(sums.of[set][name], a.width);
        }
      }
    });
    if (a.stream) stream_fence();
  }
};

}  // namespace

const char* norm_modulate_backward(const void* args, int64_t begin, int64_t end) {
  for_dtypes(*(const NormArgs*)args, Backward<false, true>(), begin, end);
  return kIsaName;
}

const char* gate_residual_backward(const void* args, int64_t begin, int64_t end) {
  for_dtypes(*(const NormArgs*)args, Backward<true, false>(), begin, end);
  return kIsaName;
}

const char* gate_residual_norm_modulate_backward(const void* args, int64_t begin, int64_t end) {
  for_dtypes(*(const NormArgs*)args, Backward<true, true>(), begin, end);
  return kIsaName;
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
