#pragma once

/// The one word that lets a formula run on the host and on a CUDA device.
#if defined(__CUDACC__)
#define FUSEDSTEP_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FUSEDSTEP_HD inline __attribute__((always_inline))
#else
#define FUSEDSTEP_HD inline
#endif
