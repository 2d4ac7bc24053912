// Anderson acceleration of a fixed-point iteration x -> T(x) whose every step gains value.
//
// After a few plain iterations x jumps to where the residuals T(x) - x seen lately, combined linearly,
// come nearest to 0 (Anderson 1965; Walker & Ni 2011, "type II"; alternating with plain steps as in
// Pratapa, Suryanarayana & Pask 2016). An iteration that loses value is taken back; jumps then become
// shorter and rarer, so that a problem they don't help costs little more than its plain iterations.
#pragma once

#include "simd.h"

namespace otdd::cpu::OTDD_ISA {

enum Move : int { kPlain, kJump, kBack };

class Anderson {
 public:
  Anderson(i64 M, Scratch& s) : M(padded(M)) {
    x = s.take<double>(this->M), weight_ = s.take<double>(this->M);
    last_ = s.take<double>(this->M), residual_ = s.take<double>(this->M);
    step_ = s.take<double>(this->M);
    for (i64 k = 0; k < kMemory; ++k) moves_[k] = s.take<double>(this->M);
    for (i64 k = 0; k < kMemory; ++k) changes_[k] = s.take<double>(this->M);
  }

  // From `x0`. Residuals are measured with the weights w >= 0; where they are 0, x takes no part. No
  // entry jumps further than `limit`; if `free`, T(x + constant) = T(x) + constant.
  template <class T>
  void start(const T* w, const double* x0, double limit, bool free) {
    mass_ = 0;
    for (i64 j = 0; j < M; ++j) weight_[j] = w[j], x[j] = w[j] > 0 ? x0[j] : 0, mass_ += w[j];
    turn_ = stored_ = 0, period_ = kPeriod, limit_ = most_ = limit;
    started_ = jumped_ = false, free_ = free;
  }

  // Whether `step` will look at the value.
  bool needs_value() const { return jumped_ || turn_ + 1 >= period_; }

  // After the iteration x -> now, go on from `now` (kPlain), from another x (kJump), or from where the
  // last jump was made, as if it had not been (kBack). Values are exact to `slack`. No jump is made
  // when the residual is down to `tol`.
  Move step(const double* now, double value, double slack, double tol, bool may_jump) {
    if (jumped_) {
      jumped_ = false;
      if (!(value >= value_ - slack)) return back();
      limit_ = 4 * limit_ < most_ ? 4 * limit_ : most_, period_ = kPeriod;
    }
    remember(now);
    may_jump = may_jump && ++turn_ >= period_ && weighted_l1(residual_) > tol;
    if (!may_jump || !jump()) return kPlain;
    turn_ = 0, jumped_ = true, value_ = value;
    return kJump;
  }

  double* x;  // where the next iteration starts; 0 where the weight is

 private:
  static constexpr i64 kMemory = 6, kPeriod = 3;
  i64 M, turn_, period_, stored_;
  bool started_, jumped_, free_;
  double limit_, most_, mass_;  // longest jump allowed, now and ever; sum of the weights
  double size_, value_;         // of the last jump: its length, the value before it
  double *weight_, *last_, *residual_, *step_, *moves_[kMemory], *changes_[kMemory];

  static i64 padded(i64 M) { return round_up(M, kWidth<double>); }

  Move back() {
    limit_ = size_ / 4, period_ *= 2;
    turn_ = stored_ = 0;
    for (i64 j = 0; j < M; ++j) x[j] = last_[j];
    return kBack;
  }

  void remember(const double* now) {
    const i64 slot = stored_ % kMemory;
    for (i64 j = 0; j < M; j += kWidth<double>) {
      const VecD here = load(weight_ + j) > VecD{} ? load(now + j) : VecD{};
      const VecD residual = here - load(x + j);
      store(moves_[slot] + j, here - load(last_ + j));
      store(changes_[slot] + j, residual - load(residual_ + j));
      store(x + j, here), store(last_ + j, here), store(residual_ + j, residual);
    }
    stored_ += started_;
    started_ = true;
  }

  // x = last + t * step with step = -moves theta, theta = argmin |residual - changes theta|.
  bool jump() {
    const i64 n = least(stored_, kMemory);
    double theta[kMemory];
    fit(n, theta);
    VecD total{}, longest_lanes{};
    for (i64 j = 0; j < M; j += kWidth<double>) {
      VecD s{};
      for (i64 k = 0; k < n; ++k) s -= theta[k] * load(moves_[k] + j);
      store(step_ + j, s), total += load(weight_ + j) * s;
    }
    const double constant = free_ ? sum<double>(total) / mass_ : 0;
    for (i64 j = 0; j < M; j += kWidth<double>) {
      const VecD s = load(weight_ + j) > VecD{} ? load(step_ + j) - constant : VecD{};
      store(step_ + j, s), longest_lanes = vmax<double>(longest_lanes, vabs<double>(s));
    }
    const double longest = max<double>(longest_lanes);
    if (!(longest > 0 && longest < INFINITY)) return false;
    const double t = longest > limit_ ? limit_ / longest : 1;
    size_ = t * longest;
    for (i64 j = 0; j < M; ++j) x[j] = last_[j] + t * step_[j];
    return true;
  }

  // Normal equations scaled to a unit diagonal, by Cholesky; 1e-10 keeps them definite.
  void fit(i64 n, double* theta) const {
    double L[kMemory][kMemory], scale[kMemory];
    for (i64 i = 0; i < n; ++i) {
      const double square = dot(changes_[i], changes_[i]);
      scale[i] = square > 0 ? 1 / ::sqrt(square) : 0;
      theta[i] = scale[i] * dot(changes_[i], residual_);
      for (i64 k = 0; k <= i; ++k) {
        double q = k == i ? (square > 0) + 1e-10 : scale[i] * scale[k] * dot(changes_[i], changes_[k]);
        for (i64 l = 0; l < k; ++l) q -= L[i][l] * L[k][l];
        L[i][k] = k == i ? ::sqrt(q) : q / L[k][k];
      }
      for (i64 k = 0; k < i; ++k) theta[i] -= L[i][k] * theta[k];
      theta[i] /= L[i][i];
    }
    for (i64 i = n - 1; i >= 0; --i) {
      for (i64 k = i + 1; k < n; ++k) theta[i] -= L[k][i] * theta[k];
      theta[i] /= L[i][i];
    }
    for (i64 i = 0; i < n; ++i) theta[i] *= scale[i];
  }

  double weighted_l1(const double* p) const {
    VecD s{};
    for (i64 j = 0; j < M; j += kWidth<double>) s += load(weight_ + j) * vabs<double>(load(p + j));
    return sum<double>(s);
  }

  double dot(const double* p, const double* q) const {
    VecD s{};
    for (i64 j = 0; j < M; j += kWidth<double>) s += load(weight_ + j) * load(p + j) * load(q + j);
    return sum<double>(s);
  }
};

}  // namespace otdd::cpu::OTDD_ISA
