// Arguments of the CUDA kernels: device addresses, sizes and strides in elements.
#pragma once

#include "../numerics.h"
#include "chip.h"
#include "number.h"

namespace otdd::cuda {

enum Status : int { kOk = 0, kNoMemory = 1, kFailed = 5 };

// A batch of vectors; `item` may be 0 (one value stands for all), and without data `all` does.
template <class T>
struct Vectors {
  const T* data;
  i64 batch, item;
  T all;

  OTDD_DEVICE T at(i64 problem, i64 k) const {
    return data ? chip::read(data + problem * batch + k * item) : all;
  }
};

// A batch of matrices whose rows are contiguous.
template <class T>
struct Matrices {
  const T* data;
  i64 batch, row;

  OTDD_DEVICE const T* row_of(i64 problem, i64 i) const { return data + problem * batch + i * row; }
};

// What a solve and its derivative have in common. rho is inf if a marginal is to be met.
template <class T>
struct Problems {
  i64 B, N, M;
  Costs C;
  Vectors<T> a, b;
  Vectors<double> eps, rho_a, rho_b;
};

template <class T>
struct SinkhornArgs : Problems<T> {
  Vectors<T> g0;
  i64 max_iter;
  double tol;
  T *f, *g, *value, *cost, *marginal_error;  // contiguous
  i64* n_iter;
  double* history;  // (B, max_iter + 1, N + M), or null
};

// scale * a_i b_j exp((f_i + g_j - C_ij) / eps)
template <class T>
struct PlanArgs : Problems<T> {
  Vectors<T> f, g, scale;
  void* P;  // contiguous
  Number P_type;  // T or one of half its digits
};

template <class T>
struct BackwardArgs : Problems<T> {
  i64 steps;              // history is (B, steps, N + M); unused by the implicit backward
  Vectors<T> f, g;        // implicit
  const double* history;  // unrolled
  const i64* n_iter;
  Vectors<T> df, dg;
  T *dC, *da, *db;  // contiguous
  double rtol;      // implicit: residual and curvature below which there is only rounding
};

// C_ij = sum_d |x_id - y_jd|, or of their squares
template <class T>
struct CostArgs {
  i64 B, N, M, D;
  Matrices<T> x, y;
  T* C;  // contiguous
  bool squared = false;
};

// dx_id = sum_j G_ij sign(x_id - y_jd), dy_jd = -sum_i G_ij sign(x_id - y_jd)
template <class T>
struct CostBackwardArgs {
  i64 B, N, M, D;
  Matrices<T> x, y;
  const T* G;
  i64 G_batch, G_row, G_column;
  T *dx, *dy;  // contiguous; null where not wanted
};

// Transport between the rows of p = softmax(inv_tau student) and q, of the teacher, under L1 costs C and
// equal weights `each`.
template <class T>
struct LogitArgs {
  i64 B, N, D;  // problems, rows of each side, classes
  Costs student, teacher;
  double inv_tau, eps, each;
  i64 max_iter;
  T *p, *q, *C, *f, *g, *cost;  // contiguous
};

// Gradient of sum_b dcost_b cost_b with respect to the student's logits, the plan held fixed.
template <class T>
struct LogitBackwardArgs {
  i64 B, N, D;
  const T *p, *q, *C, *f, *g;  // of LogitArgs
  Vectors<T> dcost;
  double inv_tau, eps, each;
  void* dstudent;  // contiguous
  Number type;     // of dstudent: T or one of half its digits
};

// Transport of B classes from N moving points, with L points whose costs are given, to M others. eps of each
// class is lambda times the standard deviation of its costs between points with weight.
template <class T>
struct MoveArgs {
  i64 B, N, L, M, D;
  Matrices<T> x, y;  // null: C is given
  bool squared;      // C is of squared differences, not L1
  T* C;              // costs of the moving points; contiguous
  const T* given;    // costs of the others, contiguous
  Vectors<T> a, b;   // of N + L points, of M
  Vectors<T> g0;
  double lambda;
  i64 max_iter;
  T *f, *g, *eps;  // contiguous
  T* dx;           // signed sums of the plan, the gradient of <P, C> under L1 for P held fixed; or null
  T* plan;         // of the moving points; or null
  bool relative;   // the plan over the rows' weights, 0 where they are 0
};

}  // namespace otdd::cuda
