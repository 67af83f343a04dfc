// How a function shared by host, vector and device code is declared.
//
// Everything in csrc/math/ is internal and always inlined, so an object built for one instruction
// set never lends its copy to another. Formulas are templates over the number type T (float, double
// or a vector of floats) and use + - * / only: no fused multiply-add. Each of these rounds
// correctly on every target (built with -ffp-contract=off, -fmad=false), so results are the same
// bits.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define QIRL_INLINE __host__ __device__ __forceinline__
#else
#define QIRL_INLINE inline __attribute__((always_inline))
#endif
#define QIRL_HD static QIRL_INLINE
