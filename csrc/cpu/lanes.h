// Tiny problems, one in each lane of a register: no shuffles, divisions and exps shared by all.
//
// The iteration and its names are those of Sinkhorn<T, true>, which also solves what is left over
// here: problems with masks, of weights that leave no room for drift, or with columns to be summed
// in the log domain. No lane's numbers depend on another's.
#pragma once

#include "sinkhorn.h"

namespace otdd::cpu::OTDD_ISA {

template <class T>
class Lanes {
 public:
  static constexpr i64 W = kWidth<T>;

  // Whether K and C of all lanes stay in a level-1 cache, and lanes would not stay empty.
  static bool suit(const SinkhornArgs<T>& args) {
    const bool plain = !args.history && !args.accelerate && args.schedule == 0;
    return plain && args.N * args.M <= 512 && args.B >= W / 2;
  }

  Lanes(const SinkhornArgs<T>& args, Crew&, Scratch& s, Patience&) : args_(args), N(args.N), M(args.M) {
    C_ = s.take<T>(N * M * W), K_ = s.take<T>(N * M * W);
    a_ = s.take<T>(N * W), r_ = s.take<T>(N * W), r_new_ = s.take<T>(N * W);
    u_ = s.take<T>(N * W), u_new_ = s.take<T>(N * W);
    b_ = s.take<T>(M * W), v_ = s.take<T>(M * W), col_ = s.take<T>(M * W);
    phi_ = s.take<double>(N * W), shift_ = s.take<double>(N * W);
    gamma_ = s.take<double>(M * W), log_b_ = s.take<double>(M * W);
  }

  // Solves `count` problems from `first` on; special(l) is then whether lane l is left to do.
  int solve(i64 first, i64 count) {
    for (i64 l = 0; l < W; ++l) start(l, first + least(l, count - 1));
    if (!all_finite(C_, N * M * W)) return kNotFinite;
    Mask n_iter{};
    for (i64 done = 0; done < args_.max_iter;) {
      if (any(absorbed_)) make();
      Mask outside{};
      Vec<T> error{};
      iterate(outside, error);
      outside &= ~(special_ | met_);
      special_ |= outside & absorbed_;  // K is fresh: its rows' maxima were too rough
      outside &= ~absorbed_;
      if (any(outside)) {
        absorb(outside);
        continue;
      }
      if (args_.tol > 0 && done > 0) met_ |= error <= load(tolerance_);
      if (all(met_ | special_)) break;
      ++done;
      n_iter += ~met_ & 1;
      advance();
    }
    finish(first, count, n_iter);
    return kOk;
  }

  bool special(i64 l) const { return special_[l] != 0; }

 private:
  using Mask = typename Traits<T>::Int;
  const SinkhornArgs<T>& args_;
  i64 N, M;
  T *C_, *K_, *a_, *r_, *r_new_, *u_, *u_new_, *b_, *v_, *col_;
  double *phi_, *shift_, *gamma_, *log_b_;
  alignas(kBytes) T low_[W], high_[W], low_mass_[W], tolerance_[W];
  alignas(kBytes) double eps_[W], inv_eps_[W], scale_[W];
  Mask special_{}, met_{}, absorbed_ = ~Mask{};  // absorbed: v is 1, K is to be made

  static bool all(Mask m) { return !any(~m); }

  void start(i64 l, i64 problem) {
    const auto& A = args_;
    const T* C = A.C.data + problem * A.C.batch;
    for (i64 i = 0; i < N; ++i)
      for (i64 j = 0; j < M; ++j) C_[(i * M + j) * W + l] = C[i * A.C.row + j];
    eps_[l] = A.eps.data[problem * A.eps.batch], inv_eps_[l] = 1 / eps_[l];
    double mass = 0;
    T least_a = INFINITY, least_b = INFINITY;
    for (i64 i = 0; i < N; ++i) mass += A.a.data[problem * A.a.batch + i * A.a.item];
    const int exponent = ::ilogb(mass);
    scale_[l] = ::ldexp(1.0, exponent);
    const double unscale = 1 / scale_[l], log_scale = exponent * 0.693147180559945309;
    for (i64 i = 0; i < N; ++i) {
      a_[i * W + l] = T(A.a.data[problem * A.a.batch + i * A.a.item] * unscale);
      least_a = least_a < a_[i * W + l] ? least_a : a_[i * W + l];
      u_[i * W + l] = r_[i * W + l] = 1, phi_[i * W + l] = 0;
    }
    for (i64 j = 0; j < M; ++j) {
      const T b = T(A.b.data[problem * A.b.batch + j * A.b.item] * unscale);
      least_b = b < least_b ? b : least_b;
      b_[j * W + l] = b, v_[j * W + l] = 1;
      log_b_[j * W + l] = log_scale;
      gamma_[j * W + l] = A.g0.data[problem * A.g0.batch + j * A.g0.item] * inv_eps_[l];
    }
    const auto bounds = Bounds<T>::met(M, mass * unscale, least_b);
    low_[l] = T(::exp(-bounds.tau)), high_[l] = 1 / low_[l], low_mass_[l] = T(bounds.low_mass);
    tolerance_[l] = T(within<T>(A.tol, mass) * unscale);
    const bool met = A.rho_a.data[problem * A.rho_a.batch] == INFINITY &&
                     A.rho_b.data[problem * A.rho_b.batch] == INFINITY;
    // What is NaN or out of range is left to `Sinkhorn`, which refuses it.
    const bool accepted = mass - mass == 0 && eps_[l] >= Traits<T>::kTiny && eps_[l] <= Traits<T>::kHuge;
    special_[l] = accepted && met && least_b > 0 && least_a > 0 && bounds.can_stay ? 0 : -1;
    if (l < W - 1) return;
    for (i64 k = 0; k < M * W; k += kWidth<double>) {
      const VecD log_b = load(log_b_ + k) + log(widen(b_ + k));
      store(log_b_ + k, log_b), store(gamma_ + k, load(gamma_ + k) + log_b);
    }
  }

  // K of every lane; what did not change comes out the same.
  void make() {
    const Vec<T> inv_eps = narrowed<T>([&](i64 h) { return load(inv_eps_ + h); });
    for (i64 i = 0; i < N; ++i) {
      const T* c = C_ + i * M * W;
      Vec<T> top = broadcast<T>(-INFINITY);
      for (i64 j = 0; j < M; ++j) {
        const Vec<T> gamma = narrowed<T>([&](i64 h) { return load(gamma_ + j * W + h); });
        top = vmax<T>(top, gamma - load(c + j * W) * inv_eps);
      }
      alignas(kBytes) T lane[W];
      store(lane, top);
      for (i64 h = 0; h < W; h += kWidth<double>) store(shift_ + i * W + h, widen(lane + h));
      i64 j = 0;
      for (; j + 4 <= M; j += 4) make_entries<4>(i, j);
      for (; j < M; ++j) make_entries<1>(i, j);
      const auto log_r = [&](i64 h) { return -load(shift_ + i * W + h) - load(phi_ + i * W + h); };
      const Vec<T> r = absorbed_ ? exp<T>(narrowed<T>(log_r)) : load(r_ + i * W);
      store(r_ + i * W, r), store(u_ + i * W, load(a_ + i * W) / r);
    }
  }

  template <int kCount>
  void make_entries(i64 i, i64 j) {
    Vec<T> e[kCount];
    for (int k = 0; k < kCount; ++k)
      e[k] = narrowed<T>([&](i64 h) __attribute__((always_inline)) {
        const VecD cost = widen(C_ + (i * M + j + k) * W + h) * load(inv_eps_ + h);
        return (load(gamma_ + (j + k) * W + h) - cost - load(shift_ + i * W + h)) * kLog2e;
      });
    powers_or_zero<T>(e);
    for (int k = 0; k < kCount; ++k) store(K_ + (i * M + j + k) * W, e[k]);
  }

  // u and the columns' sums from v, and the marginal error of the state before.
  void iterate(Mask& outside, Vec<T>& error) {
    for (i64 j = 0; j < M; ++j) store(col_ + j * W, Vec<T>{});
    i64 i = 0;
    for (; i + 4 <= N; i += 4) iterate_rows<4>(i, outside, error);
    for (; i < N; ++i) iterate_rows<1>(i, outside, error);
  }

  template <int kRows>
  void iterate_rows(i64 i, Mask& outside, Vec<T>& error) {
    const Vec<T> low = load(low_), high = load(high_) * T(M);
    const T* k = K_ + i * M * W;
    Vec<T> r[kRows] = {}, u[kRows];
    for (i64 j = 0; j < M; ++j) {
      const Vec<T> v = load(v_ + j * W);
      for (int l = 0; l < kRows; ++l) r[l] += load(k + (l * M + j) * W) * v;
    }
    for (int l = 0; l < kRows; ++l) {
      const Vec<T> a = load(a_ + (i + l) * W);
      u[l] = a / r[l];
      outside |= (r[l] < low) | (r[l] > high);
      error += vabs<T>(load(u_ + (i + l) * W) * r[l] - a);
      store(u_new_ + (i + l) * W, u[l]), store(r_new_ + (i + l) * W, r[l]);
    }
    for (i64 j = 0; j < M; ++j) {
      Vec<T> c = load(col_ + j * W);
      for (int l = 0; l < kRows; ++l) c += load(k + (l * M + j) * W) * u[l];
      store(col_ + j * W, c);
    }
  }

  // Takes the new rows and makes v = b / c, except where the state before met the tolerance.
  void advance() {
    const Vec<T> low = load(low_), high = load(high_), low_mass = load(low_mass_);
    Mask outside{}, lost{};
    if (any(met_)) {
      for (i64 i = 0; i < N * W; i += W) {
        store(r_new_ + i, met_ ? load(r_ + i) : load(r_new_ + i));
        store(u_new_ + i, met_ ? load(u_ + i) : load(u_new_ + i));
      }
    }
    T *r = r_, *u = u_;
    r_ = r_new_, r_new_ = r, u_ = u_new_, u_new_ = u;
    for (i64 j = 0; j < M * W; j += W) {
      const Vec<T> c = load(col_ + j), v = met_ ? load(v_ + j) : load(b_ + j) / c;
      store(v_ + j, v);
      lost |= c < low_mass, outside |= (v < low) | (v > high);
    }
    special_ |= lost & absorbed_ & ~met_;
    absorbed_ = Mask{};
    outside &= ~(special_ | met_);
    if (any(outside)) absorb(outside);
  }

  VecD phi_at(i64 k) const { return -load(shift_ + k) - log(widen(r_ + k)); }

  void absorb(Mask lanes) {
    absorbed_ |= lanes;
    const Vec<T> one = broadcast<T>(1);
    alignas(kBytes) double keep[W];
    for (i64 l = 0; l < W; ++l) keep[l] = lanes[l] ? 0 : 1;
    for (i64 k = 0; k < N * W; k += kWidth<double>) store(phi_ + k, phi_at(k));
    for (i64 k = 0; k < M * W; k += kWidth<double>) {
      const VecD moved = load(gamma_ + k) + log(widen(v_ + k));
      store(gamma_ + k, load(keep + k % W) > VecD{} ? load(gamma_ + k) : moved);
    }
    for (i64 j = 0; j < M * W; j += W) store(v_ + j, lanes ? one : load(v_ + j));
  }

  void finish(i64 first, i64 count, Mask n_iter) {
    if (any(absorbed_)) make();
    Vec<T> error{}, cost{};
    for (i64 i = 0; i < N; ++i) {
      Vec<T> r{}, spent{};
      const Vec<T> u = load(u_ + i * W);
      for (i64 j = 0; j < M; ++j) {
        const i64 k = (i * M + j) * W;
        const Vec<T> p = load(K_ + k) * load(v_ + j * W);
        r += p, spent += p * u * load(C_ + k);  // without u it could overflow
      }
      error += vabs<T>(u * r - load(a_ + i * W)), cost += spent;
    }
    double value[W] = {0};
    for (i64 h = 0; h < W; h += kWidth<double>) {
      const VecD eps = load(eps_ + h);
      VecD total{};
      for (i64 k = h; k < N * W; k += W) {
        const VecD f = eps * phi_at(k);
        store(phi_ + k, f), total += f * widen(a_ + k);
      }
      for (i64 k = h; k < M * W; k += W) {
        const VecD g = eps * (load(gamma_ + k) + log(widen(v_ + k)) - load(log_b_ + k));
        store(gamma_ + k, g), total += g * widen(b_ + k);
      }
      store(value + h, total);
    }
    for (i64 l = 0; l < count; ++l) {
      const i64 p = first + l;
      for (i64 i = 0; i < N; ++i) args_.f[p * N + i] = T(phi_[i * W + l]);
      for (i64 j = 0; j < M; ++j) args_.g[p * M + j] = T(gamma_[j * W + l]);
      args_.value[p] = T(scale_[l] * value[l]), args_.cost[p] = T(scale_[l] * cost[l]);
      args_.marginal_error[p] = T(scale_[l] * error[l]), args_.n_iter[p] = i64(n_iter[l]);
    }
  }
};

template <class T>
int solve_one(const SinkhornArgs<T>& args, Crew& crew, Scratch& s, i64 problem, Patience& patience) {
  const bool met = args.rho_a.data[problem * args.rho_a.batch] == INFINITY &&
                   args.rho_b.data[problem * args.rho_b.batch] == INFINITY;
  return met ? Sinkhorn<T, true>(args, crew, s, patience).solve(problem)
             : Sinkhorn<T, false>(args, crew, s, patience).solve(problem);
}

template <class T>
int sinkhorn(const SinkhornArgs<T>& args) {
  const i64 bytes = bytes_of<Sinkhorn<T, false>>(args);
  if (!Lanes<T>::suit(args))
    return each_problem(args, bytes, [&](Scratch& s, Crew& crew, i64 problem, Patience& patience) {
      return solve_one(args, crew, s, problem, patience);
    });
  constexpr i64 W = Lanes<T>::W;
  SinkhornArgs<T> groups = args;
  groups.B = (args.B + W - 1) / W;
  return each_problem(
      groups, most(bytes, bytes_of<Lanes<T>>(args)),
      [&](Scratch& s, Crew& crew, i64 group, Patience& patience) {
        const i64 first = group * W, count = least(W, args.B - first);
        Lanes<T> lanes(args, crew, s, patience);
        int status = lanes.solve(first, count);
        for (i64 l = 0; l < count && status == kOk; ++l) {
          if (!lanes.special(l)) continue;
          s.rewind();
          status = solve_one(args, crew, s, first + l, patience);
        }
        return status;
      });
}

}  // namespace otdd::cpu::OTDD_ISA
