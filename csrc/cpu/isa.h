// The instruction sets a CPU kernel is compiled for, worst to best, and which one runs.
#pragma once

#include <stdint.h>

namespace qirl {

struct Isa {
  const char* name;
  bool (*supported)();
};

#if defined(QIRL_X86)
inline constexpr int kIsaCount = 3;
#else
inline constexpr int kIsaCount = 1;
#endif
extern const Isa kIsaTable[kIsaCount];

// Index into kIsaTable: the best supported one, or the forced one.
int active_isa();

// Forces one by name; null goes back to the best. False, and nothing changed, when the name is
// unknown or this CPU lacks it.
bool force_isa(const char* name);

// A kernel works on tasks [begin, end) and returns the name of the instruction set it was compiled
// for. `args` points to the op's argument struct.
using Kernel = const char* (*)(const void* args, int64_t begin, int64_t end);

// Runs `table[active_isa()]` over [0, tasks), split over at most `threads` threads with at least
// `grain` tasks each. What a task writes must not depend on the split.
void run_kernel(const Kernel (&table)[kIsaCount], const void* args, int64_t tasks, int64_t grain,
                int threads);

// Name returned by the kernel that ran last; "" before the first.
const char* last_isa();

}  // namespace qirl

// Declares the op's kernel in each instruction set's namespace and the table `<op>_kernels`.
#if defined(QIRL_X86)
#define QIRL_CPU_KERNEL(op)                                                           \
  namespace qirl {                                                                    \
  namespace base {                                                                    \
  const char* op(const void*, int64_t, int64_t);                                      \
  }                                                                                   \
  namespace avx2 {                                                                    \
  const char* op(const void*, int64_t, int64_t);                                      \
  }                                                                                   \
  namespace avx512 {                                                                  \
  const char* op(const void*, int64_t, int64_t);                                      \
  }                                                                                   \
  inline constexpr Kernel op##_kernels[kIsaCount] = {base::op, avx2::op, avx512::op}; \
  }
#else
#define QIRL_CPU_KERNEL(op)                                     \
  namespace qirl {                                              \
  namespace base {                                              \
  const char* op(const void*, int64_t, int64_t);                \
  }                                                             \
  inline constexpr Kernel op##_kernels[kIsaCount] = {base::op}; \
  }
#endif
