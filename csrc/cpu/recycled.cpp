#include "cpu/recycled.h"

#include <stdlib.h>

#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qirl {
namespace {

constexpr size_t kHuge = size_t(2) << 20, kHugeFrom = size_t(4) << 20;

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kRecycle = false;  // a block of its own shows what is read behind its end
#else
constexpr bool kRecycle = true;
#endif

struct Kept {
  void* block;
  size_t size;
};

struct Waiting {
  std::mutex lock;
  std::vector<Kept> blocks;  // the oldest first
  size_t bytes = 0;

  void drop(size_t limit) {
    size_t gone = 0;
    for (; bytes > limit; ++gone) {
      bytes -= blocks[gone].size;
      free(blocks[gone].block);
    }
    blocks.erase(blocks.begin(), blocks.begin() + static_cast<ptrdiff_t>(gone));
  }
};

// Never destroyed: tensors may outlive the library's statics.
Waiting& waiting() {
  static Waiting* all = new Waiting;
  return *all;
}

// Sizes in steps of an eighth, so that outputs of nearly one size share blocks.
size_t rounded(size_t bytes) {
  if (!kRecycle) return (bytes + 63) / 64 * 64;
  size_t step = 4096;
  while (step * 16 <= bytes) step *= 2;
  if (bytes >= kHugeFrom && step < kHuge) step = kHuge;
  return (bytes + step - 1) / step * step;
}

void* fresh(size_t size) {
  void* block = aligned_alloc(kRecycle && size >= kHugeFrom ? kHuge : 64, size);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // A refusal changes nothing but the time.
  if (kRecycle && block != nullptr && size >= kHugeFrom) (void)madvise(block, size, MADV_HUGEPAGE);
#endif
  return block;
}

}  // namespace

void* take_block(size_t bytes) {
  const size_t size = rounded(bytes);
  Waiting& all = waiting();
  {
    const std::lock_guard<std::mutex> held(all.lock);
    for (size_t i = all.blocks.size(); i-- > 0;) {
      if (all.blocks[i].size != size) continue;
      void* block = all.blocks[i].block;
      all.blocks.erase(all.blocks.begin() + static_cast<ptrdiff_t>(i));
      all.bytes -= size;
      return block;
    }
  }
  void* block = fresh(size);
  if (block != nullptr) return block;
  {
    const std::lock_guard<std::mutex> held(all.lock);
    all.drop(0);
  }
  return fresh(size);
}

void give_back_block(void* block, size_t bytes) {
  if (!kRecycle) return free(block);
  Waiting& all = waiting();
  const std::lock_guard<std::mutex> held(all.lock);
  all.blocks.push_back({block, rounded(bytes)});
  all.bytes += rounded(bytes);
  all.drop(kKeptBytes);
}

size_t kept_bytes() {
  Waiting& all = waiting();
  const std::lock_guard<std::mutex> held(all.lock);
  return all.bytes;
}

}  // namespace qirl
