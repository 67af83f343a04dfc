// nft_loss: the sums of a row, and the gradient from what the row's sums give.
#include "cpu/nft_loss.h"

#include "cpu/row_block.h"
#include "math/nft_loss.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

// body(task, block, errors, away) for each task: errors(i, n) are e+ and e- of elements [i, i + n)
// and away(i, n) is v - v_ref, 0 without it.
template <class V, class Body>
QIRL_HD void all_blocks(const NftArgs& args, int64_t begin, int64_t end, const V*, Body body) {
  const int64_t first_task = args.first_row * blocks_per_row(args.row_size);
  for (int64_t task = begin; task < end; ++task) {
    const RowBlock block(args.row_size, first_task + task);
    const V* v = block.at<V>(args.v);
    const AnyBlock v_old(args.v_old, block), x_t(args.x_t, block), x0(args.x0, block);
    const AnyBlock v_ref(args.v_ref.data ? args.v_ref : args.v, block);
    const float s = args.sigma_B[block.row];
    const F sigma = splat(s), sigma_beta = splat((float)((double)s * args.beta));
    const bool has_ref = args.v_ref.data != nullptr;
    body(
        task, block,
        [&](int64_t i, int n) {
          return nft_errors(load_n(v + i, n), v_old.load(i, n), x_t.load(i, n), x0.load(i, n),
                            sigma, sigma_beta);
        },
        [&](int64_t i, int n) { return has_ref ? load_n(v + i, n) - v_ref.load(i, n) : F{}; });
  }
}

}  // namespace

const char* nft_loss(const void* arguments, int64_t begin, int64_t end) {
  const NftArgs& args = *(const NftArgs*)arguments;
  with_storage_type(args.v.dtype, [&](auto* v) {
    all_blocks(args, begin, end, v,
               [&](int64_t task, const RowBlock& block, auto errors, auto away) {
                 const auto add = [&](int64_t i, int n, int64_t vector, Sum16* part) {
                   const auto e = errors(i, n);
                   const F r = away(i, n);
                   part[0].add(vector, absolute(e.better));
                   part[1].add(vector, absolute(e.worse));
                   part[2].add(vector, e.better * e.better);
                   part[3].add(vector, e.worse * e.worse);
                   part[4].add(vector, r * r);
                 };
                 const BlockSums<kNftSums> sums(block.size, add);
                 for (int k = 0; k < kNftSums; ++k) {
                   args.sums[task * kNftSums + k] = sums.total(k);
                 }
               });
  });
  return kIsaName;
}

const char* nft_loss_gradient(const void* arguments, int64_t begin, int64_t end) {
  const NftArgs& args = *(const NftArgs*)arguments;
  with_storage_type(args.v.dtype, [&](auto* v) {
    all_blocks(args, begin, end, v, [&](int64_t, const RowBlock& block, auto errors, auto away) {
      const NftRow& row = args.rows[block.row];
      const F better = splat(row.better_slope), worse = splat(row.worse_slope);
      const F ref = splat(row.ref_slope);
      auto* dv = (decltype(v))args.dv + block.out;
      for_vectors(block.size, [&](int64_t i, int n) {
        const auto e = errors(i, n);
        const F g = nft_gradient(e, away(i, n), better, worse, ref);
        store_n(dv + i, round_as(dv, g), n, args.stream);
      });
    });
  });
  if (args.stream) stream_fence();
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
