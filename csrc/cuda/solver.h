// Sinkhorn's iteration on a resident matrix: exactly the log-domain one, mostly without an exp.
//
// The iteration is that of csrc/cpu/sinkhorn.h. How a matrix is held, and by which threads, is a
// `Grip` (warp.h, slab.h):
//
//   for_rows(fn(row, i, counted)), for_columns(fn(column, j, counted))
//                            a thread's own rows and columns; where several threads hold the same one,
//                            one of them has it `counted`
//   show(kGamma or kV, flag) makes the columns' values known to all; whether any thread has the flag
//   fill(fresh, keep)        K_ij = exp(gamma_j - C_ij / eps - shift_i), with new shifts at the rows'
//                            maxima if `fresh`; r_new its sums; unless `keep`, K stays and cost is the
//                            sums of this one times C
//   products()               r_new = K v; like fill right after a show, whose barrier is theirs too
//   transposed(error, wanted)  c = K' u_new; the sum of the errors if wanted
//   column_lse()             lse_j = LSE_i(shift_i - C_ij / eps)
//   sum(x), least(x), most(x)  over all threads
//   add_outer(..), write_sums(..)  what a backward pass makes of K (backward.h)
//
// Every thread of a grip runs the same code and takes the same branches. What works on all of K is
// called from one place: it is unrolled, and copies of it would not fit the instruction cache.
#pragma once

#include "problem.h"

namespace otdd::cuda {

constexpr double kLog2e = 1.442695040888963407, kLn2 = 0.693147180559945309417;

// What a grip keeps of each row and column: every `State` has this of a row, and gamma, v and c of a column.
template <class T>
struct HeldRow {
  double shift = 0;
  T r_new = 1, u_new = 0;

  OTDD_DEVICE T& cost() { return u_new; }  // as `fill` leaves it, when no u is known yet
};

template <class T>
struct Iterate {
  struct Row : HeldRow<T> {  // r_new and u_new are of the iteration at hand
    double phi = 0;
    T a = 0, r = 1;  // r as of the last whole iteration
  };
  struct Column {
    double gamma = -INFINITY, lse = 0;  // gamma is K's own
    T b = 0, v = 1, c = 1;
  };
};

enum Shown { kGamma, kV };

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
  using Row = typename Iterate<T>::Row;
  using Column = typename Iterate<T>::Column;

 public:
  // What all threads agree on; it has its place in shared memory.
  struct Uniform {
    double eps, tol, scale, log_scale;  // a and b are in units of scale
    double top_u;                       // with a penalty u is relative to the heaviest row of a fresh K
    Penalty rows, columns;
    Bounds<T> bounds;
    T v_low, v_high;                    // where K may stay
    bool met, masked_columns;
  };

  OTDD_DEVICE Solver(const SinkhornArgs<T>& args, Grip& grip, i64 problem)
      : A(args), G(grip), U(grip.template uniform<Uniform>()), problem_(problem) {}

  OTDD_DEVICE void solve() {
    start();
    unsigned done = 0;
    bool resident = false, last = A.max_iter == 0;
    if (last) expect_end(false);
    for (;;) {
      if (resident) {
        G.products();
      } else {
        G.show(kGamma, false);
        G.fill(!last, !last);
      }
      int columns = last && U.masked_columns ? kLost : kGood;
      if (last) {
        sum_rows();
      } else {
        if (!resident && !U.met) find_top();
        const double error = weigh_rows(resident);
        if (U.tol > 0 && (resident || done > 0) && error <= U.tol) {  // of the state before
          expect_end(resident);
          resident = false, last = true;
          continue;
        }
        take_rows();
        columns = move_columns(!resident);
        resident = true;
      }
      if (columns == kLost) {
        settle_rows(!last && U.met);
        G.for_rows([&](Row& row, i64, bool) { row.shift = log_a(row) + U.log_scale + row.phi; });
        G.column_lse();
        resident = false;
      }
      if (last) break;
      if (columns == kLost)
        G.for_columns([&](Column& column, i64, bool) {
          if (column.b > 0) column.gamma = log_b(column) - U.columns.lambda * column.lse;
          column.v = 1;
        });
      if (columns == kOutside) {
        absorb();
        resident = false;
      }
      ++done;
      if (A.history) record(done, resident);
      if (done == A.max_iter) {
        expect_end(resident);
        resident = false, last = true;
      }
    }
    write(done);
  }

 private:
  enum Columns { kGood, kOutside, kLost };  // beyond the bounds of v; without a mass

  const SinkhornArgs<T>& A;
  Grip& G;
  Uniform& U;
  i64 problem_;
  double error_ = 0, cost_ = 0;

  OTDD_DEVICE void start() {
    const double eps = A.eps.at(problem_, 0), inv_eps = 1 / eps;
    const Penalty rows(A.rho_a.at(problem_, 0), eps), columns(A.rho_b.at(problem_, 0), eps);
    const bool met = !(rows.rho < INFINITY) && !(columns.rho < INFINITY);
    G.begin(A, problem_, inv_eps);
    double mass = 0, least_b = INFINITY, masked = 0;
    G.for_rows([&](Row& row, i64 i, bool counted) {
      row = Row();
      row.a = A.a.at(problem_, i);
      if (counted) mass += double(row.a);
    });
    mass = G.sum(mass);
    const int exponent = mass > 0 && mass < INFINITY ? ::ilogb(mass) : 0;
    const double scale = ::ldexp(1.0, exponent), unscale = 1 / scale, log_scale = exponent * kLn2;
    G.for_rows([&](Row& row, i64 i, bool counted) {
      row.a = T(double(row.a) * unscale);
      if (A.history && counted) chip::write(history(0) + i, 0.0);
    });
    G.for_columns([&](Column& column, i64 j, bool counted) {
      column = Column();
      column.b = T(double(A.b.at(problem_, j)) * unscale);
      const double g = A.g0.at(problem_, j);
      if (column.b > 0) {
        least_b = ::fmin(least_b, double(column.b));
        column.gamma = ::log(double(column.b)) + log_scale + g * inv_eps;
      } else {
        masked = 1;
      }
      if (A.history && counted) chip::write(history(0) + A.N + j, g);
    });
    least_b = G.least(least_b), masked = G.most(masked);
    if (G.leads()) {
      U.eps = eps, U.tol = within<T>(A.tol, mass) * unscale, U.scale = scale, U.log_scale = log_scale;
      U.rows = rows, U.columns = columns, U.met = met, U.masked_columns = masked > 0;
      U.bounds = met ? Bounds<T>::met(double(A.M), mass * unscale, least_b)
                     : Bounds<T>::penalised(double(A.N), double(A.M));
      U.v_low = T(::exp(-U.bounds.tau)), U.v_high = T(::exp(U.bounds.tau));
    }
    G.sync();
  }

  OTDD_DEVICE double* history(i64 done) const {
    return A.history + (problem_ * (A.max_iter + 1) + done) * (A.N + A.M);
  }

  OTDD_DEVICE static double log_a(const Row& row) {
    return row.a > 0 ? ::log(double(row.a)) : -INFINITY;
  }
  OTDD_DEVICE double log_b(const Column& column) const {
    return column.b > 0 ? ::log(double(column.b)) + U.log_scale : -INFINITY;
  }

  OTDD_DEVICE void find_top() {
    double heaviest = -INFINITY;
    G.for_rows([&](Row& row, i64, bool) {
      heaviest = ::fmax(heaviest, log_a(row) + U.rows.rest * row.shift);
    });
    heaviest = G.most(heaviest);
    if (G.leads()) U.top_u = heaviest;
    G.sync();
  }

  // u of every row from its product with v, and c of every column; by how much the state before missed
  // the rows' weights. A product needs no bounds but those of v: the largest element of a row is 1.
  OTDD_DEVICE double weigh_rows(bool resident) {
    double error = 0;
    G.for_rows([&](Row& row, i64, bool counted) {
      const double missed = U.met ? weigh(row, resident) : weigh_penalised(row);
      if (counted) error += missed;
    });
    return G.transposed(error, U.tol > 0);
  }

  OTDD_DEVICE double weigh(Row& row, bool resident) {
    row.u_new = row.a > 0 ? row.a / row.r_new : T(0);
    if (!(U.tol > 0) || !(row.a > 0)) return 0;
    if (resident) return ::fabs(double(row.a / row.r * row.r_new - row.a));
    // r is another K's: of the potentials
    return double(row.a) * ::fabs(::exp(row.phi + row.shift + log_of(row.r_new)) - 1);
  }

  OTDD_DEVICE double weigh_penalised(Row& row) {
    const double lse = row.shift + log_of(row.r_new), before = row.phi, a = row.a;
    row.u_new = T(a * ::exp(-U.rows.lambda * lse + row.shift - U.top_u));
    if (!(U.tol > 0)) return 0;
    return a * ::fabs(::exp(before + lse) - ::exp(-before * (U.eps / U.rows.rho)));
  }

  OTDD_DEVICE void take_rows() {
    G.for_rows([&](Row& row, i64, bool) {
      row.r = row.r_new;
      if (!U.met) row.phi = -U.rows.lambda * (row.shift + log_of(row.r));
    });
  }

  // v = b / c, known to all; whether K may be kept for the next iteration.
  OTDD_DEVICE int move_columns(bool fresh) {
    double outside = 0;
    G.for_columns([&](Column& column, i64, bool) {
      if (!U.met) column.lse = log_of(column.c) + (U.top_u + U.log_scale) - column.gamma;
      if (!(column.b > 0)) return;
      column.v = U.met ? column.b / column.c : T(::exp(now(column) - column.gamma));
      if (!(column.v >= U.v_low && column.v <= U.v_high)) outside = ::fmax(outside, double(kOutside));
      if ((fresh || !U.met) && !(column.c >= T(U.bounds.low_mass))) outside = kLost;
    });
    if (!G.show(kV, outside > 0 || !U.bounds.can_stay)) return kGood;
    return G.most(outside) == kLost ? kLost : kOutside;
  }

  // gamma as it is by now, of a column with weight.
  OTDD_DEVICE double now(const Column& column) const {
    return U.met ? column.gamma + log_of(column.v) : log_b(column) - U.columns.lambda * column.lse;
  }

  // phi from the resident rows' state.
  OTDD_DEVICE void settle_rows(bool resident) {
    if (resident && U.met)
      G.for_rows([&](Row& row, i64, bool) { row.phi = -row.shift - log_of(row.r); });
  }

  // All of the state into the potentials; K is to be made anew.
  OTDD_DEVICE void absorb() {
    settle_rows(true);
    G.for_columns([&](Column& column, i64, bool) {
      if (column.b > 0) column.gamma = now(column);
      column.v = 1;
    });
  }

  // The plan itself is next.
  OTDD_DEVICE void expect_end(bool resident) {
    if (resident) absorb();
    G.for_rows([&](Row& row, i64, bool) { row.shift = -(log_a(row) + row.phi); });
  }

  // g_j where there is weight. Under a light penalty it is too small to be told from gamma.
  OTDD_DEVICE double potential(const Column& column) const {
    return U.met ? U.eps * (now(column) - log_b(column)) : -U.eps * U.columns.lambda * column.lse;
  }

  OTDD_DEVICE void record(i64 done, bool resident) {
    double* h = history(done);
    settle_rows(resident);
    G.for_rows([&](Row& row, i64 i, bool counted) {
      if (counted) chip::write(h + i, U.eps * row.phi);
    });
    G.for_columns([&](Column& column, i64 j, bool counted) {
      if (counted) chip::write(h + A.N + j, column.b > 0 ? potential(column) : 0.0);
    });
  }

  // Marginal error and cost of the plan.
  OTDD_DEVICE void sum_rows() {
    G.for_rows([&](Row& row, i64, bool counted) {
      if (!counted || !(row.a > 0)) return;
      const double a = row.a, target = U.met ? a : a * ::exp(-row.phi * U.eps / U.rows.rho);
      error_ += ::fabs(double(row.r_new) - target), cost_ += double(row.cost());
    });
  }

  OTDD_DEVICE void write(i64 done) {
    double value = 0, mass_a = 0, mass_b = 0, plan = 0;
    G.for_rows([&](Row& row, i64 i, bool counted) {
      if (!counted) return;
      const double f = U.eps * row.phi;
      chip::write(A.f + problem_ * A.N + i, T(f));
      if (row.a != 0) value += double(row.a) * U.rows.worth(f), mass_a += double(row.a);
    });
    G.for_columns([&](Column& column, i64 j, bool counted) {
      if (!counted) return;
      const bool used = column.b > 0;
      const double g = used ? potential(column) : -U.eps * U.columns.lambda * column.lse;
      chip::write(A.g + problem_ * A.M + j, T(g));
      if (column.b == 0) return;
      const double b = column.b;
      value += b * U.columns.worth(g), mass_b += b;
      if (!U.met) plan += b * ::exp(-g / U.columns.rho);
    });
    value = G.sum(value), error_ = G.sum(error_), cost_ = G.sum(cost_);
    if (!U.met) {
      mass_a = G.sum(mass_a), mass_b = G.sum(mass_b), plan = G.sum(plan);
      value -= U.eps * (plan - mass_a * mass_b * U.scale);
    }
    if (!G.first()) return;
    chip::write(A.value + problem_, T(U.scale * value));
    chip::write(A.cost + problem_, T(U.scale * cost_));
    chip::write(A.marginal_error + problem_, T(U.scale * error_));
    chip::write(A.n_iter + problem_, done);
  }
};

}  // namespace otdd::cuda
