// Sinkhorn's iteration on a resident matrix: exactly the log-domain one, mostly without an exp.
//
// The iteration is that of csrc/cpu/sinkhorn.h. How a matrix is held, and by which threads, is a
// `Grip` (warp.h, slab.h):
//
//   for_rows(fn(row, i, counted)), for_columns(fn(column, j, counted))
//                            a thread's own rows and columns; where several threads hold the same one,
//                            one of them has it `counted`
//   show(kGamma or kV, flag) makes the columns' values known to all; whether any thread has the flag
//   make()                   K_ij = exp(gamma_j - C_ij / eps - shift_i), shift the row's maximum; r_new its sums
//   make_at_shifts()         the same with the shifts that the rows have
//   plan_sums()              of that K, without making it: r_new its sums, cost those of K C
//   products()               r_new = K v
//   transposed(flag, error, wanted)  c = K' u_new; whether any thread has the flag, and if wanted the sum of
//                            the errors
//   column_lse()             lse_j = LSE_i(weight_i - C_ij / eps), weight in the row's `shift`
//   sum(x), least(x), most(x)  over all threads
//
// Every thread of a grip runs the same code and takes the same branches.
#pragma once

#include "problem.h"

namespace otdd::cuda {

constexpr double kLog2e = 1.442695040888963407, kLn2 = 0.693147180559945309417;

template <class T>
struct Row {
  double phi = 0, shift = 0, log_a = -INFINITY;
  T a = 0, r = 1, u = 0;   // as of the last whole iteration
  T r_new = 1, u_new = 0;  // of the one at hand
  T cost = 0;
};

template <class T>
struct Column {
  double gamma = -INFINITY, now = -INFINITY, lse = 0;  // gamma is K's own
  T b = 0, v = 1, c = 1;
};

enum Shown { kGamma, kV };

struct Seen {
  bool flag;
  double error;
};

// log(x) in double of a number whose own logarithm would lose digits.
OTDD_DEVICE double log_of(float x) {
  int exponent;
  float m = ::frexpf(x, &exponent);
  if (m < 0.70710678f) m *= 2, --exponent;
  return exponent * kLn2 + double(::log1pf(m - 1));
}
OTDD_DEVICE double log_of(double x) { return ::log(x); }

template <class T, class Grip>
class Solver {
 public:
  OTDD_DEVICE Solver(const SinkhornArgs<T>& args, Grip& grip, i64 problem)
      : A(args), G(grip), problem_(problem) {}

  OTDD_DEVICE void solve() {
    start();
    i64 done = 0;
    while (done < A.max_iter) {
      if (resident_ ? resident_step() : log_step(done)) break;
      if (redo_) continue;
      ++done;
      if (A.history) record(done);
    }
    finish(done);
  }

 private:
  const SinkhornArgs<T>& A;
  Grip& G;
  i64 problem_;
  double eps_, inv_eps_, tol_, mass_, scale_, log_scale_, top_u_ = 0;  // a and b are in units of scale
  Penalty rows_, columns_;
  Bounds<T> bounds_;
  T v_low_, v_high_, r_high_;
  bool met_, masked_columns_, resident_ = false, redo_ = false;

  OTDD_DEVICE void start() {
    eps_ = A.eps.at(problem_, 0), inv_eps_ = 1 / eps_;
    rows_ = Penalty(A.rho_a.at(problem_, 0), eps_), columns_ = Penalty(A.rho_b.at(problem_, 0), eps_);
    met_ = !(rows_.rho < INFINITY) && !(columns_.rho < INFINITY);
    G.begin(A, problem_, inv_eps_);
    double mass = 0;
    G.for_rows([&](Row<T>& row, i64 i, bool counted) {
      row = Row<T>();
      row.a = A.a.at(problem_, i);
      if (counted) mass += double(row.a);
    });
    mass = G.sum(mass);
    const int exponent = mass > 0 && mass < INFINITY ? ::ilogb(mass) : 0;
    scale_ = ::ldexp(1.0, exponent), log_scale_ = exponent * kLn2, mass_ = mass / scale_;
    const double unscale = 1 / scale_;
    G.for_rows([&](Row<T>& row, i64 i, bool counted) {
      row.a = T(double(row.a) * unscale);
      row.log_a = row.a > 0 ? ::log(double(row.a)) : -INFINITY;
      if (A.history && counted) chip::write(history(0) + i, 0.0);
    });
    double least_b = INFINITY, masked = 0;
    G.for_columns([&](Column<T>& column, i64 j, bool counted) {
      column = Column<T>();
      column.b = T(double(A.b.at(problem_, j)) * unscale);
      const double g = A.g0.at(problem_, j);
      if (column.b > 0) least_b = ::fmin(least_b, double(column.b));
      else masked = 1;
      column.gamma = column.now = log_b(column) + g * inv_eps_;
      if (A.history && counted) chip::write(history(0) + A.N + j, g);
    });
    least_b = G.least(least_b), masked_columns_ = G.most(masked) > 0;
    bounds_ = met_ ? Bounds<T>::met(double(A.M), mass_, least_b)
                   : Bounds<T>::penalised(double(A.N), double(A.M));
    v_low_ = T(::exp(-bounds_.tau)), v_high_ = T(::exp(bounds_.tau)), r_high_ = v_high_ * T(A.M);
    tol_ = within<T>(A.tol, mass);
  }

  OTDD_DEVICE double* history(i64 done) const {
    return A.history + (problem_ * (A.max_iter + 1) + done) * (A.N + A.M);
  }

  OTDD_DEVICE double log_b(const Column<T>& column) const {
    return column.b > 0 ? ::log(double(column.b)) + log_scale_ : -INFINITY;
  }

  // One iteration on the resident K. Returns true if the state before it already met tol.
  OTDD_DEVICE bool resident_step() {
    G.products();
    bool outside = false;
    double error = 0;
    G.for_rows([&](Row<T>& row, i64, bool counted) {
      outside |= row.r_new < v_low_ || row.r_new > r_high_;
      const double missed = weigh(row);
      if (counted) error += missed;
    });
    const Seen seen = G.transposed(outside, error, tol_ > 0);
    if (tol_ > 0 && scale_ * seen.error <= tol_) return true;
    redo_ = seen.flag;
    if (redo_) absorb();
    else take_rows(), columns(false);
    return false;
  }

  // One iteration from the potentials alone; K is made on the way.
  OTDD_DEVICE bool log_step(i64 done) {
    G.show(kGamma, false);
    G.make();
    if (!met_) {
      double heaviest = -INFINITY;
      G.for_rows([&](Row<T>& row, i64, bool) {
        heaviest = ::fmax(heaviest, row.log_a + rows_.rest * row.shift);
      });
      top_u_ = G.most(heaviest);
    }
    double error = 0;
    G.for_rows([&](Row<T>& row, i64, bool counted) {
      double missed = weigh(row);
      if (met_ && tol_ > 0 && row.a > 0)  // u is another K's: of the potentials
        missed = double(row.a) * ::fabs(::exp(row.phi + row.shift + log_of(row.r_new)) - 1);
      if (counted) error += missed;
    });
    const Seen seen = G.transposed(false, error, tol_ > 0);
    redo_ = false;
    if (tol_ > 0 && done > 0 && scale_ * seen.error <= tol_) return true;
    take_rows();
    resident_ = true;
    columns(true);
    return false;
  }

  // u of a row from its product with v, and by how much the row before missed its weight.
  OTDD_DEVICE double weigh(Row<T>& row) {
    if (met_) {
      row.u_new = row.a > 0 ? row.a / row.r_new : T(0);
      return tol_ > 0 ? ::fabs(double(row.u * row.r_new - row.a)) : 0;
    }
    // u = a exp(phi + shift), relative to the heaviest row of a fresh K.
    const double lse = row.shift + log_of(row.r_new), before = row.phi;
    const double phi = -rows_.lambda * lse;
    row.u_new = T(::exp(row.log_a + phi + row.shift - top_u_));
    if (!(tol_ > 0)) return 0;
    const double target = ::exp(row.log_a - before * (eps_ / rows_.rho));
    return row.a > 0 ? ::fabs(::exp(row.log_a + before + lse) - target) : 0;
  }

  OTDD_DEVICE void take_rows() {
    G.for_rows([&](Row<T>& row, i64, bool) {
      row.r = row.r_new, row.u = row.u_new;
      if (!met_) row.phi = -rows_.lambda * (row.shift + log_of(row.r));
    });
  }

  // v = b / c; K is given up where it must not be kept for the next iteration.
  OTDD_DEVICE void columns(bool fresh) {
    double outside = 0;  // 1: a column left its bounds, 2: its mass is lost
    G.for_columns([&](Column<T>& column, i64, bool) {
      if (!(column.b > 0)) {
        if (!met_) column.lse = log_of(column.c) + (top_u_ + log_scale_) - column.gamma;
        return;
      }
      if (met_) {
        column.v = column.b / column.c;
      } else {
        column.lse = log_of(column.c) + (top_u_ + log_scale_) - column.gamma;
        column.now = log_b(column) - columns_.lambda * column.lse;
        column.v = T(::exp(column.now - column.gamma));
      }
      if (!(column.v >= v_low_ && column.v <= v_high_)) outside = ::fmax(outside, 1.0);
      if ((fresh || !met_) && !(column.c >= T(bounds_.low_mass))) outside = 2;
    });
    if (!G.show(kV, outside > 0 || !bounds_.can_stay)) return;
    if (G.most(outside) > 1) columns_in_log_domain();
    else absorb();
  }

  // gamma from phi by a log-sum-exp down every column.
  OTDD_DEVICE void columns_in_log_domain() {
    settle_rows();
    column_lse();
    G.for_columns([&](Column<T>& column, i64, bool) {
      if (column.b > 0) column.gamma = column.now = log_b(column) - columns_.lambda * column.lse;
      column.v = 1;
    });
    resident_ = false;
  }

  OTDD_DEVICE void column_lse() {
    G.for_rows([&](Row<T>& row, i64, bool) { row.shift = row.log_a + log_scale_ + row.phi; });
    G.column_lse();
  }

  // phi from the resident rows' state.
  OTDD_DEVICE void settle_rows() {
    if (met_)
      G.for_rows([&](Row<T>& row, i64, bool) { row.phi = -row.shift - log_of(row.r); });
  }

  OTDD_DEVICE void settle_columns() {
    if (met_)
      G.for_columns([&](Column<T>& column, i64, bool) {
        if (column.b > 0) column.now = column.gamma + log_of(column.v);
      });
  }

  // All of the state into the potentials; K is to be made anew.
  OTDD_DEVICE void absorb() {
    settle_rows();
    settle_columns();
    G.for_columns([&](Column<T>& column, i64, bool) { column.gamma = column.now, column.v = 1; });
    resident_ = false;
  }

  // g_j where there is weight. Under a light penalty it is too small to be told from gamma.
  OTDD_DEVICE double potential(const Column<T>& column) const {
    return met_ ? eps_ * (column.now - log_b(column)) : -eps_ * columns_.lambda * column.lse;
  }

  OTDD_DEVICE void record(i64 done) {
    double* h = history(done);
    if (resident_) settle_rows(), settle_columns();
    G.for_rows([&](Row<T>& row, i64 i, bool counted) {
      if (counted) chip::write(h + i, eps_ * row.phi);
    });
    G.for_columns([&](Column<T>& column, i64 j, bool counted) {
      if (counted) chip::write(h + A.N + j, column.b > 0 ? potential(column) : 0.0);
    });
  }

  // Outputs; the plan's row sums and its cost need one more pass.
  OTDD_DEVICE void finish(i64 done) {
    if (resident_) settle_rows(), settle_columns();
    G.for_columns([&](Column<T>& column, i64, bool) { column.gamma = column.now; });
    G.for_rows([&](Row<T>& row, i64, bool) { row.shift = -(row.log_a + row.phi); });
    G.show(kGamma, false);
    G.plan_sums();
    double error = 0, cost = 0, value = 0, mass_a = 0, mass_b = 0, plan = 0;
    G.for_rows([&](Row<T>& row, i64 i, bool counted) {
      if (counted) chip::write(A.f + problem_ * A.N + i, T(eps_ * row.phi));
      if (!counted || !(row.a > 0)) return;
      const double a = row.a, target = met_ ? a : a * ::exp(-row.phi * eps_ / rows_.rho);
      error += ::fabs(double(row.r_new) - target), cost += double(row.cost);
      value += a * rows_.worth(eps_ * row.phi), mass_a += a;
    });
    if (masked_columns_) column_lse();
    G.for_columns([&](Column<T>& column, i64 j, bool counted) {
      if (!counted) return;
      const bool used = column.b > 0;
      const double g = used ? potential(column) : -eps_ * columns_.lambda * column.lse;
      chip::write(A.g + problem_ * A.M + j, T(g));
      if (!used) return;
      const double b = column.b;
      value += b * columns_.worth(g), mass_b += b;
      if (!met_) plan += b * ::exp(-g / columns_.rho);
    });
    error = G.sum(error), cost = G.sum(cost), value = G.sum(value);
    if (!met_) {
      mass_a = G.sum(mass_a), mass_b = G.sum(mass_b), plan = G.sum(plan);
      value -= eps_ * (plan - mass_a * mass_b * scale_);
    }
    if (!G.first()) return;
    chip::write(A.value + problem_, T(scale_ * value));
    chip::write(A.cost + problem_, T(scale_ * cost));
    chip::write(A.marginal_error + problem_, T(scale_ * error));
    chip::write(A.n_iter + problem_, done);
  }
};

}  // namespace otdd::cuda
