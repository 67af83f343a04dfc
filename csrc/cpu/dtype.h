// Storage types as the bindings pass them, and the size from which outputs bypass the caches.
#pragma once

#include <stdint.h>

namespace qirl {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1 };

inline int64_t dtype_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Streamed stores save the read of a line that is to be overwritten, but the consumer finds nothing
// in the cache: worth it only for outputs well beyond a core's share of the last level.
inline bool worth_streaming(const void* out, int64_t row_bytes, int64_t rows) {
  constexpr int64_t kLargeBytes = 8 << 20;
  return rows * row_bytes >= kLargeBytes && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

}  // namespace qirl
