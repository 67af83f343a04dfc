// A row in 8-bit floats: the scales of its spans and the codes.
#pragma once

#include "cpu/vec.h"
#include "math/fp8.h"
#include "math/fp8_out.h"

namespace qirl {
namespace QIRL_ISA {

constexpr uint32_t kInf = 0x7f800000u;

QIRL_HD U larger(U a, U b) { return a > b ? a : b; }
QIRL_HD U magnitude_bits(F x) { return (U)x & 0x7fffffffu; }
QIRL_HD U finite_or_zero(U bits) { return bits < kInf ? bits : U{}; }

QIRL_HD uint32_t largest_lane(U value) {
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = value[i] > most ? value[i] : most;
  return most;
}

// The larger of `most` and the magnitudes of the elements in whole vectors of x[at], at < size, of
// which `at` is moved past. Magnitudes compare as integers; a maximum has no order to keep.
QIRL_HD U larger_of_vectors(U most, const float* x, int64_t size, int64_t& at) {
  U other = {};
  for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
    most = larger(most, magnitude_bits(load(x + at)));
    other = larger(other, magnitude_bits(load(x + at + kLanes)));
  }
  return larger(most, other);
}

QIRL_HD U larger_of_vectors(U most, const bf16* x, int64_t size, int64_t& at) {
  typedef uint16_t Words __attribute__((vector_size(4 * kLanes)));
  Words all = {};
  for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
    Words words;
    memcpy(&words, x + at, sizeof words);
    words &= 0x7fff;
    all = all > words ? all : words;
  }
  return larger(most, larger((U)all << 16, (U)all & 0xffff0000u));
}

// Bits of the largest finite |x|; all_finite: whether there is no other.
template <class T>
QIRL_HD uint32_t largest_of(const T* x, int64_t size, bool& all_finite) {
  int64_t i = 0;
  U all = larger_of_vectors(U{}, x, size, i);
  for (; i < size; i += kLanes) {
    const int n = (int)(size - i < kLanes ? size - i : kLanes);
    all = larger(all, magnitude_bits(load_n(x + i, n)));
  }
  const uint32_t most = largest_lane(all);
  all_finite = most < kInf;
  if (all_finite) return most;
  U finite = {};
  for_vectors(size, [&](int64_t at, int n) {
    finite = larger(finite, finite_or_zero(magnitude_bits(load_n(x + at, n))));
  });
  return largest_lane(finite);
}

template <class Format>
QIRL_HD float scale_of(uint32_t amax_bits) {
  return fp8_scale<Format>(ScalarOps::from_bits(amax_bits));
}

// next: what is read after x, whose memory is asked for meanwhile; null: nothing.
template <class Format, bool kFinite = false, class T>
QIRL_HD void convert(const T* x, uint8_t* q, int64_t size, float scale, const T* next = nullptr) {
  const F inverse = splat(1.0f / scale);
  for_vectors(size, [&](int64_t i, int n) {
    if (next) __builtin_prefetch(next + i);
    store_bytes_n(q + i, fp8_bits<Ops, Format, kFinite>(load_n(x + i, n), inverse), n);
  });
}

// One scale for every `unit` elements. next: see convert().
template <class Format, class T>
QIRL_HD void quantize_row(const T* x, uint8_t* q, float* scale, int64_t width, int64_t unit,
                          const T* next = nullptr) {
  for (int64_t at = 0; at < width; at += unit, ++scale) {
    const int64_t size = width - at < unit ? width - at : unit;
    const T* then = next ? next + at : nullptr;
    bool finite;
    *scale = scale_of<Format>(largest_of(x + at, size, finite));
    finite ? convert<Format, true>(x + at, q + at, size, *scale, then)
           : convert<Format>(x + at, q + at, size, *scale, then);
  }
}

// Elements [start, start + size) of a row of y, ready in `x`, to y and to its 8-bit form; `start`
// is a multiple of the unit.
template <class T>
QIRL_HD void store_quantized(const T* x, T* y, const Fp8Out& fp8, int64_t row, int64_t width,
                             int64_t start, int64_t size, bool stream) {
  const int64_t at = row * width + start, units = (width + fp8.unit - 1) / fp8.unit;
  for_vectors(size, [&](int64_t i, int n) { store_n(y + at + i, load_n(x + i, n), n, stream); });
  quantize_row<E4m3fn>(x, fp8.q + at, fp8.scale + row * units + start / fp8.unit, size, fp8.unit);
}

}  // namespace QIRL_ISA
}  // namespace qirl
