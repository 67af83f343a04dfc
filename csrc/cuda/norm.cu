// norm_modulate, gate_residual and the two in one pass on the GPU, from the formulas of
// math/norm.h.
//
// A thread takes 8 neighbouring elements of a row, so a load is 128 bits of bfloat16; a block takes
// a row of one token and keeps it in registers from the load to the last store. In the backward
// pass a block walks over `chunk` tokens of one sample that read the same rows (those marked by t0
// have blocks of their own), so the sums for gate, scale and shift stay in registers; norm_finish
// adds the blocks' sums. Without a norm a row may be cut into several blocks.
#include "cuda/norm.h"

#include "cuda/fp8.cuh"
#include "cuda/launch.cuh"
#include "math/norm.h"

namespace qirl::cuda {
namespace {

constexpr int kN = 8, kMostThreads = 1024, kFewThreads = 384;
constexpr int64_t kFusedWidest = (int64_t)kFewThreads * kN;
static_assert(kNormWidest == (int64_t)kMostThreads * kN, "a row is one block");

// The columns of this thread.
struct Columns {
  int64_t start, left;  // `left` of the row begin at `start`; none where it is not positive
  __device__ __forceinline__ Columns(const NormArgs& a, int64_t block)
      : start((block * blockDim.x + threadIdx.x) * kN), left(a.width - start) {}
};

QIRL_DEVICE void load_row(const NormRow& row, int64_t sample, const Columns& c, float (&v)[kN]) {
  if (row.p == nullptr) {
#pragma unroll
    for (int i = 0; i < kN; ++i) v[i] = 0.0f;
  } else if (row.dtype == 0) {
    load_vec_n((const float*)row.p + sample * row.stride + c.start, c.left, v);
  } else {
    load_vec_n((const bf16*)row.p + sample * row.stride + c.start, c.left, v);
  }
}

// f of the residual: the gate or its tanh.
QIRL_DEVICE void load_gate(const NormArgs& a, int set, int64_t sample, const Columns& c,
                           float (&f)[kN]) {
  load_row(a.rows[set][kGate], sample, c, f);
  if (!a.tanh) return;
#pragma unroll
  for (int i = 0; i < kN; ++i) f[i] = hyperbolic_tangent<ScalarOps>(f[i]);
}

QIRL_DEVICE int set_of(const NormArgs& a, int64_t sample, int64_t token) {
  return a.t0 != nullptr && a.t0[sample * a.t0_sample + token * a.t0_token] != 0;
}

// This thread's part of a row of y, already rounded, in 8-bit floats.
QIRL_DEVICE void store_quantized(const Fp8Out& fp8, int64_t token, int64_t width, const Columns& c,
                                 const float (&y)[kN]) {
  constexpr int kLanes = kFp8Span / kN;
  const bool whole = fp8.unit == width;
  const uint32_t most = largest_of(y);
  const float scale = scale_of<E4m3fn>(whole ? row_max(most) : warp_max<kLanes>(most));
  const int64_t spans = whole ? 1 : (width + kFp8Span - 1) / kFp8Span;
  const bool first = whole ? threadIdx.x == 0 : threadIdx.x % kLanes == 0 && c.left > 0;
  if (first) fp8.scale[token * spans + (whole ? 0 : c.start / kFp8Span)] = scale;
  convert<E4m3fn>(fp8.q + token * width + c.start, c.left, y, 1.0f / scale);
}

// kFp8: y is wanted in 8-bit floats too; a kernel of its own, whose registers the others do
// without.
template <bool kGated, bool kNorm, bool kFp8, class T, class V, int kThreads>
__global__ void __launch_bounds__(kThreads) forward_kernel(NormArgs a, unsigned blocks) {
  const int64_t token = blockIdx.x / blocks, sample = token / a.tokens;
  const int set = set_of(a, sample, token - sample * a.tokens);
  const Columns c(a, blockIdx.x % blocks);
  const int64_t at = token * a.width + c.start;
  float x[kN];
  load_vec_n((const T*)a.x + at, c.left, x);
  if constexpr (kGated) {
    float u[kN], f[kN];
    load_vec_n((const V*)a.u + at, c.left, u);
    load_gate(a, set, sample, c, f);
#pragma unroll
    for (int i = 0; i < kN; ++i) x[i] = round_as<T>(gate_add(x[i], f[i], u[i]));
    store_vec_n((T*)a.out + at, c.left, x);
  }
  if constexpr (kNorm) {
    float mean = 0.0f, sum[1] = {0.0f};
    if (a.mean != nullptr) {
#pragma unroll
      for (int i = 0; i < kN; ++i) sum[0] += x[i];
      row_sum(sum);
      mean = sum[0] / (float)a.width;
      sum[0] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float centred = i < c.left ? x[i] - mean : 0.0f;
      sum[0] += centred * centred;
    }
    row_sum(sum);
    const float rstd = norm_rstd(sum[0], a.width, a.eps, ScalarOps::square_root);
    if (threadIdx.x == 0) {
      a.rstd[token] = rstd;
      if (a.mean != nullptr) a.mean[token] = mean;
    }
    float scale[kN], shift[kN];
    load_row(a.rows[set][kScale], sample, c, scale);
    load_row(a.rows[set][kShift], sample, c, shift);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      x[i] = norm_modulated(norm_hat(x[i], mean, rstd), 1.0f + scale[i], shift[i]);
    }
    store_vec_n((T*)a.y + at, c.left, x);
    if constexpr (kFp8) {
      round_row<T>(c.left, x);
      store_quantized(a.fp8, token, a.width, c, x);
    }
  }
}

// split: blockIdx.y says whose tokens a block takes, those of rows[0] or those at t0; without it
// a token takes whichever rows are its own, and no sums are wanted.
template <bool kGated, bool kNorm, class T, class V, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(NormArgs a, unsigned blocks, bool split) {
  const int64_t task = blockIdx.x / blocks, chunks = norm_chunks(a);
  const int64_t sample = task / chunks, first = (task - sample * chunks) * a.chunk;
  const int64_t last = first + a.chunk < a.tokens ? first + a.chunk : a.tokens;
  const Columns c(a, blockIdx.x % blocks);
  const int own = blockIdx.y;
  float* const* partial = a.partial[own];
  const bool want_gate = kGated && partial[kGate], want_du = kGated && a.out;
  const bool want_scale = kNorm && partial[kScale], want_shift = kNorm && partial[kShift];
  float dgate[kN] = {}, dscale[kN] = {}, dshift[kN] = {}, f[kN], scale[kN];
  if (split) {
    if (kGated) load_gate(a, own, sample, c, f);
    if (kNorm) load_row(a.rows[own][kScale], sample, c, scale);
  }
  for (int64_t t = first; t < last; ++t) {
    const int set = set_of(a, sample, t);
    if (split && set != own) continue;  // all threads alike
    if (!split) {
      if (kGated) load_gate(a, set, sample, c, f);
      if (kNorm) load_row(a.rows[set][kScale], sample, c, scale);
    }
    const int64_t token = sample * a.tokens + t, at = token * a.width + c.start;
    float d[kN];
    if constexpr (kNorm) {
      float x[kN], sum[2] = {0.0f, 0.0f};
      load_vec_n((const T*)a.dy + at, c.left, d);
      load_vec_n((const T*)a.x + at, c.left, x);
      const float mean = a.mean != nullptr ? a.mean[token] : 0.0f, rstd = a.rstd[token];
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        x[i] = norm_hat(x[i], mean, rstd);
        if (want_scale) dscale[i] += d[i] * x[i];
        if (want_shift) dshift[i] += d[i];
        d[i] *= 1.0f + scale[i];
        sum[0] += d[i];  // 0 behind the row's end, as dy is
        sum[1] += d[i] * x[i];
      }
      row_sum(sum);
      const float mean_g = a.mean != nullptr ? sum[0] / (float)a.width : 0.0f;
      const float mean_gx = sum[1] / (float)a.width;
#pragma unroll
      for (int i = 0; i < kN; ++i) d[i] = norm_dx(d[i], x[i], mean_g, mean_gx, rstd);
    }
    if (!kNorm || a.dout != nullptr) {
      float direct[kN];
      load_vec_n((const T*)a.dout + at, c.left, direct);
#pragma unroll
      for (int i = 0; i < kN; ++i) d[i] = kNorm ? d[i] + direct[i] : direct[i];
    }
    if (kNorm) store_vec_n((T*)a.y + at, c.left, d);
    if (want_gate) {
      float u[kN];
      load_vec_n((const V*)a.u + at, c.left, u);
#pragma unroll
      for (int i = 0; i < kN; ++i) dgate[i] += d[i] * u[i];
    }
    if (want_du) {
#pragma unroll
      for (int i = 0; i < kN; ++i) d[i] *= f[i];
      store_vec_n((V*)a.out + at, c.left, d);
    }
  }
  const int64_t sums = task * a.width + c.start;
  if (want_gate) store_vec_n(partial[kGate] + sums, c.left, dgate);
  if (want_scale) store_vec_n(partial[kScale] + sums, c.left, dscale);
  if (want_shift) store_vec_n(partial[kShift] + sums, c.left, dshift);
}

// ---- totals ------------------------------------------------------------------------------------

constexpr int kFinishColumns = 32, kFinishWays = 8;

struct FinishList {
  NormFinishArgs of[2 * kNormRows];
};

// A block takes 32 columns of one sample; way w adds chunks w, w + 8, ..., then the ways are added
// in turn, all with what the additions round off.
__global__ void __launch_bounds__(kFinishColumns* kFinishWays)
    finish_kernel(FinishList list, unsigned blocks) {
  __shared__ float sums[kFinishWays][kFinishColumns], losses[kFinishWays][kFinishColumns];
  const NormFinishArgs& a = list.of[blockIdx.y];
  const int64_t sample = blockIdx.x / blocks;
  const int lane = threadIdx.x % kFinishColumns, way = threadIdx.x / kFinishColumns;
  const int64_t column = (int64_t)(blockIdx.x % blocks) * kFinishColumns + lane;
  const bool inside = column < a.width;
  float sum = 0.0f, lost = 0.0f;
  for (int64_t k = way; inside && k < a.chunks; k += kFinishWays) {
    add_exactly(sum, lost, a.partial[(sample * a.chunks + k) * a.width + column]);
  }
  sums[way][lane] = sum;
  losses[way][lane] = lost;
  __syncthreads();
  if (way != 0 || !inside) return;
  for (int w = 1; w < kFinishWays; ++w) {
    add_exactly(sum, lost, sums[w][lane]);
    lost += losses[w][lane];
  }
  if (lost == lost) sum += lost;  // NaN: the sum is not finite
  if (a.gate.p != nullptr) {
    const int64_t at = sample * a.gate.stride + column;
    const float gate =
        a.gate.dtype == 0 ? ((const float*)a.gate.p)[at] : load((const bf16*)a.gate.p + at);
    sum *= gate_tanh_slope<ScalarOps>(gate);
  }
  a.out[sample * a.width + column] = sum;
}

// ---- launches ----------------------------------------------------------------------------------

// Threads of a block and blocks of a row.
struct Cut {
  int threads;
  int64_t blocks;
  Cut(int64_t width, bool norm) {
    const int64_t vectors = (width + kN - 1) / kN, whole = (vectors + 31) / 32 * 32;
    const int64_t most = norm ? kMostThreads : kFewThreads;
    threads = (int)(whole < most ? whole : most);
    blocks = (vectors + threads - 1) / threads;
  }
};

// launch(x, u) with the types that x and u are stored in; without u one stands for both.
template <bool kGated, class Launch>
int with_types(const NormArgs& a, Launch launch) {
  if constexpr (kGated) {
    return with_storage_types({a.x_dtype, a.u_dtype}, launch);
  } else {
    return with_storage_types({a.x_dtype}, [&](auto x) { return launch(x, x); });
  }
}

int launch_2d(void (*kernel)(NormArgs, unsigned, bool), const NormArgs& a, const Cut& cut,
              bool split, void* stream) {
  const int64_t grid = a.samples * norm_chunks(a) * cut.blocks;
  if (grid < 1 || grid > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const dim3 blocks((unsigned)grid, split && a.t0 != nullptr ? 2 : 1);
  return launch(kernel, blocks, dim3((unsigned)cut.threads), stream, a, (unsigned)cut.blocks,
                split);
}

template <bool kGated, bool kNorm, bool kFp8 = false>
int run_forward(const NormArgs& a, void* stream) {
  if constexpr (kNorm && !kFp8) {
    if (a.fp8.q != nullptr) return run_forward<kGated, kNorm, true>(a, stream);
  }
  const Cut cut(a.width, kNorm);
  if (kNorm && cut.blocks > 1) return cudaErrorInvalidValue;
  return with_types<kGated>(a, [&](auto x, auto u) {
    using T = typename decltype(x)::type;
    using V = typename decltype(u)::type;
    auto kernel = forward_kernel<kGated, kNorm, kFp8, T, V, kFewThreads>;
    if constexpr (kNorm) {
      if (cut.threads > kFewThreads) {
        kernel = forward_kernel<kGated, kNorm, kFp8, T, V, kMostThreads>;
      }
    }
    return launch(kernel, a.samples * a.tokens * cut.blocks, cut.threads, stream, a,
                  (unsigned)cut.blocks);
  });
}

template <bool kGated, bool kNorm>
int run_backward(const NormArgs& a, void* stream) {
  const Cut cut(a.width, kNorm);
  if (kNorm && cut.blocks > 1) return cudaErrorInvalidValue;
  bool split = false;
  for (float* sum : a.partial[0]) split = split || sum != nullptr;
  return with_types<kGated>(a, [&](auto x, auto u) {
    using T = typename decltype(x)::type;
    using V = typename decltype(u)::type;
    auto kernel = backward_kernel<kGated, kNorm, T, V, kFewThreads>;
    if constexpr (!kGated) {
      if (cut.threads > kFewThreads) kernel = backward_kernel<kGated, kNorm, T, V, kMostThreads>;
    }
    return launch_2d(kernel, a, cut, split, stream);
  });
}

// The fused backward of rows too wide for its registers: the norm with `dout` added, then the gate
// from dresidual as stored.
int run_backward_in_two(const NormArgs& a, void* stream) {
  NormArgs norm = a, gate = a;
  norm.partial[0][kGate] = norm.partial[1][kGate] = nullptr;
  const int error = run_backward<false, true>(norm, stream);
  if (error != 0 || (a.out == nullptr && a.partial[0][kGate] == nullptr)) return error;
  gate.dout = a.y;
  for (auto& sums : gate.partial) sums[kScale] = sums[kShift] = nullptr;
  return run_backward<true, false>(gate, stream);
}

}  // namespace

int norm_forward(const NormArgs& a, void* stream) {
  return a.u == nullptr   ? run_forward<false, true>(a, stream)
         : a.y == nullptr ? run_forward<true, false>(a, stream)
                          : run_forward<true, true>(a, stream);
}

int norm_backward(const NormArgs& a, void* stream) {
  if (a.u == nullptr) return run_backward<false, true>(a, stream);
  if (a.dy == nullptr) return run_backward<true, false>(a, stream);
  return a.width <= kFusedWidest ? run_backward<true, true>(a, stream)
                                 : run_backward_in_two(a, stream);
}

int norm_finish(const NormFinishArgs* sums, int count, void* stream) {
  FinishList list{};
  for (int k = 0; k < count; ++k) list.of[k] = sums[k];
  const int64_t blocks = (sums[0].width + kFinishColumns - 1) / kFinishColumns;
  const int64_t grid = sums[0].samples * blocks;
  if (grid < 1 || grid > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(finish_kernel, dim3((unsigned)grid, (unsigned)count),
                dim3(kFinishColumns * kFinishWays), stream, list, (unsigned)blocks);
}

}  // namespace qirl::cuda
