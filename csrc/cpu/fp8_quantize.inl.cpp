// fp8_quantize: scales and codes of rows, of blocks of rows, of the whole, and of the transpose.
#include "cpu/fp8_quantize.h"

#include "cpu/dtype.h"
#include "cpu/fp8_row.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

template <class Format, class T>
QIRL_HD void quantize_rows(const Fp8Args& a, int64_t begin, int64_t end) {
  const int64_t units = (a.width + a.unit - 1) / a.unit;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)a.x + row * a.x_stride;
    uint8_t* q = a.q + row * a.width;
    if (a.whole) {
      convert<Format>(x, q, a.width, *a.scale);
    } else {
      quantize_row<Format>(x, q, a.scale + row * units, a.width, a.unit,
                           a.unit == a.width ? x + a.x_stride : nullptr);
    }
  }
}

// Rows [first, first + size) of `columns` columns: their scales, one a column, in scale[k].
template <class Format, class T>
QIRL_HD void column_scales(const T* x, int64_t stride, int64_t size, int columns, float* scale) {
  uint32_t most[kFp8Columns];
  for (int k = 0; k < columns; k += kLanes) {
    const int n = columns - k < kLanes ? columns - k : kLanes;
    U all = {};
    for (int64_t m = 0; m < size; ++m) {
      all = larger(all, finite_or_zero(magnitude_bits(load_n(x + m * stride + k, n))));
    }
    for (int i = 0; i < n; ++i) most[k + i] = all[i];
  }
  for (int k = 0; k < columns; ++k) scale[k] = scale_of<Format>(most[k]);
}

// A tile of kFp8Columns columns and as many rows is converted row by row, then written by columns.
template <class Format, class T>
QIRL_HD void convert_columns(const T* x, int64_t stride, int64_t size, int columns,
                             const float* scale, uint8_t* q, int64_t q_stride) {
  constexpr int kTile = kFp8Columns;
  uint8_t tile[kTile][kTile];
  float inverse[kTile] = {};
  for (int k = 0; k < columns; ++k) inverse[k] = 1.0f / scale[k];
  for (int64_t first = 0; first < size; first += kTile) {
    const int count = (int)(size - first < kTile ? size - first : kTile);
    for (int m = 0; m < count; ++m) {
      const T* row = x + (first + m) * stride;
      for (int k = 0; k < columns; k += kLanes) {
        const int n = columns - k < kLanes ? columns - k : kLanes;
        const U bits = fp8_bits<Ops, Format>(load_n(row + k, n), load(inverse + k));
        store_bytes_n(tile[m] + k, bits, n);
      }
    }
    for (int k = 0; k < columns; ++k) {
      for (int m = 0; m < count; ++m) q[k * q_stride + first + m] = tile[m][k];
    }
  }
}

template <class Format, class T>
QIRL_HD void quantize_columns(const Fp8Args& a, int64_t begin, int64_t end) {
  const int64_t units = (a.rows + a.unit - 1) / a.unit;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t k = task * kFp8Columns, left = a.width - k;
    const int columns = (int)(left < kFp8Columns ? left : kFp8Columns);
    for (int64_t u = 0; u < units; ++u) {
      const int64_t m = u * a.unit, size = a.rows - m < a.unit ? a.rows - m : a.unit;
      const T* x = (const T*)a.x + m * a.x_stride + k;
      float scale[kFp8Columns];
      if (!a.whole) column_scales<Format>(x, a.x_stride, size, columns, scale);
      for (int i = 0; i < columns; ++i) {
        a.whole ? scale[i] = a.scale[0] : a.scale[(k + i) * units + u] = scale[i];
      }
      convert_columns<Format>(x, a.x_stride, size, columns, scale, a.q + k * a.rows + m, a.rows);
    }
  }
}

template <class Format>
QIRL_HD void quantize_as(const Fp8Args& a, int64_t begin, int64_t end, bool transposed) {
  if (a.dtype == kFloat32) {
    transposed ? quantize_columns<Format, float>(a, begin, end)
               : quantize_rows<Format, float>(a, begin, end);
  } else {
    transposed ? quantize_columns<Format, bf16>(a, begin, end)
               : quantize_rows<Format, bf16>(a, begin, end);
  }
}

QIRL_HD const char* quantize(const void* args, int64_t begin, int64_t end, bool transposed) {
  const Fp8Args& a = *(const Fp8Args*)args;
  a.format == kE4m3fn ? quantize_as<E4m3fn>(a, begin, end, transposed)
                      : quantize_as<E5m2>(a, begin, end, transposed);
  return kIsaName;
}

}  // namespace

const char* fp8_amax(const void* args, int64_t begin, int64_t end) {
  const Fp8Args& a = *(const Fp8Args*)args;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * a.x_stride;
    bool finite;
    a.amax[row] = a.dtype == kFloat32 ? largest_of((const float*)a.x + at, a.width, finite)
                                      : largest_of((const bf16*)a.x + at, a.width, finite);
  }
  return kIsaName;
}

const char* fp8_quantize(const void* args, int64_t begin, int64_t end) {
  return quantize(args, begin, end, false);
}

const char* fp8_quantize_transposed(const void* args, int64_t begin, int64_t end) {
  return quantize(args, begin, end, true);
}

}  // namespace QIRL_ISA
}  // namespace qirl
