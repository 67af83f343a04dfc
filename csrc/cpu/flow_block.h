// What the flow_step and flow_logp kernels share: storage types and the block a task works on.
#pragma once

#include "cpu/dtype.h"
#include "cpu/flow_step.h"
#include "cpu/vec.h"
#include "math/flow_step.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

// body(x, v) with null pointers of the storage types.
template <class Body>
QIRL_HD void with_storage_types(const FlowArgs& a, Body body) {
  auto with_v = [&](auto* x) {
    a.v_dtype == kFloat32 ? body(x, (const float*)nullptr) : body(x, (const bf16*)nullptr);
  };
  a.x_dtype == kFloat32 ? with_v((const float*)nullptr) : with_v((const bf16*)nullptr);
}

// One block of one row: `first` is its first element's index in the row.
template <class X, class V>
struct Block {
  const X* x;
  const V* v;
  const void* delta;
  int delta_dtype;
  int64_t row, first, size, out;  // out: index of its first element in contiguous outputs
  F a, c;

  QIRL_INLINE Block(const FlowArgs& args, int64_t task) {
    const int64_t per_row = (args.row_size + kFlowBlock - 1) / kFlowBlock;
    row = task / per_row;
    first = (task % per_row) * kFlowBlock;
    const int64_t left = args.row_size - first;
    size = left < kFlowBlock ? left : kFlowBlock;
    out = row * args.row_size + first;
    x = (const X*)args.x + row * args.x_stride + first;
    v = (const V*)args.v + row * args.v_stride + first;
    delta_dtype = args.delta_dtype;
    const int64_t delta_at = (row * args.delta_stride + first) * dtype_bytes(delta_dtype);
    delta = args.delta ? (const char*)args.delta + delta_at : nullptr;
    a = splat(args.a_B[row]);
    c = splat(args.c_B[row]);
  }

  // Mean of elements [i, i + n) of the block. The storage type of delta is looked up here, not
  // compiled in: the branch is always predicted, and it saves two thirds of the instantiations.
  QIRL_INLINE F mean(int64_t i, int n) const {
    F offset = {};
    if (delta) {
      offset = delta_dtype == kFloat32 ? load_n((const float*)delta + i, n)
                                       : load_n((const bf16*)delta + i, n);
    }
    return flow_mean(load_n(x + i, n), load_n(v + i, n), offset, a, c);
  }
};

template <class X, class V>
QIRL_HD Block<X, V> block_of(const FlowArgs& args, int64_t task, const X*, const V*) {
  return Block<X, V>(args, task);
}

}  // namespace
}  // namespace QIRL_ISA
}  // namespace qirl
