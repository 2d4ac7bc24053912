// All CPU kernels; compiled once per instruction set, named by OTDD_ISA.
#include "backward.h"
#include "cost_backward.h"
#include "lanes.h"
#include "points.h"

namespace otdd::cpu::OTDD_ISA {

// out_k = x_k / eps + log w_k for one problem, -inf where the weight is 0 and up to a whole vector.
template <class T>
void logits(Vectors<T> x, Vectors<T> w, double inv_eps, i64 p, i64 count, double* out) {
  const i64 padded = round_up(count, kWidth<T>);
  for (i64 k = 0; k < padded; ++k) out[k] = k < count ? w.data[p * w.batch + k * w.item] : T(0);
  for (i64 k = 0; k < padded; k += kWidth<double>) {
    const VecD weight = load(out + k);
    store(out + k, weight > VecD{} ? log(weight) : VecD{} - INFINITY);
  }
  for (i64 k = 0; k < count; ++k) out[k] += x.data[p * x.batch + k * x.item] * inv_eps;
}

template <class T>
int plan(const PlanArgs<T>& A) {
  const i64 n = round_up(A.N, kWidth<T>), m = round_up(A.M, kWidth<T>);
  const i64 between_looks = Patience::kWork / A.M + 1;
  Scratch count;
  count.take<double>(n), count.take<double>(m);
  return each_problem(
      A, count.used(),
      [&](Scratch& scratch, Crew& crew, i64 p, Patience& patience) {
        double *f = scratch.take<double>(n), *g = scratch.take<double>(m);
        const double inv_eps = 1 / A.eps.data[p * A.eps.batch];
        logits(A.f, A.a, inv_eps, p, A.N, f), logits(A.g, A.b, inv_eps, p, A.M, g);
        const T scale = A.scale.data[p * A.scale.batch];
        const auto row = [&](i64 i) {
          if (i % between_looks == between_looks - 1 ? patience.look() : patience.over()) return;
          const T* c = A.C.data + p * A.C.batch + i * A.C.row;
          T* out = A.P + (p * A.N + i) * A.M;
          for_entries(c, A.M, m, g, inv_eps, -f[i], [&](i64 j, Vec<T> P) {
            store_some(out + j, f[i] > -INFINITY ? P * scale : Vec<T>{}, A.M - j);
          });
        };
        const i64 parts = least(A.N, 32);
        crew.for_parts(parts, [&](i64 part, int) {
          for (i64 i = A.N * part / parts; i < A.N * (part + 1) / parts; ++i) row(i);
        });
        return int(kOk);
      });
}

template <class T>
int unrolled(const BackwardArgs<T>& args) {
  return backward<T, Unrolled<T>>(args);
}

template <class T>
int implicit(const BackwardArgs<T>& args) {
  return backward<T, Implicit<T>>(args);
}

template <class T>
Kernels<T> table() {
  return {&sinkhorn<T>, &plan<T>,          &unrolled<T>, &implicit<T>,
          &cost<T>,     &cost_backward<T>, &points<T>,   &plan_product<T>};
}

Kernels<float> kernels_f32() { return table<float>(); }
Kernels<double> kernels_f64() { return table<double>(); }

}  // namespace otdd::cpu::OTDD_ISA
