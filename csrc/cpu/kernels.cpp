// All CPU kernels; compiled once per instruction set, named by OTDD_ISA.
#include "backward.h"
#include "cost_backward.h"
#include "sinkhorn.h"

namespace otdd::cpu::OTDD_ISA {

template <class T>
int plan(const PlanArgs<T>& A) {
  const i64 between_looks = Patience::kWork / A.M + 1;
  Patience patience;
#pragma omp parallel for num_threads(A.threads) schedule(static) \
    if (A.threads > 1 && A.B * A.N * A.M > 16384)
  for (i64 k = 0; k < A.B * A.N; ++k) {
    if (k % between_looks == 0 ? patience.look() : patience.over()) continue;
    FlushDenormals guard;
    const i64 p = k / A.N, i = k % A.N;
    const double inv_eps = 1 / A.eps.data[p * A.eps.batch];
    const double f = A.f.data[p * A.f.batch + i * A.f.item];
    const T weight = A.a.data[p * A.a.batch + i * A.a.item] * A.scale.data[p * A.scale.batch];
    const bool used = A.a.data[p * A.a.batch + i * A.a.item] > 0;
    const T *c = A.C.data + p * A.C.batch + i * A.C.row, *g = A.g.data + p * A.g.batch;
    const T* b = A.b.data + p * A.b.batch;
    T* out = A.P + k * A.M;
    for (i64 j = 0; j < A.M; j += kWidth<T>) {
      const i64 count = least(kWidth<T>, A.M - j);
      alignas(kBytes) T x[kWidth<T>] = {}, w[kWidth<T>] = {};
      for (i64 l = 0; l < count; ++l) {
        x[l] = T((f + double(g[(j + l) * A.g.item]) - double(c[j + l])) * inv_eps);
        w[l] = b[(j + l) * A.b.item];
      }
      const Vec<T> zero{}, b_j = load(w);
      const Vec<T> P = exp<T>(load(x)) * b_j * weight;
      store_some(out + j, used ? (b_j > zero ? P : zero) : zero, count);
    }
  }
  return patience.over() ? kInterrupted : kOk;
}

template <class T>
int unrolled(const BackwardArgs<T>& args) {
  return backward<T, Unrolled<T>>(args, args.steps);
}

template <class T>
int implicit(const BackwardArgs<T>& args) {
  return backward<T, Implicit<T>>(args);
}

template <class T>
Kernels<T> table() {
  return {&sinkhorn<T>, &plan<T>, &unrolled<T>, &implicit<T>, &cost<T>, &cost_backward<T>};
}

Kernels<float> kernels_f32() { return table<float>(); }
Kernels<double> kernels_f64() { return table<double>(); }

}  // namespace otdd::cpu::OTDD_ISA
