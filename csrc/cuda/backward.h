// Vector-Jacobian products of Sinkhorn's potentials, unrolled and implicit, over a grip (solver.h).
//
// The formulas are those of csrc/cpu/backward.h: one resident K serves the row and the column softmax
// of many steps, and dC is K times a sum of outer products that is formed when K is given up.
#pragma once

#include "solver.h"

namespace otdd::cuda {

template <class T>
struct Unroll {
  struct Row : HeldRow<T> {
    T a = 0, df = 0, da = 0;
  };
  struct Column {
    double gamma = -INFINITY;
    T b = 0, dg = 0, db = 0, v = 0, c = 0;
  };
};

template <class T, class Grip>
class Unrolled {
  using Row = typename Unroll<T>::Row;
  using Column = typename Unroll<T>::Column;

 public:
  OTDD_DEVICE Unrolled(const BackwardArgs<T>& args, Grip& grip, i64 problem)
      : A(args), G(grip), U(grip.template uniform<Uniform>()), problem_(problem) {}

  // `rows` (2 steps, grip.row_stride()) and `columns` (2 steps, grip.column_stride()) take the outer
  // products.
  OTDD_DEVICE void run(T* rows, T* columns) {
    start(rows, columns);
    const i64 length = A.N + A.M;
    bool apart = false;  // the step is wider than K's digits: K is made for each half of it
    int half = 2 * int(chip::read(A.n_iter + problem_));
    now_ = A.history + (problem_ * A.steps + half / 2) * length;
    for (;; --half) {
      const bool for_columns = half % 2 == 0;
      int made = 0;  // twice at most: potentials that are NaN are far from everything
      for (bool far = half == 0 || apart;;) {
        if (half > 0 && for_columns) far = far_columns(made > 0) && made < 2;
        if (half == 0 || (for_columns ? G.show(kV, far) : far)) {
          if (terms_ > 0 || (half == 0 && !written_)) flush();
          if (half == 0) break;
          move_base(for_columns && made > 0);
          G.show(kGamma, false);
          G.fill(false, true);
          ++made, far = false;
        } else {
          break;
        }
      }
      if (half == 0) break;
      if (for_columns) apart = made > 1, columns_half();
      else rows_half(), now_ -= length;
    }
    G.for_rows([&](Row& row, i64 i, bool counted) {
      if (counted) chip::write(A.da + problem_ * A.N + i, row.da);
    });
    G.for_columns([&](Column& column, i64 j, bool counted) {
      if (counted) chip::write(A.db + problem_ * A.M + j, column.db);
    });
  }

 private:
  // What all threads agree on; it has its place in shared memory.
  struct Uniform {
    double inv_eps, to_a, to_b;  // from a potential to its exponent: 1 / eps, 1 / (lambda eps)
    T eps, lambda_a, lambda_b;
    T *rows, *columns;  // of the outer products
  };

  const BackwardArgs<T>& A;
  Grip& G;
  Uniform& U;
  i64 problem_, terms_ = 0;
  const double* now_;     // the potentials after the step
  // Those that K is made at, and whether for the columns. They, too, are read again.
  const double* base_ = nullptr;
  bool base_of_columns_ = false;
  bool written_ = false;  // dC

  OTDD_DEVICE void start(T* rows, T* columns) {
    const double eps = A.eps.at(problem_, 0);
    const double lambda_a = Penalty(A.rho_a.at(problem_, 0), eps).lambda;
    const double lambda_b = Penalty(A.rho_b.at(problem_, 0), eps).lambda;
    G.begin(A, problem_, 1 / eps);
    if (G.leads()) {
      U.inv_eps = 1 / eps, U.to_a = 1 / (lambda_a * eps), U.to_b = 1 / (lambda_b * eps);
      U.eps = T(eps), U.lambda_a = T(lambda_a), U.lambda_b = T(lambda_b);
      U.rows = rows, U.columns = columns;
    }
    G.sync();
    G.for_rows([&](Row& row, i64 i, bool) {
      row = Row();
      row.a = A.a.at(problem_, i), row.df = A.df.at(problem_, i);
    });
    G.for_columns([&](Column& column, i64 j, bool) {
      column = Column();
      column.b = A.b.at(problem_, j);
      column.dg = column.b > 0 ? A.dg.at(problem_, j) : T(0);
    });
  }

  // What makes the columns sum to 1 (F, G) and what makes the rows (F_rows, G_before). They are read
  // again where they are needed: kept, they would take the registers of a quarter of K.
  OTDD_DEVICE double F(i64 i) const { return of_row(now_, true, i); }
  OTDD_DEVICE double F_rows(i64 i) const { return of_row(now_, false, i); }
  OTDD_DEVICE double G_columns(i64 j) const { return of_column(now_, true, j); }
  OTDD_DEVICE double G_before(i64 j) const { return of_column(now_, false, j); }
  OTDD_DEVICE double of_row(const double* step, bool for_columns, i64 i) const {
    return chip::read(step + i) * (for_columns ? U.inv_eps : U.to_a);
  }
  OTDD_DEVICE double of_column(const double* step, bool for_columns, i64 j) const {
    return chip::read(step + (for_columns ? A.N : -A.M) + j) * (for_columns ? U.to_b : U.inv_eps);
  }
  OTDD_DEVICE double row_base(i64 i) const { return of_row(base_, base_of_columns_, i); }
  OTDD_DEVICE double column_base(i64 j) const { return of_column(base_, base_of_columns_, j); }

  // v for the columns. Whether K, made at other potentials, lacks digits: for any of them or, if it was
  // just made for the rows, for the columns.
  OTDD_DEVICE bool far_columns(bool made) {
    bool far = false;
    G.for_rows([&](Row& row, i64 i, bool) {
      far |= is_far(row, i, F(i)) || (!made && is_far(row, i, F_rows(i)));
    });
    G.for_columns([&](Column& column, i64 j, bool counted) {
      far |= is_far(column, j, G_columns(j)) || (!made && is_far(column, j, G_before(j)));
      const T scale = beta(column, j, G_columns(j));
      column.v = column.b > 0 ? scale / column.b * (U.lambda_b * column.dg) : T(0);
      if (counted) chip::put(U.columns + terms_ * G.column_stride() + G.column_place(j), column.v);
    });
    return far;
  }

  OTDD_DEVICE bool is_far(const Row& row, i64 i, double F) const {
    return row.a > 0 && !(base_ && ::fabs(F - row_base(i)) <= backward_reach<T>());
  }
  OTDD_DEVICE bool is_far(const Column& column, i64 j, double G) const {
    return column.b > 0 && !(base_ && ::fabs(G - column_base(j)) <= backward_reach<T>());
  }

  // K_ij = b_j exp(F_i + G_j - C_ij / eps) for the columns or for the rows; where a weight is 0 it is 0.
  OTDD_DEVICE void move_base(bool for_columns) {
    base_ = now_, base_of_columns_ = for_columns;
    G.for_rows([&](Row& row, i64 i, bool) { row.shift = row.a > 0 ? -row_base(i) : INFINITY; });
    G.for_columns([&](Column& column, i64 j, bool) {
      column.gamma = column.b > 0 ? column_base(j) + ::log(double(column.b)) : -INFINITY;
    });
  }

  // exp(x - base)
  OTDD_DEVICE static T factor(double x, double base) {
    return T(chip::exp2_fast(T((x - base) * kLog2e)));
  }
  OTDD_DEVICE T alpha(const Row& row, i64 i, double F) const {
    return row.a > 0 ? factor(F, row_base(i)) : T(0);
  }
  // Before K is ever made it serves nobody.
  OTDD_DEVICE T beta(const Column& column, i64 j, double G) const {
    return column.b > 0 && base_ ? factor(G, column_base(j)) : T(0);
  }

  // dg <- l_b dg: df_i -= sum_j S_ij dg_j, da_i -= eps / a_i sum_j S_ij dg_j
  OTDD_DEVICE void columns_half() {
    G.products();
    G.for_rows([&](Row& row, i64 i, bool counted) {
      const T scale = alpha(row, i, F(i)), flow = row.a > 0 ? scale * row.r_new : T(0);
      row.df -= row.a * flow, row.da -= U.eps * flow;
      if (counted) chip::put(U.rows + terms_ * G.row_stride() + G.row_place(i), row.a * scale);
    });
    ++terms_;
  }

  // df <- l_a df: dg_j = -sum_i R_ij df_i, db_j -= eps / b_j sum_i R_ij df_i
  OTDD_DEVICE void rows_half() {
    G.for_rows([&](Row& row, i64 i, bool counted) {
      row.u_new = alpha(row, i, F_rows(i)) * (U.lambda_a * row.df), row.df = 0;
      if (counted) chip::put(U.rows + terms_ * G.row_stride() + G.row_place(i), row.u_new);
    });
    G.transposed(0, false);
    G.for_columns([&](Column& column, i64 j, bool counted) {
      const T scale = beta(column, j, G_before(j)), flow = column.b > 0 ? scale * column.c : T(0);
      column.dg = -flow;
      if (column.b > 0) column.db -= U.eps * flow / column.b;
      if (counted) chip::put(U.columns + terms_ * G.column_stride() + G.column_place(j), scale);
    });
    ++terms_;
  }

  OTDD_DEVICE void flush() {
    G.add_outer(U.rows, U.columns, terms_, A.dC + problem_ * A.N * A.M, written_);
    written_ = true, terms_ = 0;
  }
};

// The adjoint of the fixed point by conjugate gradients; see csrc/cpu/backward.h.
template <class T>
struct Conjugate {
  struct Row : HeldRow<T> {
    T a = 0, df = 0, over_r = 0;
  };
  struct Column {
    double gamma = -INFINITY;
    T b = 0, half = 0, over_half = 0, kernel = 0, x = 0, residual = 0, direction = 0, image = 0;
    T v = 0, c = 0;
  };
};

template <class T, class Grip>
class Implicit {
  using Row = typename Conjugate<T>::Row;
  using Column = typename Conjugate<T>::Column;

 public:
  OTDD_DEVICE Implicit(const BackwardArgs<T>& args, Grip& grip, i64 problem)
      : A(args), G(grip), problem_(problem) {}

  OTDD_DEVICE void run() {
    start();
    double rho = 0, goal = 0;
    i64 steps = 0;
    for (int stage = kSums; stage != kDone;) {
      // c = P' u with u = 1, df / r, P v / r, (df - P v) / r
      G.show(kV, false);
      G.products();
      G.for_rows([&](Row& row, i64, bool) {
        const T through = stage == kStep ? row.r_new : stage == kWrite ? row.df - row.r_new : row.df;
        row.u_new = stage == kSums ? T(1) : through * row.over_r;
      });
      G.transposed(0, false);
      if (stage == kSums) {
        take_sums();
        stage = kRight;
      } else if (stage == kWrite) {
        stage = kDone;
      } else {
        bool stop = false;
        if (stage == kRight) {
          G.for_columns([&](Column& c, i64 j, bool) {
            c.residual = ((c.b > 0 ? A.dg.at(problem_, j) : T(0)) - c.c) * c.over_half;
          });
          project();
          G.for_columns([&](Column& c, i64, bool) { c.direction = c.residual; });
          rho = total([](const Column& c) { return double(c.residual) * double(c.residual); });
          goal = rho * A.rtol * A.rtol;
        } else {
          stop = !step(rho);
        }
        const bool more = !stop && rho > goal && steps++ < 10 * A.M;
        G.for_columns([&](Column& c, i64, bool) { c.v = (more ? c.direction : c.x) * c.over_half; });
        stage = more ? kStep : kWrite;
      }
    }
    G.write_sums(A.dC + problem_ * A.N * A.M);
    G.for_rows([&](Row& row, i64 i, bool counted) {
      if (!counted) return;
      const T sent = row.over_r > 0 ? row.df - row.u_new / row.over_r : T(0);  // (P h)_i
      chip::write(A.da + problem_ * A.N + i, row.a > 0 ? -T(eps_) * sent / row.a : T(0));
    });
    G.for_columns([&](Column& c, i64 j, bool counted) {
      if (counted) chip::write(A.db + problem_ * A.M + j, c.b > 0 ? -T(eps_) * c.c / c.b : T(0));
    });
  }

 private:
  enum Stage { kSums, kRight, kStep, kWrite, kDone };

  const BackwardArgs<T>& A;
  Grip& G;
  i64 problem_;
  double eps_, lambda_a_, lambda_b_;

  OTDD_DEVICE void start() {
    eps_ = A.eps.at(problem_, 0);
    lambda_a_ = Penalty(A.rho_a.at(problem_, 0), eps_).lambda;
    lambda_b_ = Penalty(A.rho_b.at(problem_, 0), eps_).lambda;
    G.begin(A, problem_, 1 / eps_);
    G.for_rows([&](Row& row, i64 i, bool) {
      row = Row();
      row.a = A.a.at(problem_, i);
      const bool used = row.a > 0;
      row.df = used ? A.df.at(problem_, i) : T(0);
      row.shift = used ? -(A.f.at(problem_, i) / eps_ + ::log(double(row.a))) : INFINITY;
    });
    G.for_columns([&](Column& c, i64 j, bool) {
      c = Column();
      c.b = A.b.at(problem_, j);
      if (c.b > 0) c.gamma = A.g.at(problem_, j) / eps_ + ::log(double(c.b));
    });
    G.show(kGamma, false);
    G.fill(false, true);
    G.for_rows([&](Row& row, i64, bool) {
      row.over_r = row.r_new > 0 ? T(lambda_a_) / row.r_new : T(0);
    });
  }

  // The square roots of the columns' sums scale the system to a symmetric one.
  OTDD_DEVICE void take_sums() {
    G.for_columns([&](Column& c, i64, bool) {
      const T mass = c.c / T(lambda_b_);
      c.half = ::sqrt(mass), c.over_half = mass > 0 ? 1 / c.half : T(0);
    });
    const T norm = T(::sqrt(total([](const Column& c) { return double(c.half) * double(c.half); })));
    G.for_columns([&](Column& c, i64, bool) { c.kernel = c.half / norm; });
  }

  template <class X>
  OTDD_DEVICE double total(X x) {
    double s = 0;
    G.for_columns([&](Column& c, i64, bool counted) {
      if (counted) s += x(c);
    });
    return G.sum(s);
  }

  // If both marginals are met the constants are the system's kernel.
  OTDD_DEVICE void project() {
    if (lambda_a_ != 1 || lambda_b_ != 1) return;
    const T along = T(total([](const Column& c) { return double(c.residual) * double(c.kernel); }));
    G.for_columns([&](Column& c, i64, bool) { c.residual -= along * c.kernel; });
  }

  // One of conjugate gradients, with c = P' P v / r; false where only rounding is left.
  OTDD_DEVICE bool step(double& rho) {
    G.for_columns([&](Column& c, i64, bool) { c.image = c.direction - c.c * c.over_half; });
    const double squared = total([](const Column& c) { return double(c.direction) * double(c.direction); });
    const double curvature = total([](const Column& c) { return double(c.direction) * double(c.image); });
    if (!(curvature > A.rtol * squared)) return false;
    const T length = T(rho / curvature);
    G.for_columns([&](Column& c, i64, bool) {
      c.x += length * c.direction, c.residual -= length * c.image;
    });
    project();
    const double next = total([](const Column& c) { return double(c.residual) * double(c.residual); });
    G.for_columns([&](Column& c, i64, bool) { c.direction = c.residual + T(next / rho) * c.direction; });
    rho = next;
    return true;
  }
};

}  // namespace otdd::cuda
