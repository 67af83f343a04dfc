// norm_modulate, gate_residual and the two in one pass.
#include "cpu/fp8_row.h"
#include "cpu/norm_rows.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

QIRL_HD float scalar_sqrt(float value) { return __builtin_sqrtf(value); }

// The token is read again for the squared deviations (LayerNorm only) and for the result: x itself,
// or the gated sum, which the first pass also writes to scratch. A y that is wanted in 8-bit floats
// too stays in scratch until it has them: what streamed stores write is not in the cache.
template <bool kGated, bool kNorm, bool kSplit, class T, class V>
QIRL_HD void forward_token(const NormArgs& a, const NormScratch<kSplit>& scratch, int64_t token,
                           bool at_t0) {
  const int64_t at = token * a.width;
  const T* x = element<const T>(a.x, at);
  const V* u = element<const V>(a.u, at);
  const float* f = scratch.row(at_t0, kGate);
  T* out = element<T>(a.out, at);
  T* kept = scratch.template token<T>();
  const T* again = kGated ? kept : x;
  const bool rms = a.mean == nullptr;
  using Sum = SumWays<4, kSplit>;
  Sum first, second;
  for_pairs<Sum::kPairs>(a.width, [&](int64_t i, int n, int pair) {
    Pair v = load_pair<kSplit>(x + i, n);
    if (kGated) {
      const Pair add = load_pair<kSplit>(u + i, n), by = scratch_pair(f + i);
      v = round_pair<kSplit>(out, both([&](int k) {
                               return gate_add(part_of(v, k), part_of(by, k), part_of(add, k));
                             }));
      store_pair<kSplit>(out + i, v, n, a.stream);
      if (kNorm) store_pair<kSplit>(kept + i, v, n, false);
      v = read_back<kSplit>(v);
    }
    if (kNorm) first.add(pair, rms ? Pair{v.a * v.a, v.b * v.b} : v);
  });
  if (!kNorm) return;
  const float mean = rms ? 0.0f : first.total() / (float)a.width;
  const F mean_v = splat(mean);
  if (!rms) {
    for_pairs<Sum::kPairs>(a.width, [&](int64_t i, int n, int pair) {
      const Pair v = load_pair<kSplit>(again + i, n);
      Pair centred = {v.a - mean_v, v.b - mean_v};
      if (n < kPairLanes) centred = first_of_pair(centred, n);
      second.add(pair, {centred.a * centred.a, centred.b * centred.b});
    });
    a.mean[token] = mean;
  }
  const float squares = rms ? first.total() : second.total();
  const float rstd = norm_rstd(squares, a.width, a.eps, scalar_sqrt);
  a.rstd[token] = rstd;
  const F rstd_v = splat(rstd);
  const float *factor = scratch.row(at_t0, kScale), *shift = scratch.row(at_t0, kShift);
  const bool quantize = a.fp8.q != nullptr, stream = a.stream && !quantize;
  T* y = quantize ? kept : element<T>(a.y, at);
  for_pairs<1>(a.width, [&](int64_t i, int n, int) {
    if (!kGated) prefetch_pair(x + a.width + i);  // the next token; two of them only get in the way
    const Pair v = load_pair<kSplit>(again + i, n);
    const Pair by = scratch_pair(factor + i), add = scratch_pair(shift + i);
    const Pair value = both([&](int k) {
      const F xhat = norm_hat(part_of(v, k), mean_v, rstd_v);
      return norm_modulated(xhat, part_of(by, k), part_of(add, k));
    });
    store_pair<kSplit>(y + i, round_pair<kSplit>(y, value), n, stream);
  });
  if (!quantize) return;
  store_quantized(kept, (T*)a.y, a.fp8, token, a.width, 0, a.width, a.stream);
}

template <bool kGated, bool kNorm>
struct Forward {
  template <class T, class V, bool kSplit>
  void of(const NormArgs& a, int64_t begin, int64_t end) const {
    NormScratch<kSplit> scratch(a);
    for_chunks(a, begin, end, [&](int64_t sample, int64_t, int64_t first, int64_t last) {
      scratch.prepare(a, sample);
      for (int64_t t = first; t < last; ++t) {
        forward_token<kGated, kNorm, kSplit, T, V>(a, scratch, sample * a.tokens + t,
                                                   token_at_t0(a, sample, t));
      }
    });
    if (a.stream) stream_fence();
  }
};

}  // namespace

const char* norm_modulate(const void* args, int64_t begin, int64_t end) {
  for_dtypes(*(const NormArgs*)args, Forward<false, true>(), begin, end);
  return kIsaName;
}

const char* gate_residual(const void* args, int64_t begin, int64_t end) {
  for_dtypes(*(const NormArgs*)args, Forward<true, false>(), begin, end);
  return kIsaName;
}

const char* gate_residual_norm_modulate(const void* args, int64_t begin, int64_t end) {
  for_dtypes(*(const NormArgs*)args, Forward<true, true>(), begin, end);
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
