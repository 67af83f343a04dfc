// What the losses share: a task is one block of one row; its sums have the order of math/rows.h.
#pragma once

#include "cpu/dtype.h"
#include "math/rows.h"
#include "cpu/vec.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

// One block of one row: `first` is its first element's index in the row.
struct RowBlock {
  int64_t row, first, size, out;  // out: index of its first element in contiguous outputs

  QIRL_INLINE RowBlock(int64_t row_size, int64_t task) {
    const int64_t per_row = blocks_per_row(row_size);
    row = task / per_row;
    first = (task % per_row) * kRowBlock;
    const int64_t left = row_size - first;
    size = left < kRowBlock ? left : kRowBlock;
    out = row * row_size + first;
  }

  template <class T>
  QIRL_INLINE const T* at(const Operand& x) const {
    return (const T*)x.data + row * x.stride + first;
  }
};

// An operand's part of a block. The storage type is looked up at each load, not compiled in: the
// branch is always predicted, and three operands would need eight instances of a kernel.
struct AnyBlock {
  const char* data;
  bool wide;

  QIRL_INLINE AnyBlock(const Operand& x, const RowBlock& block)
      : data((const char*)x.data + (block.row * x.stride + block.first) * dtype_bytes(x.dtype)),
        wide(x.dtype == kFloat32) {}

  QIRL_INLINE F load(int64_t i, int n) const {
    return wide ? load_n((const float*)data + i, n) : load_n((const bf16*)data + i, n);
  }
};

// body(tag) with a null pointer of the storage type.
template <class Body>
QIRL_HD void with_storage_type(int dtype, Body body) {
  dtype == kFloat32 ? body((float*)nullptr) : body((bf16*)nullptr);
}

template <int K>
struct BlockSums {
  Sum16 whole[K];

  // add(i, n, vector, part): part[k].add(vector, value of elements [i, i + n) of the block).
  template <class Add>
  QIRL_INLINE BlockSums(int64_t size, Add add) {
    for (int64_t start = 0; start < size; start += kRowPart) {
      Sum16 part[K];
      const int64_t left = size - start;
      for_vectors(left < kRowPart ? left : kRowPart,
                  [&](int64_t i, int n) { add(start + i, n, i / kLanes, part); });
      for (int k = 0; k < K; ++k) {
        for (int j = 0; j < Sum16::kParts; ++j) whole[k].lanes[j] += part[k].lanes[j];
      }
    }
  }

  QIRL_INLINE float total(int k) const { return whole[k].total(); }
};

QIRL_HD F absolute(F value) { return (F)((U)value & 0x7fffffffu); }

}  // namespace
}  // namespace QIRL_ISA
}  // namespace qirl
