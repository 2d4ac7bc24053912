// What the solvers of every backend have in common: when numbers are still good enough to go on with.
//
// On the CPU all of it is in the namespace of the instruction set it is compiled for (see cpu/simd.h).
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define OTDD_HOST_DEVICE __host__ __device__ inline
#else
#define OTDD_HOST_DEVICE inline
#endif

#if defined(OTDD_ISA)
namespace otdd::cpu::OTDD_ISA {
#else
namespace otdd::cuda {
#endif

template <class T>
struct Digits;
template <>
struct Digits<float> {
  static constexpr double kFlush = 86.6;   // exp(-kFlush) is where entries become 0
  static constexpr double kAccuracy = 18;  // -log of what lost entries must not touch
};
template <>
struct Digits<double> {
  static constexpr double kFlush = 707.6;
  static constexpr double kAccuracy = 39;
};

// How far v and r may drift while a K is kept. Lost entries weigh at most exp(tau - flush) against a
// row's exp(-tau) and a column's b exp(-tau).
template <class T>
struct Bounds {
  double tau, low_mass;  // low_mass: the least sum of a column of a fresh K
  bool can_stay;

  // Both marginals are met.
  OTDD_HOST_DEVICE static Bounds met(double M, double mass, double least_b) {
    const double reach = Digits<T>::kFlush - Digits<T>::kAccuracy - ::log(M);
    const double spread = ::log(least_b / mass), ceiling = sizeof(T) == 4 ? 28.0 : 300.0;
    Bounds b;
    b.tau = (reach + (spread < 0 ? spread : 0)) / 2;
    b.tau = b.tau < ceiling ? b.tau : ceiling;
    b.can_stay = b.tau > 3;
    b.low_mass = ::exp(2 * (b.can_stay ? b.tau : 3) + Digits<T>::kAccuracy - Digits<T>::kFlush) * mass;
    return b;
  }
  // A marginal with a penalty bounds no column's mass: the least that is let pass is set here.
  OTDD_HOST_DEVICE static Bounds penalised(double N, double M) {
    Bounds b;
    b.can_stay = true;
    b.tau = (Digits<T>::kFlush - Digits<T>::kAccuracy - ::log(M)) / 4;
    b.low_mass = ::exp(b.tau + Digits<T>::kAccuracy - Digits<T>::kFlush) * 2 * N;
    return b;
  }
};

// How far potentials may be from those that K was made at, in a backward pass.
template <class T>
OTDD_HOST_DEVICE double backward_reach() {
  return (Digits<T>::kFlush - Digits<T>::kAccuracy) / 6;
}

// The error to stop at, so that the result's, which is measured anew, meets tol.
template <class T>
OTDD_HOST_DEVICE double within(double tol, double mass) {
  const double rounding = (sizeof(T) == 4 ? 3e-7 : 3e-15) * mass;
  return tol > 4 * rounding ? tol - rounding : 0.75 * tol;
}

// The penalty rho KL(P 1 | a) of a marginal and what it does to a half-step: the potential becomes
// lambda times the one that meets the marginal. rho = inf means that it is to be met.
struct Penalty {
  double rho, lambda, rest;  // rest = 1 - lambda

  Penalty() = default;
  OTDD_HOST_DEVICE Penalty(double rho, double eps)
      : rho(rho), lambda(rho < INFINITY ? rho / (rho + eps) : 1), rest(eps / (rho + eps)) {}

  // rho (1 - exp(-f / rho)), which tends to f
  OTDD_HOST_DEVICE double worth(double f) const {
    return rho < INFINITY ? -rho * ::expm1(-f / rho) : f;
  }
};

}  // namespace
