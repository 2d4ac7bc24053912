// Vector-Jacobian products of Sinkhorn's potentials, unrolled and implicit.
//
// With R_ij = b_j exp(F_i / l_a + G'_j - C_ij / eps) (rows sum to 1, G' the step's starting
// potentials), S_ij = a_i exp(F_i + G_j / l_b - C_ij / eps) (columns sum to 1), F = f / eps, G = g / eps
// and l = rho / (rho + eps), which is 1 for a marginal that is met, a step is
//   dg <- l_b dg:  df_i -= sum_j S_ij dg_j,  dC += S dg,  da_i -= eps / a_i sum_j S_ij dg_j
//   df <- l_a df:  dg'_j = -sum_i R_ij df_i, dC += R df,  db_j -= eps / b_j sum_i R_ij df_i
// R and S are row and column scalings of each other, so both come from one resident K. dC is K times
// a matrix of rank two per step: it is summed over the steps that share a K before it meets K.
#pragma once

#include "resident.h"

namespace otdd::cpu::OTDD_ISA {

template <class T>
class Unrolled {
 public:
  Unrolled(const BackwardArgs<T>& args, Crew& crew, Scratch& s, Patience& patience)
      : args_(args), N(args.N), M(args.M), R(args.N, args.M, crew, s, patience) {
    n_ = round_up(N, kWidth<T>) + kWidth<T>, m_ = R.ld;
    a_ = s.take<T>(n_), df_ = s.take<T>(n_), da_ = s.take<T>(n_), alpha_ = s.take<T>(n_);
    alpha_rows_ = s.take<T>(n_);
    over_b_ = s.take<T>(m_);
    b_ = s.take<T>(m_), dg_ = s.take<T>(m_), db_ = s.take<T>(m_), beta_ = s.take<T>(m_);
    beta_before_ = s.take<T>(m_), w_ = s.take<T>(m_), col_ = s.take<T>(m_);
    log_b_ = s.take<double>(m_);
    base_f_ = s.take<double>(n_), base_g_ = s.take<double>(m_), column_ = s.take<double>(m_);
    F_ = s.take<double>(n_), F_rows_ = s.take<double>(n_);
    G_ = s.take<double>(m_), G_before_ = s.take<double>(m_);
    p_ = s.take<T>(2 * args.steps * n_), q_ = s.take<T>(2 * args.steps * m_);
  }

  void run(i64 problem) {
    start(problem);
    const double* h = args_.history + problem * args_.steps * (N + M);
    for (i64 t = args_.n_iter[problem]; t >= 1 && !R.patience.over(); --t) {
      potentials(h + t * (N + M), h + (t - 1) * (N + M));
      if (!near(F_, G_) || !near(F_rows_, G_before_)) make(F_rows_, G_before_);
      if (near(F_, G_)) {
        scale(F_, alpha_, G_, beta_, true), scale_rows();
        columns_and_rows(true, true);
      } else {  // the step itself is wider than K's digits: one half at a time
        make(F_, G_);
        scale(F_, alpha_, G_, beta_, true);
        columns_and_rows(true, false);
        make(F_rows_, G_before_);
        scale_rows();
        columns_and_rows(false, true);
      }
      for (i64 i = 0; i < N; ++i) df_[i] = 0;
    }
    flush();
    for (i64 i = 0; i < N; ++i) args_.da[problem * N + i] = da_[i];
    for (i64 j = 0; j < M; ++j) args_.db[problem * M + j] = db_[j];
  }

 private:
  const BackwardArgs<T>& args_;
  i64 N, M, n_, m_;
  Resident<T> R;
  const T* C_;
  i64 ldc_, terms_;
  double eps_, inv_eps_, lambda_a_, lambda_b_;
  T* dC_;
  T *a_, *df_, *da_, *alpha_, *alpha_rows_, *b_, *over_b_, *dg_, *db_, *beta_, *beta_before_;
  T *w_, *col_, *p_, *q_;
  double *log_b_, *base_f_, *base_g_, *column_, *F_, *F_rows_, *G_, *G_before_;

  void start(i64 problem) {
    const auto& A = args_;
    C_ = A.C.data + problem * A.C.batch, ldc_ = A.C.row;
    eps_ = A.eps.data[problem * A.eps.batch], inv_eps_ = 1 / eps_;
    lambda_a_ = Penalty(A.rho_a.data[problem * A.rho_a.batch], eps_).lambda;
    lambda_b_ = Penalty(A.rho_b.data[problem * A.rho_b.batch], eps_).lambda;
    dC_ = A.dC + problem * N * M;
    for (i64 k = 0; k < N * M; ++k) dC_[k] = 0;
    for (i64 i = 0; i < n_; ++i) {
      a_[i] = i < N ? A.a.data[problem * A.a.batch + i * A.a.item] : T(0);
      df_[i] = i < N ? A.df.data[problem * A.df.batch + i * A.df.item] : T(0);
      da_[i] = 0, alpha_[i] = alpha_rows_[i] = 0, base_f_[i] = INFINITY;
    }
    for (i64 j = 0; j < m_; ++j) {
      b_[j] = j < M ? A.b.data[problem * A.b.batch + j * A.b.item] : T(0);
      dg_[j] = j < M && b_[j] > 0 ? A.dg.data[problem * A.dg.batch + j * A.dg.item] : T(0);
      over_b_[j] = b_[j] > 0 ? 1 / b_[j] : T(0), db_[j] = 0, base_g_[j] = INFINITY;
    }
    logs(b_, m_, log_b_);
    terms_ = 0;
  }

  // What makes the columns sum to 1 (F, G) and what makes the rows (F_rows, G_before).
  void potentials(const double* now, const double* before) {
    const double over_a = 1 / lambda_a_, over_b = 1 / lambda_b_;
    for (i64 i = 0; i < N; i += kWidth<double>) {
      const VecD F = load_some(now + i, N - i) * inv_eps_;
      store(F_ + i, F), store(F_rows_ + i, F * over_a);
    }
    for (i64 j = 0; j < M; j += kWidth<double>) {
      store(G_ + j, load_some(now + N + j, M - j) * (inv_eps_ * over_b));
      store(G_before_ + j, load_some(before + N + j, M - j) * inv_eps_);
    }
  }

  // Whether K, made at other potentials, still holds every digit needed at (F, G).
  bool near(const double* F, const double* G) const {
    return within_reach(F, base_f_, a_, N) && within_reach(G, base_g_, b_, M);
  }

  static bool within_reach(const double* x, const double* base, const T* weight, i64 n) {
    const double reach = backward_reach<T>();
    const VecD zero{};
    VecI64 outside{};
    for (i64 k = 0; k < n; k += kWidth<double>) {
      const VecD drift = vabs<double>(load(x + k) - load(base + k));
      outside |= (widen(weight + k) > zero) & ~(drift <= zero + reach);
    }
    return !any(outside);
  }

  // K_ij = b_j exp(F_i + G_j - C_ij / eps); rows and columns of weight 0 are 0.
  void make(const double* F, const double* G) {
    flush();
    for (i64 i = 0; i < N; ++i) base_f_[i] = F[i];
    for (i64 j = 0; j < m_; ++j) {
      base_g_[j] = G[j];
      column_[j] = b_[j] > 0 ? G[j] + log_b_[j] : -INFINITY;
    }
    R.for_parts([&](i64, i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i) {
        if (a_[i] > 0) {
          R.fill_row(i, C_ + i * ldc_, column_, inv_eps_, -F[i]);
        } else {
          for (i64 j = 0; j < R.ld; ++j) R.row(i)[j] = 0;
        }
      }
    });
  }

  // alpha = exp(F - base f), beta = exp(G - base g), over b if asked; 0 at weight 0.
  void scale(const double* F, T* alpha, const double* G, T* beta, bool over_b) {
    const Vec<T> zero{}, one = broadcast<T>(1);
    for (i64 i = 0; i < N; i += kWidth<T>)
      store(alpha + i, load(a_ + i) > zero ? exp<T>(difference(F + i, base_f_ + i)) : zero);
    for (i64 j = 0; j < M; j += kWidth<T>) {
      const Vec<T> factor = over_b ? load(over_b_ + j) : one;
      const Vec<T> e = exp<T>(difference(G + j, base_g_ + j)) * factor;
      store(beta + j, load(b_ + j) > zero ? e : zero);
    }
  }

  static Vec<T> difference(const double* x, const double* base) {
    return narrowed<T>([&](i64 h) { return load(x + h) - load(base + h); });
  }

  void scale_rows() { scale(F_rows_, alpha_rows_, G_before_, beta_before_, false); }

  static void exponential(const double* x, const double* base, T* out, i64 count, i64 padded) {
    for (i64 k = 0; k < count; ++k) out[k] = T(x[k] - base[k]);
    for (i64 k = count; k < padded; ++k) out[k] = 0;
    for (i64 k = 0; k + kWidth<T> <= padded; k += kWidth<T>) store(out + k, exp<T>(load(out + k)));
  }

  void columns_and_rows(bool columns, bool rows) {
    T* p_columns = p_ + terms_ * n_;
    T* q_columns = q_ + terms_ * m_;
    terms_ += columns;
    T* p_rows = p_ + terms_ * n_;
    T* q_rows = q_ + terms_ * m_;
    terms_ += rows;
    const T eps = T(eps_), lambda_a = T(lambda_a_), lambda_b = T(lambda_b_);
    if (columns)
      for (i64 j = 0; j < m_; j += kWidth<T>)
        store(q_columns + j, load(beta_ + j) * (lambda_b * load(dg_ + j)));
    const auto produce = [&](i64 i, i64 count, T* dots) {
      if (columns) R.products(i, count, q_columns, dots);
    };
    const auto weigh = [&](i64, i64 i, i64, const T* dots, T* coefficients) {
      Vec<T> df = load(df_ + i);
      if (columns) {
        const Vec<T> alpha = load(alpha_ + i), flow = alpha * load(dots), p = load(a_ + i) * alpha;
        df -= load(a_ + i) * flow;
        store(da_ + i, load(da_ + i) - eps * flow);
        store(df_ + i, df), store(p_columns + i, p);
      }
      const Vec<T> weights = load(alpha_rows_ + i) * (lambda_a * df);
      store(coefficients, weights);
      if (rows) store(p_rows + i, weights);
    };
    R.sweep(produce, weigh, col_);
    if (!rows) return;
    for (i64 j = 0; j < m_; j += kWidth<T>) {
      const Vec<T> beta = load(beta_before_ + j), flow = beta * load(col_ + j);
      store(q_rows + j, beta), store(dg_ + j, -flow);
      store(db_ + j, load(db_ + j) - eps * flow * load(over_b_ + j));
    }
  }

  // dC += K * sum_k p_k q_k'
  void flush() {
    if (terms_ == 0) return;
    R.for_parts([&](i64, i64 begin, i64 end) {
      for (i64 i = begin; i < end; i += 4)
        for (i64 j = 0; j < R.ld; j += 2 * kWidth<T>) flush_tile(i, least(4, end - i), j);
    });
    terms_ = 0;
  }

  void flush_tile(i64 i, i64 rows, i64 j) {
    constexpr i64 W = kWidth<T>;
    const bool two = j + W < R.ld;
    const T* q = q_ + j;
    const T* p = p_ + i;
    Vec<T> s[4][2] = {};
    for (i64 k = 0; k < terms_; ++k, q += m_, p += n_) {
      const Vec<T> q0 = load(q), q1 = two ? load(q + W) : Vec<T>{};
      for (int r = 0; r < 4; ++r) s[r][0] += q0 * p[r], s[r][1] += q1 * p[r];
    }
    for (i64 r = 0; r < rows; ++r)
      for (i64 v = 0; v <= i64(two); ++v) {
        const i64 col = j + v * W, count = M - col;
        T* out = dC_ + (i + r) * M + col;
        store_some(out, load_some(out, count) + load(R.row(i + r) + col) * s[r][v], count);
      }
  }
};

// Adjoint of the fixed point: (diag(c) - P' diag(1/r) P) h = dg - P' (df / r), k = (df - P h) / r and
// dC = P (h_j + k_i), r and c the plan's row sums over l_a and column sums over l_b. Conjugate
// gradients on the symmetrically scaled system; if both marginals are met the constants are its
// kernel, and it is solved orthogonally to them.
template <class T>
class Implicit {
 public:
  Implicit(const BackwardArgs<T>& args, Crew& crew, Scratch& s, Patience& patience)
      : args_(args), N(args.N), M(args.M), R(args.N, args.M, crew, s, patience) {
    n_ = round_up(N, kWidth<T>) + kWidth<T>, m_ = R.ld;
    a_ = s.take<T>(n_), df_ = s.take<T>(n_), over_r_ = s.take<T>(n_), k_ = s.take<T>(n_);
    b_ = s.take<T>(m_), half_ = s.take<T>(m_), over_half_ = s.take<T>(m_), kernel_ = s.take<T>(m_);
    x_ = s.take<T>(m_), residual_ = s.take<T>(m_), direction_ = s.take<T>(m_);
    image_ = s.take<T>(m_), w_ = s.take<T>(m_), col_ = s.take<T>(m_), dg_ = s.take<T>(m_);
    column_ = s.take<double>(m_);
  }

  void run(i64 problem) {
    start(problem);
    right_side();
    solve();
    write(problem);
  }

 private:
  const BackwardArgs<T>& args_;
  i64 N, M, n_, m_;
  Resident<T> R;
  double eps_;
  bool singular_;
  T *a_, *df_, *over_r_, *k_, *b_, *half_, *over_half_, *kernel_, *x_, *residual_, *direction_;
  T *image_, *w_, *col_, *dg_;
  double* column_;

  void start(i64 problem) {
    const auto& A = args_;
    const T* C = A.C.data + problem * A.C.batch;
    eps_ = A.eps.data[problem * A.eps.batch];
    const T lambda_a = T(Penalty(A.rho_a.data[problem * A.rho_a.batch], eps_).lambda);
    const T lambda_b = T(Penalty(A.rho_b.data[problem * A.rho_b.batch], eps_).lambda);
    singular_ = lambda_a == 1 && lambda_b == 1;
    for (i64 i = 0; i < n_; ++i) {
      a_[i] = i < N ? A.a.data[problem * A.a.batch + i * A.a.item] : T(0);
      df_[i] = i < N && a_[i] > 0 ? A.df.data[problem * A.df.batch + i * A.df.item] : T(0);
      over_r_[i] = 0, k_[i] = 0;
    }
    for (i64 j = 0; j < m_; ++j) {
      b_[j] = j < M ? A.b.data[problem * A.b.batch + j * A.b.item] : T(0);
      const bool used = b_[j] > 0;
      dg_[j] = used ? A.dg.data[problem * A.dg.batch + j * A.dg.item] : T(0);
      column_[j] = used ? A.g.data[problem * A.g.batch + j * A.g.item] / eps_ + ::log(double(b_[j]))
                        : -INFINITY;
    }
    R.sweep(
        [&](i64 i, i64 rows, T* dots) {
          for (i64 k = 0; k < rows; ++k) {
            const i64 row = i + k;
            const bool used = a_[row] > 0;
            const double f = used ? A.f.data[problem * A.f.batch + row * A.f.item] / eps_ +
                                        ::log(double(a_[row]))
                                  : -INFINITY;
            const T r = used ? R.fill_row(row, C + row * A.C.row, column_, 1 / eps_, -f) : T(0);
            if (!used)
              for (i64 j = 0; j < m_; ++j) R.row(row)[j] = 0;
            over_r_[row] = r > 0 ? lambda_a / r : T(0);
            dots[k] = 1;
          }
        },
        [&](i64, i64, i64, const T*, T* coefficients) { store(coefficients, broadcast<T>(1)); }, col_);
    double norm = 0;
    for (i64 j = 0; j < m_; ++j) {
      half_[j] = T(::sqrt(double(col_[j] / lambda_b)));
      over_half_[j] = col_[j] > 0 ? 1 / half_[j] : T(0);
      norm += col_[j] / lambda_b;
    }
    for (i64 j = 0; j < m_; ++j) kernel_[j] = half_[j] / T(::sqrt(norm));
  }

  // col = P' diag(1/r) (x + sign * P w)
  void through(const T* x, T sign) {
    R.sweep([&](i64 i, i64 rows, T* dots) { R.products(i, rows, w_, dots); },
            [&](i64, i64 i, i64, const T* dots, T* coefficients) {
              const Vec<T> base = x ? load(x + i) : Vec<T>{};
              const Vec<T> k = (base + sign * load(dots)) * load(over_r_ + i);
              store(coefficients, k), store(k_ + i, k);
            },
            col_);
  }

  double dot(const T* x, const T* y) const {
    double s = 0;
    for (i64 j = 0; j < m_; ++j) s += double(x[j]) * y[j];
    return s;
  }

  void project(T* x) const {
    if (!singular_) return;
    const T along = T(dot(x, kernel_));
    for (i64 j = 0; j < m_; ++j) x[j] -= along * kernel_[j];
  }

  void right_side() {
    for (i64 j = 0; j < m_; ++j) w_[j] = 0;
    through(df_, 0);
    for (i64 j = 0; j < m_; ++j) residual_[j] = (dg_[j] - col_[j]) * over_half_[j], x_[j] = 0;
    project(residual_);
  }

  void solve() {
    double rho = dot(residual_, residual_);
    const double rtol = args_.rtol, goal = rho * rtol * rtol;
    for (i64 j = 0; j < m_; ++j) direction_[j] = residual_[j];
    for (i64 step = 0; step < 10 * M && rho > goal && !R.patience.over(); ++step) {
      for (i64 j = 0; j < m_; ++j) w_[j] = direction_[j] * over_half_[j];
      through(nullptr, 1);
      for (i64 j = 0; j < m_; ++j) image_[j] = direction_[j] - col_[j] * over_half_[j];
      const double curvature = dot(direction_, image_);
      if (!(curvature > rtol * dot(direction_, direction_))) break;
      const T length = T(rho / curvature);
      for (i64 j = 0; j < m_; ++j) {
        x_[j] += length * direction_[j];
        residual_[j] -= length * image_[j];
      }
      project(residual_);
      const double next = dot(residual_, residual_);
      for (i64 j = 0; j < m_; ++j) direction_[j] = residual_[j] + T(next / rho) * direction_[j];
      rho = next;
    }
  }

  void write(i64 problem) {
    for (i64 j = 0; j < m_; ++j) w_[j] = x_[j] * over_half_[j];
    through(df_, -1);  // k = (df - P h) / r and col = P' k
    T* dC = args_.dC + problem * N * M;
    for (i64 i = 0; i < N; ++i) {
      const T* row = R.row(i);
      for (i64 j = 0; j < M; ++j) dC[i * M + j] = row[j] * (w_[j] + k_[i]);
      const T sent = over_r_[i] > 0 ? df_[i] - k_[i] / over_r_[i] : T(0);  // (P h)_i
      args_.da[problem * N + i] = a_[i] > 0 ? -T(eps_) * sent / a_[i] : T(0);
    }
    for (i64 j = 0; j < M; ++j)
      args_.db[problem * M + j] = b_[j] > 0 ? -T(eps_) * col_[j] / b_[j] : T(0);
  }
};

template <class T, class Solver>
int backward(const BackwardArgs<T>& args) {
  return each_problem(args, bytes_of<Solver>(args),
                      [&](Scratch& scratch, Crew& crew, i64 problem, Patience& patience) {
                        Solver(args, crew, scratch, patience).run(problem);
                        return int(kOk);
                      });
}

}  // namespace otdd::cpu::OTDD_ISA
