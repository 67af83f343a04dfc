#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qirl {

void want_huge_pages(const void* out, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kFresh = 8 << 20;
  constexpr uintptr_t kPage = 2 << 20;
  if (out == nullptr || bytes < kFresh) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out) + bytes) / kPage * kPage;
  // A refusal changes nothing but the time.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)out;
  (void)bytes;
#endif
}

}  // namespace qirl
