// The op bindings of _cpu.
#pragma once

#include "bindings/bind.h"
#include "cpu/dtype.h"
#include "cpu/pages.h"

namespace qirl {

// Makes a large output ready to be written; returns whether its stores should bypass the caches.
inline bool stream_to(const void* out, int64_t row_bytes, int64_t rows) {
  want_huge_pages(out, rows * row_bytes);
  return worth_streaming(out, row_bytes, rows);
}

// Throws ValueError naming the first row whose coefficient is not finite.
void require_finite(const char* op, const char* name, const float* values_B, int64_t rows);

}  // namespace qirl
