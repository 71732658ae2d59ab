#pragma once
#include <math.h>

/// The one word that lets a formula run on the host and on a CUDA device. Always inlined: the CPU
/// kernels are compiled once per instruction set, and no shared copy of such a function may exist
/// that was built for a CPU which the program does not run on.
#if defined(__CUDACC__)
#define FUSEDSTEP_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FUSEDSTEP_HD inline __attribute__((always_inline))
#else
#define FUSEDSTEP_HD inline
#endif

/// In front of a loop that must stay one: unrolled, it would only take registers from others.
#if defined(__CUDA_ARCH__)
#define FUSEDSTEP_LOOP _Pragma("unroll 1")
#else
#define FUSEDSTEP_LOOP
#endif

/// What formulas call beside + - * /, for one number. A register of numbers brings the same names
/// (cpu/pack.hpp). Everything here is exactly rounded, in every build.
namespace fusedstep {

FUSEDSTEP_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FUSEDSTEP_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }

FUSEDSTEP_HD float sqrt(float x) { return ::sqrtf(x); }
FUSEDSTEP_HD double sqrt(double x) { return ::sqrt(x); }

/// The larger one; y if it is NaN.
FUSEDSTEP_HD float larger(float x, float y) { return x > y ? x : y; }
FUSEDSTEP_HD double larger(double x, double y) { return x > y ? x : y; }

/// x limited to [-limit, limit]. A select, not fmin and fmax: NaN stays NaN.
FUSEDSTEP_HD float clamp(float x, float limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}
FUSEDSTEP_HD double clamp(double x, double limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

}  // namespace fusedstep
