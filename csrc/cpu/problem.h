// Arguments of the CPU kernels: raw addresses, sizes and strides in elements.
#pragma once

namespace otdd::cpu {

using i64 = long long;

enum Status : int { kOk = 0, kOutOfMemory = 1, kNotFinite = 2, kInterrupted = 3, kBadValue = 4 };

// Asked now and then by long calls, on the thread that made them, whether to give up; null: never.
extern bool (*interrupted)();

// A batch of vectors; `item` may be 0 (one value stands for all).
template <class T>
struct Vectors {
  const T* data;
  i64 batch, item;
};

// A batch of matrices whose rows are contiguous.
template <class T>
struct Matrices {
  const T* data;
  i64 batch, row;
};

// rho is the weight of a KL penalty on a marginal, inf if the marginal is to be met.
template <class T>
struct SinkhornArgs {
  i64 B, N, M;
  Matrices<T> C;
  Vectors<T> a, b;
  Vectors<double> eps, rho_a, rho_b;
  Vectors<T> g0;
  i64 max_iter;
  double tol;
  double schedule;  // ratio of eps from one level to the next, or 0
  bool accelerate;
  T *f, *g, *value, *cost, *marginal_error;  // contiguous
  i64* n_iter;
  double* history;  // (B, max_iter + 1, N + M), or null
  int threads;
};

// scale * a_i b_j exp((f_i + g_j - C_ij) / eps)
template <class T>
struct PlanArgs {
  i64 B, N, M;
  Matrices<T> C;
  Vectors<T> f, g, a, b;
  Vectors<double> eps;
  Vectors<T> scale;
  T* P;
  int threads;
};

template <class T>
struct BackwardArgs {
  i64 B, N, M, steps;  // history is (B, steps, N + M); unused by the implicit backward
  Matrices<T> C;
  Vectors<T> a, b;
  Vectors<double> eps, rho_a, rho_b;
  Vectors<T> f, g;        // implicit
  const double* history;  // unrolled
  const i64* n_iter;
  Vectors<T> df, dg;
  T *dC, *da, *db;  // contiguous
  double rtol;      // implicit: residual and curvature below which there is only rounding
  int threads;
};

enum Metric : int { kL1 = 0, kSqEuclidean = 1, kL2 = 2 };

template <class T>
struct CostArgs {
  i64 B, N, M, D;
  Matrices<T> x, y;
  int metric;
  T* C;
  int threads;
};

// dx_id = sum_j G_ij w(x_id - y_jd), dy_jd = -sum_i G_ij w(x_id - y_jd), w the sign (kL1) or twice
// the difference (kSqEuclidean); either of dx and dy may be null.
template <class T>
struct CostBackwardArgs {
  i64 B, N, M, D;
  Matrices<T> x, y;
  int metric;
  const T* G;
  i64 G_batch, G_row, G_col;
  T *dx, *dy;  // contiguous
  int threads;
};

// Labels of the points of both sides and the cost between labels, (K, L); cost.data null: no labels.
template <class T>
struct Labels {
  Vectors<i64> x, y;
  Matrices<T> cost;
  i64 K, L;
};

// Sinkhorn between point clouds, C_ij = c(x_i, y_j) + cost[label of x_i, label of y_j]; rho is inf where a marginal is met exactly.
template <class T>
struct PointsArgs {
  i64 B, N, M, D;
  Matrices<T> x, y;
  int metric;
  Labels<T> labels;
  Vectors<T> a, b;
  Vectors<double> eps, rho_a, rho_b;
  Vectors<T> g0;
  i64 max_iter;
  Vectors<double> tol;
  T *f, *g, *value, *cost, *marginal_error;  // contiguous
  i64* n_iter;
  int threads;
};

enum ProductMode : int { kValue = 0, kDifference = 1, kSign = 2 };

// out_i = sum_j P_ij (u_i + v_j + kappa C_ij) h(x_i, z_j), over c(x_i, y_j) if over_distance (0 where
// that is 0).
template <class T>
struct PlanProductArgs {
  i64 B, N, M, D, K;
  Matrices<T> x, y;
  int metric;
  Labels<T> labels;
  Vectors<T> f, g, a, b;
  Vectors<double> eps;
  Vectors<T> u, v;
  Vectors<double> kappa;
  Matrices<T> z;
  int mode;
  bool over_distance;
  T* out;  // contiguous
  int threads;
};

// The kernels of one instruction set and one number type.
template <class T>
struct Kernels {
  int (*sinkhorn)(const SinkhornArgs<T>&);
  int (*plan)(const PlanArgs<T>&);
  int (*unrolled)(const BackwardArgs<T>&);
  int (*implicit)(const BackwardArgs<T>&);
  int (*cost)(const CostArgs<T>&);
  int (*cost_backward)(const CostBackwardArgs<T>&);
  int (*points)(const PointsArgs<T>&);
  int (*plan_product)(const PlanProductArgs<T>&);
};

}  // namespace otdd::cpu
