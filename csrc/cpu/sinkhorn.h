// Sinkhorn's iteration: exactly the log-domain one, mostly without an exp.
//
// Potentials are phi = f / eps and gamma = g / eps + log b, kept in double. K_ij = exp(gamma_j -
// C_ij / eps - m_i) with m_i the row's maximum stays resident, and an iteration is
//   r = K v,  u = a / r,  c = K' u,  v = b / c              (phi_i = -m_i - log r_i)
// While v and r stay within exp(+-tau), entries lost to underflow in K cannot reach the digits kept.
// When they leave, log v is absorbed into gamma and K is made anew in the next iteration, which is
// then the log-domain step itself. A column whose mass underflows is done in the log domain too.
//
// A marginal with a penalty (see Penalty) scales its half-step: phi_i = -lambda (m_i + log r_i), and
// gamma alike. Then the potentials themselves are kept, and u and v made of them.
#pragma once

#include "accelerate.h"
#include "resident.h"

namespace otdd::cpu::OTDD_ISA {

// Levels of a schedule but the last end at this error, or after so many iterations.
constexpr double kLevelError = 1e-2;  // of the mass
constexpr i64 kLevelIterations = 100;

template <class T, bool kMet>  // whether both marginals are to be met
class Sinkhorn {
 public:
  Sinkhorn(const SinkhornArgs<T>& args, Crew& crew, Scratch& s, Patience& patience)
      : args_(args), N(args.N), M(args.M), R(args.N, args.M, crew, s, patience), mixer_(R.ld, s) {
    const i64 n = round_up(N, kWidth<T>) + kWidth<T>, m = R.ld;
    a_ = s.take<T>(n), r_ = s.take<T>(n), r_new_ = s.take<T>(n), u_ = s.take<T>(n);
    u_new_ = s.take<T>(n);
    b_ = s.take<T>(m), v_ = s.take<T>(m), col_ = s.take<T>(m), gamma_t_ = s.take<T>(m);
    work_ = s.take<T>(m);
    phi_ = s.take<double>(n), phi_new_ = s.take<double>(n), shift_ = s.take<double>(n);
    log_a_ = s.take<double>(n), phi_before_ = s.take<double>(n);
    gamma_ = s.take<double>(m), gamma_now_ = s.take<double>(m), log_b_ = s.take<double>(m);
    lse_ = s.take<double>(m), top_ = s.take<double>(m);
  }

  int solve(i64 problem) {
    const Matrices<T>& m = args_.C;
    C_ = m.data + problem * m.batch, ldc_ = m.row;
    for (i64 i = 0; i < N; ++i)
      if (!all_finite(C_ + i * ldc_, M)) return kNotFinite;
    if (!valid(problem)) return kBadValue;
    start(problem);
    const double eps = eps_;
    i64 done = 0;
    if (args_.schedule > 0 || args_.accelerate) range_ = range();
    if (args_.schedule > 0)
      for (double level = range_; level > eps && !R.patience.over(); level *= args_.schedule) {
        change_eps(level, problem);
        done += iterate(kLevelIterations, kLevelError * scale_ * mass_);
      }
    if (done > 0) change_eps(eps, problem);
    done += iterate(args_.max_iter, args_.tol);
    finish(problem, done);
    return kOk;
  }

 private:
  using Mask = typename Traits<T>::Int;
  const SinkhornArgs<T>& args_;
  i64 N, M;
  Resident<T> R;
  Anderson mixer_;
  const T* C_;
  i64 ldc_;
  double eps_, inv_eps_, tol_, mass_, range_, tau_, low_mass_, top_u_;
  double scale_, log_scale_;  // a_ and b_ are in this unit
  Penalty rows_, columns_;
  T r_low_, r_high_, v_low_, v_high_;
  bool masked_columns_, resident_, can_stay_, redo_, jumped_;
  double* history_;
  T *a_, *r_, *r_new_, *u_, *u_new_, *b_, *v_, *col_, *gamma_t_, *work_;
  double *phi_, *phi_new_, *phi_before_, *shift_, *log_a_;
  double *gamma_, *gamma_now_, *log_b_, *lse_, *top_;
  struct Seen {
    Mask outside;  // rows whose product left its bounds
    double error;
  } seen_[kMaxParts];

  // Whether all but C is what the op accepts; it says itself what is wrong.
  bool valid(i64 problem) const {
    const auto& A = args_;
    const auto positive = [&](const Vectors<double>& v, double highest) {
      const double x = v.data[problem * v.batch];
      return x >= Traits<T>::kTiny && x <= highest;
    };
    const auto weights = [&](const Vectors<T>& w, i64 count) {
      double least = 0, sum = 0;
      for (i64 k = 0; k < count; ++k) {
        const double x = w.data[problem * w.batch + k * w.item];
        least = x < least ? x : least, sum += x;
      }
      return least >= 0 && sum > 0 && sum - sum == 0;
    };
    T nothing = 0;
    for (i64 j = 0; j < M; ++j) nothing += A.g0.data[problem * A.g0.batch + j * A.g0.item] * T(0);
    return nothing == 0 && positive(A.eps, Traits<T>::kHuge) && positive(A.rho_a, INFINITY) &&
           positive(A.rho_b, INFINITY) && weights(A.a, N) && weights(A.b, M);
  }

  void start(i64 problem) {
    const auto& A = args_;
    set_eps(A.eps.data[problem * A.eps.batch], problem);
    history_ = A.history ? A.history + problem * (A.max_iter + 1) * (N + M) : nullptr;
    const i64 n = round_up(N, kWidth<T>);
    double mass = 0;
    for (i64 i = 0; i < N; ++i) mass += A.a.data[problem * A.a.batch + i * A.a.item];
    const int exponent = ::ilogb(mass);
    scale_ = ::ldexp(1.0, exponent), log_scale_ = exponent * 0.693147180559945309;
    const double unscale = 1 / scale_;
    for (i64 i = 0; i < n; ++i) {
      a_[i] = i < N ? T(A.a.data[problem * A.a.batch + i * A.a.item] * unscale) : T(0);
      r_[i] = u_[i] = 1, phi_[i] = phi_new_[i] = shift_[i] = 0;
    }
    logs_of_weights(a_, n, log_a_);
    double least_b = INFINITY;
    masked_columns_ = false;
    for (i64 j = 0; j < R.ld; ++j) {
      const T w = j < M ? T(A.b.data[problem * A.b.batch + j * A.b.item] * unscale) : T(0);
      b_[j] = w, v_[j] = 1;
      if (w > 0) least_b = w < least_b ? w : least_b;
      else masked_columns_ |= j < M;
    }
    logs_of_weights(b_, R.ld, log_b_);
    for (i64 j = 0; j < R.ld; ++j) {
      log_b_[j] += log_scale_;
      const double g = j < M ? double(A.g0.data[problem * A.g0.batch + j * A.g0.item]) : 0.0;
      gamma_[j] = gamma_now_[j] = log_b_[j] + g * inv_eps_;
      if (history_ && j < M) history_[N + j] = g;
    }
    if (history_)
      for (i64 i = 0; i < N; ++i) history_[i] = 0;
    mass_ = mass / scale_;
    set_bounds(mass_, least_b);
    resident_ = false, redo_ = false;
  }

  void set_eps(double eps, i64 problem) {
    eps_ = eps, inv_eps_ = 1 / eps;
    rows_ = Penalty(args_.rho_a.data[problem * args_.rho_a.batch], eps);
    columns_ = Penalty(args_.rho_b.data[problem * args_.rho_b.batch], eps);
  }

  // g stays, gamma is made of it anew.
  void change_eps(double eps, i64 problem) {
    if (resident_) absorb();
    for (i64 j = 0; j < M; ++j)
      if (b_[j] > 0) gamma_[j] = gamma_now_[j] = log_b_[j] + (gamma_[j] - log_b_[j]) * (eps_ / eps);
    set_eps(eps, problem);
  }

  // Of the costs between points that take part.
  double range() {
    for (i64 j = 0; j < M; ++j) work_[j] = b_[j] > 0 ? T(0) : T(-INFINITY);
    T highest = -INFINITY, minus_lowest = -INFINITY;
    for (i64 i = 0; i < N; ++i) {
      if (!(a_[i] > 0)) continue;
      const T* c = C_ + i * ldc_;
      const T high = row_max<T>(c, work_, T(-1), M), minus_low = row_max<T>(c, work_, T(1), M);
      highest = high > highest ? high : highest;
      minus_lowest = minus_low > minus_lowest ? minus_low : minus_lowest;
    }
    return double(highest) + minus_lowest;
  }

  // At most `max_iter` iterations from gamma; returns how many were done.
  i64 iterate(i64 max_iter, double tol) {
    tol_ = within<T>(tol, scale_ * mass_);
    jumped_ = false;
    if (args_.accelerate) mixer_.start(b_, gamma_, range_ * inv_eps_, kMet);
    i64 done = 0;
    while (done < max_iter && !R.patience.over()) {
      if (resident_ ? resident_step(done) : log_step(done)) break;
      if (redo_) continue;
      ++done;
      if (args_.accelerate) accelerate(done < max_iter);
      if (history_) record(done);
    }
    return done;
  }

  // After an iteration: where the next one starts.
  void accelerate(bool may_jump) {
    settle_columns();
    double dual = 0, slack = 0;
    if (mixer_.needs_value()) {
      if (resident_) settle_rows();
      dual = value();
      for (i64 i = 0; i < N; ++i) slack += a_[i] > 0 ? a_[i] * ::fabs(phi_[i]) : 0;
      slack = eps_ * (1e-14 * slack + mass_ * (sizeof(T) == 4 ? 4e-6 : 1e-14));  // phi from logs of r
    }
    const Move move = mixer_.step(gamma_now_, dual, slack, tol_ / scale_, may_jump);
    jumped_ = move == kJump;
    if (move == kPlain) return;
    double *from = jumped_ ? phi_ : phi_before_, *to = jumped_ ? phi_before_ : phi_;
    for (i64 i = 0; i < N; ++i) to[i] = from[i];
    place_columns(mixer_.x);
    if (kMet && resident_ && move == kBack) place_rows();
  }

  // The potentials x into v, or where they are far from K's own into gamma, K to be made anew.
  void place_columns(const double* x) {
    bool near = resident_;
    for (i64 j = 0; j < M; ++j)
      if (b_[j] > 0) near = near && ::fabs(x[j] - gamma_[j]) <= tau_, gamma_now_[j] = x[j];
    if constexpr (!kMet)
      for (i64 j = 0; j < M; ++j) lse_[j] = (log_b_[j] - gamma_now_[j]) / columns_.lambda;
    resident_ = near;
    for (i64 j = 0; j < R.ld; ++j) {
      if (!near) gamma_[j] = gamma_now_[j];
      work_[j] = b_[j] > 0 ? T(gamma_now_[j] - gamma_[j]) : T(0);
    }
    for (i64 j = 0; j < R.ld; j += kWidth<T>) store(v_ + j, exp<T>(load(work_ + j)));
  }

  // r and u from phi.
  void place_rows() {
    for (i64 i = 0; i < N; ++i) {
      r_[i] = T(::exp(-shift_[i] - phi_[i]));
      u_[i] = a_[i] > 0 ? a_[i] / r_[i] : T(0);
    }
  }

  void set_bounds(double mass, double least_b) {
    const auto bounds = kMet ? Bounds<T>::met(M, mass, least_b) : Bounds<T>::penalised(N, M);
    can_stay_ = bounds.can_stay, low_mass_ = bounds.low_mass, tau_ = bounds.tau;
    v_low_ = T(::exp(-tau_)), v_high_ = T(::exp(tau_));
    r_low_ = v_low_, r_high_ = v_high_ * T(M);
  }

  // One iteration on the resident K. Returns true if the state before it already met tol.
  bool resident_step(i64 done) {
    R.sweep([&](i64 i, i64 rows, T* dots) { R.products(i, rows, v_, dots); },
            [&](i64 part, i64 i, i64, const T* dots, T* coefficients) {
              weigh(part, i, dots, coefficients);
            },
            col_);
    double error = 0;
    Mask outside{};
    for (i64 p = 0; p < R.parts; ++p) error += scale_ * seen_[p].error, outside |= seen_[p].outside;
    if (tol_ > 0 && !jumped_ && error <= tol_) return true;
    redo_ = any(outside);
    if (redo_) {
      absorb();
      return false;
    }
    swap_rows();
    if (!columns(false)) absorb();
    return false;
  }

  // Lanes past `rows` hold r = 1 and a = 0: they change neither bounds nor error.
  void weigh(i64 part, i64 i, const T* dots, T* coefficients) {
    const Vec<T> r = load(dots), a = load(a_ + i), zero{};
    Seen& seen = seen_[part];
    if (i == part * R.per_part) seen.outside = Mask{}, seen.error = 0;
    seen.outside |= (r < broadcast(r_low_)) | (r > broadcast(r_high_));
    store(r_new_ + i, r);
    if constexpr (kMet) {
      const Vec<T> u = a > zero ? a / r : zero;
      store(coefficients, u), store(u_new_ + i, u);
      if (tol_ > 0) seen.error += double(sum<T>(vabs<T>(load(u_ + i) * r - a)));
    } else {
      for (i64 h = 0; h < kWidth<T>; h += kWidth<double>)
        weigh_penalised(seen, i + h, dots + h, coefficients + h);
    }
  }

  // u = a exp(phi + m), relative to the heaviest row of a fresh K.
  void weigh_penalised(Seen& seen, i64 i, const T* dots, T* coefficients) {
    const VecD shift = load(shift_ + i), lse = shift + log(widen(dots)), log_a = load(log_a_ + i);
    const VecD phi = -rows_.lambda * lse, before = load(phi_ + i);
    narrow(exp<double>(log_a + phi + shift - top_u_), coefficients);
    store(phi_new_ + i, phi);
    if (!(tol_ > 0)) return;
    const VecD mass = exp<double>(log_a + before + lse);
    seen.error += sum<double>(vabs<double>(mass - exp<double>(log_a - before * (eps_ / rows_.rho))));
  }

  // One iteration from the potentials alone; K is made on the way.
  bool log_step(i64 done) {
    for (i64 j = 0; j < R.ld; ++j) gamma_t_[j] = T(gamma_[j]);
    if constexpr (!kMet) find_shifts();
    R.sweep([&](i64 i, i64 rows, T* dots) { make_rows(i, rows, dots); },
            [&](i64 part, i64 i, i64, const T* dots, T* coefficients) {
              weigh(part, i, dots, coefficients);
            },
            col_);
    redo_ = false;
    if (tol_ > 0 && done > 0 && !jumped_ && fresh_error() <= tol_) return true;
    swap_rows();
    resident_ = true;
    if (!columns(true)) absorb();
    return false;
  }

  // Marginal error of phi and gamma, from the rows just made.
  double fresh_error() const {
    double error = 0;
    if constexpr (kMet) {
      for (i64 i = 0; i < N; ++i)
        if (a_[i] > 0)
          error += a_[i] * ::fabs(::exp(phi_[i] + shift_[i] + ::log(double(r_new_[i]))) - 1);
    } else {
      for (i64 p = 0; p < R.parts; ++p) error += seen_[p].error;
    }
    return scale_ * error;
  }

  void find_shifts() {
    R.for_parts([&](i64, i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i)
        shift_[i] = row_max<double>(C_ + i * ldc_, gamma_, inv_eps_, M);
    });
    top_u_ = -INFINITY;
    for (i64 i = 0; i < N; ++i) {
      const double heaviest = log_a_[i] + rows_.rest * shift_[i];
      top_u_ = heaviest > top_u_ ? heaviest : top_u_;
    }
  }

  void make_rows(i64 i, i64 rows, T* dots) {
    for (i64 k = 0; k < rows; ++k) {
      const T* c = C_ + (i + k) * ldc_;
      double& shift = shift_[i + k];
      if constexpr (!kMet) {
        dots[k] = R.fill_row(i + k, c, gamma_, inv_eps_, shift);
        continue;
      }
      shift = row_max<T>(c, gamma_t_, T(inv_eps_), M);
      dots[k] = R.fill_row(i + k, c, gamma_, inv_eps_, shift);
      if (dots[k] > T(0.1) && dots[k] < T(10) * M) continue;
      shift = row_max<double>(c, gamma_, inv_eps_, M);  // C / eps is beyond the digits of T
      dots[k] = R.fill_row(i + k, c, gamma_, inv_eps_, shift);
    }
  }

  void swap_rows() {
    T* t = r_;
    r_ = r_new_, r_new_ = t;
    t = u_, u_ = u_new_, u_new_ = t;
    double* phi = phi_;
    if constexpr (!kMet) phi_ = phi_new_, phi_new_ = phi;
  }

  // v = b / c. Returns false when K must not be kept for the next iteration.
  bool columns(bool fresh) {
    const Vec<T> one = broadcast<T>(1), zero{}, low = broadcast(v_low_), high = broadcast(v_high_);
    const Vec<T> too_little = broadcast(T(low_mass_));
    Mask outside{}, lost{};
    for (i64 j = 0; j < R.ld; j += kWidth<T>) {
      const Vec<T> b = load(b_ + j), c = load(col_ + j);
      if constexpr (!kMet)
        for (i64 h = j; h < j + kWidth<T>; h += kWidth<double>) move_columns(h);
      const Vec<T> v = b > zero ? (kMet ? b / c : load(v_ + j)) : one;
      store(v_ + j, v);
      outside |= (v < low) | (v > high);
      if (fresh || !kMet) lost |= (b > zero) & (c < too_little);
    }
    if (any(lost)) {
      columns_in_log_domain();
      return false;
    }
    return can_stay_ && !any(outside);
  }

  // Columns with a penalty: gamma now, and v, what it is beside the gamma that K holds.
  void move_columns(i64 j) {
    const VecD gamma = load(gamma_ + j), log_b = load(log_b_ + j);
    const VecD lse = log(widen(col_ + j)) + (top_u_ + log_scale_) - gamma;
    const VecD now = log_b - columns_.lambda * lse;
    store(lse_ + j, lse);
    store(gamma_now_ + j, log_b == VecD{} - INFINITY ? log_b : now);
    narrow(exp<double>(now - gamma), v_ + j);
  }

  // gamma from phi by a log-sum-exp down every column; v becomes 1.
  void columns_in_log_domain() {
    settle_rows();
    column_lse();
    for (i64 j = 0; j < M; ++j)
      if (b_[j] > 0) gamma_[j] = gamma_now_[j] = log_b_[j] - columns_.lambda * lse_[j];
    for (i64 j = 0; j < R.ld; ++j) v_[j] = 1;
  }

  // lse_j = LSE_i(log a_i + phi_i - C_ij / eps)
  void column_lse() {
    constexpr i64 W = kWidth<T>;
    T* total = col_;
    for (i64 j = 0; j < R.ld; ++j) top_[j] = -INFINITY, total[j] = 0;
    for (i64 i = 0; i < N; ++i) {
      if (!(a_[i] > 0)) continue;
      const double weight = log_a_[i] + log_scale_ + phi_[i], inv_eps = inv_eps_;
      const T* __restrict c = C_ + i * ldc_;
      double* __restrict top = top_;
      for (i64 j = 0; j < M; ++j) {
        const double x = weight - double(c[j]) * inv_eps;
        top[j] = x > top[j] ? x : top[j];
      }
    }
    for (i64 i = 0; i < N; ++i) {
      if (!(a_[i] > 0)) continue;
      const double weight = log_a_[i] + log_scale_ + phi_[i];
      const T* c = C_ + i * ldc_;
      if (R.patience.look()) return;
      for (i64 j = 0; j < M; ++j) work_[j] = T(weight - double(c[j]) * inv_eps_ - top_[j]);
      for (i64 j = M; j < R.ld; ++j) work_[j] = 0;
      for (i64 j = 0; j < R.ld; j += W) store(total + j, load(total + j) + exp<T>(load(work_ + j)));
    }
    for (i64 j = 0; j < M; ++j) lse_[j] = top_[j] + ::log(double(total[j]));
  }

  // phi from the resident rows' state.
  void settle_rows() {
    if constexpr (!kMet) return;
    logs(r_, N, phi_);
    for (i64 i = 0; i < N; i += kWidth<double>) store(phi_ + i, -load(shift_ + i) - load(phi_ + i));
  }

  static void logs_of_weights(const T* x, i64 n, double* out) {
    logs(x, n, out);
    for (i64 k = 0; k < n; ++k) out[k] = x[k] > 0 ? out[k] : -INFINITY;
  }

  void settle_columns() {
    if constexpr (!kMet) return;
    logs(v_, M, lse_);
    for (i64 j = 0; j < M; j += kWidth<double>)  // v is 1 where b is 0
      store(gamma_now_ + j, load(gamma_ + j) + load(lse_ + j));
  }

  // All of the state into the potentials; K is to be made anew.
  void absorb() {
    settle_rows();
    settle_columns();
    for (i64 j = 0; j < M; ++j) gamma_[j] = gamma_now_[j];
    for (i64 j = 0; j < R.ld; ++j) v_[j] = 1;
    resident_ = false;
  }

  void record(i64 done) {
    double* h = history_ + done * (N + M);
    if (resident_) settle_rows();
    for (i64 i = 0; i < N; ++i) h[i] = eps_ * phi_[i];
    settle_columns();
    for (i64 j = 0; j < M; j += kWidth<double>) {
      const VecD log_b = load(log_b_ + j);
      const VecD g = eps_ * (kMet ? load(gamma_now_ + j) - log_b : -columns_.lambda * load(lse_ + j));
      store_some(h + N + j, log_b == VecD{} - INFINITY ? VecD{} : g, M - j);
    }
  }

  // Outputs; the plan's row sums and its cost need one more pass.
  void finish(i64 problem, i64 done) {
    const bool holds = kMet && resident_;
    if (resident_) settle_rows(), settle_columns();
    double errors[kMaxParts] = {0}, costs[kMaxParts] = {0};
    R.for_parts([&](i64 part, i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i) {
        if (!(a_[i] > 0)) continue;
        const T* c = C_ + i * ldc_;
        if (holds) {
          T mass, cost;
          row_sums(R.row(i), c, u_[i], &mass, &cost);
          errors[part] += ::fabs(double(u_[i]) * mass - double(a_[i]));
          costs[part] += cost;
          continue;
        }
        const T r = R.fill_row(i, c, gamma_now_, inv_eps_, -(log_a_[i] + phi_[i]));
        const double target = kMet ? double(a_[i]) : a_[i] * ::exp(-phi_[i] * eps_ / rows_.rho);
        errors[part] += ::fabs(double(r) - target);
        costs[part] += row_cost(R.row(i), c);
      }
    });
    double error = 0, cost = 0;
    for (i64 p = 0; p < R.parts; ++p) error += errors[p], cost += costs[p];
    if (masked_columns_) column_lse();
    T *f = args_.f + problem * N, *g = args_.g + problem * M;
    for (i64 i = 0; i < N; ++i) f[i] = T(eps_ * phi_[i]);
    for (i64 j = 0; j < M; ++j)
      g[j] = T(b_[j] > 0 ? column_potential(j) : -eps_ * columns_.lambda * lse_[j]);
    args_.value[problem] = T(scale_ * value()), args_.cost[problem] = T(scale_ * cost);
    args_.marginal_error[problem] = T(scale_ * error), args_.n_iter[problem] = done;
  }

  // g_j where there is weight. Under a light penalty it is too small to be told from gamma.
  double column_potential(i64 j) const {
    return eps_ * (kMet ? gamma_now_[j] - log_b_[j] : -columns_.lambda * lse_[j]);
  }

  // The dual objective, in units of `scale_`; with a penalty eps (sum P - sum a sum b) counts too.
  double value() const {
    double rows = 0, columns = 0, plan = 0, mass_a = 0, mass_b = 0;
    for (i64 i = 0; i < N; ++i) {
      if (!(a_[i] > 0)) continue;
      rows += a_[i] * rows_.worth(eps_ * phi_[i]), mass_a += a_[i];
    }
    for (i64 j = 0; j < M; ++j) {
      if (!(b_[j] > 0)) continue;
      const double g = column_potential(j);
      columns += b_[j] * columns_.worth(g), mass_b += b_[j];
      if constexpr (!kMet) plan += b_[j] * ::exp(-g / columns_.rho);
    }
    return rows + columns - (kMet ? 0 : eps_ * (plan - mass_a * mass_b * scale_));
  }

  // Of a row of the plan: its sum but for u, and its cost, which without u could overflow.
  void row_sums(const T* k, const T* c, T u, T* mass, T* cost) const {
    Vec<T> s{}, t{};
    for (i64 j = 0; j < R.ld; j += kWidth<T>) {
      const Vec<T> p = load(k + j) * load(v_ + j);
      s += p, t += p * u * load_some(c + j, M - j);
    }
    *mass = sum<T>(s), *cost = sum<T>(t);
  }

  double row_cost(const T* p, const T* c) const {
    constexpr i64 W = kWidth<T>;
    Vec<T> s{};
    i64 j = 0;
    for (; j + W <= M; j += W) s += load(p + j) * load(c + j);
    double total = sum<T>(s);
    for (; j < M; ++j) total += double(p[j]) * c[j];
    return total;
  }
};

}  // namespace otdd::cpu::OTDD_ISA
