#pragma once
#include "core/hd.hpp"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

/// One register of numbers, behind the names that formulas use for one number (core/hd.hpp).
///
/// Included by the kernel objects only, which are compiled once per instruction set. Everything is
/// in an anonymous namespace there: the linker must never be able to pick a function that was built
/// for AVX-512 for a caller that was not.
namespace fusedstep::cpu {
namespace {

/// `n` numbers of type `T` in one register.
template <class T, int n>
struct Simd;

/// Numbers that one load, one store and one arithmetic operation handle.
template <class V>
constexpr int width = 1;
template <class T, int n>
constexpr int width<Simd<T, n>> = n;

#if defined(__AVX2__)

template <>
struct Simd<float, 8> {
  __m256 reg;
  Simd() = default;
  FUSEDSTEP_HD Simd(__m256 r) : reg(r) {}
  FUSEDSTEP_HD explicit Simd(float x) : reg(_mm256_set1_ps(x)) {}
  FUSEDSTEP_HD static Simd load(const float* at) { return _mm256_loadu_ps(at); }
  FUSEDSTEP_HD void store(float* at) const { _mm256_storeu_ps(at, reg); }
};
FUSEDSTEP_HD __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
FUSEDSTEP_HD __m256 sqrt(__m256 x) { return _mm256_sqrt_ps(x); }
FUSEDSTEP_HD __m256 at_most(__m256 bound, __m256 x) { return _mm256_min_ps(bound, x); }
FUSEDSTEP_HD __m256 at_least(__m256 bound, __m256 x) { return _mm256_max_ps(bound, x); }

template <>
struct Simd<double, 4> {
  __m256d reg;
  Simd() = default;
  FUSEDSTEP_HD Simd(__m256d r) : reg(r) {}
  FUSEDSTEP_HD explicit Simd(double x) : reg(_mm256_set1_pd(x)) {}
  FUSEDSTEP_HD static Simd load(const double* at) { return _mm256_loadu_pd(at); }
  FUSEDSTEP_HD void store(double* at) const { _mm256_storeu_pd(at, reg); }
};
FUSEDSTEP_HD __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
FUSEDSTEP_HD __m256d sqrt(__m256d x) { return _mm256_sqrt_pd(x); }
FUSEDSTEP_HD __m256d at_most(__m256d bound, __m256d x) { return _mm256_min_pd(bound, x); }
FUSEDSTEP_HD __m256d at_least(__m256d bound, __m256d x) { return _mm256_max_pd(bound, x); }

#endif
#if defined(__AVX512F__)

template <>
struct Simd<float, 16> {
  __m512 reg;
  Simd() = default;
  FUSEDSTEP_HD Simd(__m512 r) : reg(r) {}
  FUSEDSTEP_HD explicit Simd(float x) : reg(_mm512_set1_ps(x)) {}
  FUSEDSTEP_HD static Simd load(const float* at) { return _mm512_loadu_ps(at); }
  FUSEDSTEP_HD void store(float* at) const { _mm512_storeu_ps(at, reg); }
};
FUSEDSTEP_HD __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
FUSEDSTEP_HD __m512 sqrt(__m512 x) { return _mm512_sqrt_ps(x); }
FUSEDSTEP_HD __m512 at_most(__m512 bound, __m512 x) { return _mm512_min_ps(bound, x); }
FUSEDSTEP_HD __m512 at_least(__m512 bound, __m512 x) { return _mm512_max_ps(bound, x); }

template <>
struct Simd<double, 8> {
  __m512d reg;
  Simd() = default;
  FUSEDSTEP_HD Simd(__m512d r) : reg(r) {}
  FUSEDSTEP_HD explicit Simd(double x) : reg(_mm512_set1_pd(x)) {}
  FUSEDSTEP_HD static Simd load(const double* at) { return _mm512_loadu_pd(at); }
  FUSEDSTEP_HD void store(double* at) const { _mm512_storeu_pd(at, reg); }
};
FUSEDSTEP_HD __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
FUSEDSTEP_HD __m512d sqrt(__m512d x) { return _mm512_sqrt_pd(x); }
FUSEDSTEP_HD __m512d at_most(__m512d bound, __m512d x) { return _mm512_min_pd(bound, x); }
FUSEDSTEP_HD __m512d at_least(__m512d bound, __m512d x) { return _mm512_max_pd(bound, x); }

#endif

// --- the same for all registers: compilers know + - * / on them -------------------------------

template <class T, int n>
FUSEDSTEP_HD Simd<T, n> operator+(Simd<T, n> a, Simd<T, n> b) {
  return a.reg + b.reg;
}
template <class T, int n>
FUSEDSTEP_HD Simd<T, n> operator-(Simd<T, n> a, Simd<T, n> b) {
  return a.reg - b.reg;
}
template <class T, int n>
FUSEDSTEP_HD Simd<T, n> operator-(Simd<T, n> a) {
  return -a.reg;
}
template <class T, int n>
FUSEDSTEP_HD Simd<T, n> operator*(Simd<T, n> a, Simd<T, n> b) {
  return a.reg * b.reg;
}
template <class T, int n>
FUSEDSTEP_HD Simd<T, n> operator/(Simd<T, n> a, Simd<T, n> b) {
  return a.reg / b.reg;
}
template <class T, int n>
FUSEDSTEP_HD Simd<T, n> fma(Simd<T, n> a, Simd<T, n> b, Simd<T, n> c) {
  return fma(a.reg, b.reg, c.reg);
}
template <class T, int n>
FUSEDSTEP_HD Simd<T, n> sqrt(Simd<T, n> x) {
  return sqrt(x.reg);
}
/// Of min and max the second operand comes out if one is NaN: so a bound goes first.
template <class T, int n>
FUSEDSTEP_HD Simd<T, n> larger(Simd<T, n> x, Simd<T, n> y) {
  return at_least(x.reg, y.reg);
}
template <class T, int n>
FUSEDSTEP_HD Simd<T, n> clamp(Simd<T, n> x, Simd<T, n> limit) {
  return at_least(-limit.reg, at_most(limit.reg, x.reg));
}

/// The widest register of this build; in the scalar build the number itself.
#if defined(__AVX512F__)
template <class T>
using Pack = Simd<T, 64 / sizeof(T)>;
#elif defined(__AVX2__)
template <class T>
using Pack = Simd<T, 32 / sizeof(T)>;
#else
template <class T>
using Pack = T;
#endif

}  // namespace
}  // namespace fusedstep::cpu
