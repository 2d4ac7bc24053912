// A matrix of up to 4 kTR rows and 8 kTC columns in the registers of one warp.
//
// Lanes stand in 4 rows of 8. Lane (p, q) has the elements (4 t + p, 8 s + q) of K. Sums over a row's 8
// lanes are folded: at each of three exchanges a lane gives away half of its sums and adds what it
// gets to the other half, so that in the end it has its own rows' alone; the way back spreads what it
// made of them. Nothing waits for another warp.
#pragma once

#include "solver.h"

namespace otdd::cuda {

template <class T, int kTR, int kTC>
class WarpGrip {
  static constexpr int kOwnRows = kTR >= 8 ? kTR / 8 : 1, kOwnColumns = kTC >= 4 ? kTC / 4 : 1;

 public:
  static constexpr int kRows = 4 * kTR, kColumns = 8 * kTC;

  template <class Args>
  OTDD_DEVICE void begin(const Args& args, i64 problem, double inv_eps) {
    C_ = args.C, problem_ = problem, inv_eps_ = inv_eps, N_ = int(args.N), M_ = int(args.M);
    lane_ = chip::thread() % 32;
    first_row_ = first_of<kTR, 4>(0), first_column_ = first_of<kTC, 16>(0);
    OTDD_UNROLL
    for (int k = 0; k < kOwnRows; ++k) rows_[k] = Row<T>();
    OTDD_UNROLL
    for (int k = 0; k < kOwnColumns; ++k) columns_[k] = Column<T>();
  }

  OTDD_DEVICE bool first() const { return lane_ == 0; }

  template <class Fn>
  OTDD_DEVICE void for_rows(Fn fn) {
    // Where there are fewer rows than lanes to a row, neighbours have the same one.
    const bool counted = kTR >= 8 || (lane_ & (8 / kTR - 1)) == 0;
    OTDD_UNROLL
    for (int k = 0; k < kOwnRows; ++k) {
      const int i = 4 * (first_row_ + k) + p();
      if (i < N_) fn(rows_[k], i64(i), counted);
    }
  }
  template <class Fn>
  OTDD_DEVICE void for_columns(Fn fn) {
    const bool counted = kTC >= 4 || (lane_ >> 3 & (4 / kTC - 1)) == 0;
    OTDD_UNROLL
    for (int k = 0; k < kOwnColumns; ++k) {
      const int j = 8 * (first_column_ + k) + q();
      if (j < M_) fn(columns_[k], i64(j), counted);
    }
  }

  OTDD_DEVICE bool show(Shown what, bool flag) {
    if (what == kV) {
      OTDD_UNROLL
      for (int k = 0; k < kOwnColumns; ++k) v_[k] = columns_[k].v;
      spread<kTC, 16>(v_);
    }
    return chip::any_of_warp(flag);
  }

  OTDD_DEVICE void make() { fill<true, true>(); }
  OTDD_DEVICE void make_at_shifts() { fill<false, true>(); }
  OTDD_DEVICE void plan_sums() { fill<false, false>(); }

  OTDD_DEVICE void products() {
    T s[kTR];
    OTDD_UNROLL
    for (int t = 0; t < kTR; ++t) {
      s[t] = K_[t][0] * v_[0];
      OTDD_UNROLL
      for (int c = 1; c < kTC; ++c) s[t] += K_[t][c] * v_[c];
    }
    fold<kTR, 4>(s);
    OTDD_UNROLL
    for (int k = 0; k < kOwnRows; ++k)
      if (4 * (first_row_ + k) + p() < N_) rows_[k].r_new = s[k];
  }

  OTDD_DEVICE Seen transposed(bool flag, double error, bool wanted) {
    T u[kTR], s[kTC];
    OTDD_UNROLL
    for (int k = 0; k < kOwnRows; ++k) u[k] = rows_[k].u_new;
    spread<kTR, 4>(u);
    OTDD_UNROLL
    for (int c = 0; c < kTC; ++c) {
      s[c] = K_[0][c] * u[0];
      OTDD_UNROLL
      for (int t = 1; t < kTR; ++t) s[c] += K_[t][c] * u[t];
    }
    fold<kTC, 16>(s);
    OTDD_UNROLL
    for (int k = 0; k < kOwnColumns; ++k) columns_[k].c = s[k];
    return {chip::any_of_warp(flag), wanted ? sum(error) : 0};
  }

  OTDD_DEVICE void column_lse() {
    double weight[kTR];
    OTDD_UNROLL
    for (int k = 0; k < kOwnRows; ++k) weight[k] = rows_[k].shift;
    spread<kTR, 4>(weight);
    OTDD_UNROLL
    for (int c = 0; c < kTC; ++c) {
      const int j = 8 * c + q();
      double top = -INFINITY;
      OTDD_UNROLL
      for (int t = 0; t < kTR; ++t) top = ::fmax(top, exponent(weight[t], 4 * t + p(), j));
      for (int mask = 8; mask < 32; mask *= 2) top = ::fmax(top, chip::shuffle_xor(top, mask));
      T total = 0;
      OTDD_UNROLL
      for (int t = 0; t < kTR; ++t) total += power(exponent(weight[t], 4 * t + p(), j) - top);
      for (int mask = 8; mask < 32; mask *= 2) total += chip::shuffle_xor(total, mask);
      OTDD_UNROLL
      for (int k = 0; k < kOwnColumns; ++k)
        if (c == first_column_ + k) columns_[k].lse = top + log_of(total);
    }
  }

  OTDD_DEVICE double sum(double x) const {
    for (int mask = 1; mask < 32; mask *= 2) x += chip::shuffle_xor(x, mask);
    return x;
  }
  OTDD_DEVICE double least(double x) const {
    for (int mask = 1; mask < 32; mask *= 2) x = ::fmin(x, chip::shuffle_xor(x, mask));
    return x;
  }
  OTDD_DEVICE double most(double x) const { return -least(-x); }

  // Element by element, after a backward pass: fn(K_ij, i, j).
  template <class Fn>
  OTDD_DEVICE void for_elements(Fn fn) {
    OTDD_UNROLL
    for (int t = 0; t < kTR; ++t) {
      OTDD_UNROLL
      for (int c = 0; c < kTC; ++c) {
        const int i = 4 * t + p(), j = 8 * c + q();
        if (i < N_ && j < M_) fn(K_[t][c], i64(i), i64(j));
      }
    }
  }

 private:
  Costs C_;
  i64 problem_;
  double inv_eps_;
  int N_, M_, lane_, first_row_, first_column_;
  T K_[kTR][kTC], v_[kTC];
  Row<T> rows_[kOwnRows];
  Column<T> columns_[kOwnColumns];

  OTDD_DEVICE int p() const { return lane_ >> 3; }
  OTDD_DEVICE int q() const { return lane_ & 7; }

  // fold: of sums s[0 .. n), added up over the lanes that differ in bits `mask` and below (down to that
  // of the side's last lane), this lane keeps the share that begins at first_of. The masks of a side are
  // 4, 2, 1 for rows and 16, 8 for columns.
  template <int n, int mask, class S>
  OTDD_DEVICE void fold(S* s) const {
    if constexpr (n > 1) {
      constexpr int half = n / 2;
      const bool upper = lane_ & mask;
      OTDD_UNROLL
      for (int k = 0; k < half; ++k) {
        const S given = upper ? s[k] : s[k + half];
        s[k] = (upper ? s[k + half] : s[k]) + chip::shuffle_xor(given, mask);
      }
    } else {
      s[0] += chip::shuffle_xor(s[0], mask);
    }
    if constexpr (mask != 1 && mask != 8) fold<(n > 1 ? n / 2 : 1), mask / 2>(s);
  }
  template <int n, int mask>
  OTDD_DEVICE int first_of(int first) const {
    if (n > 1 && (lane_ & mask)) first += n / 2;
    if constexpr (mask != 1 && mask != 8) return first_of<(n > 1 ? n / 2 : 1), mask / 2>(first);
    else return first;
  }
  // The way back: from a lane's own share to all n.
  template <int n, int mask, class S>
  OTDD_DEVICE void spread(S* s) const {
    if constexpr (mask != 1 && mask != 8) spread<(n > 1 ? n / 2 : 1), mask / 2>(s);
    if constexpr (n > 1) {
      constexpr int half = n / 2;
      const bool upper = lane_ & mask;
      OTDD_UNROLL
      for (int k = 0; k < half; ++k) {
        const S own = s[k], other = chip::shuffle_xor(own, mask);
        s[k] = upper ? other : own, s[k + half] = upper ? own : other;
      }
    }
  }

  OTDD_DEVICE double exponent(double from, int i, int j) const {
    return i < N_ && j < M_ ? from - C_.at(problem_, i, j) * inv_eps_ : -INFINITY;
  }
  OTDD_DEVICE static T power(double x) { return chip::exp2_fast(T(x * kLog2e)); }

  template <bool kShift, bool kKeep>
  OTDD_DEVICE void fill() {
    double gamma[kTC], shifts[kTR];
    OTDD_UNROLL
    for (int k = 0; k < kOwnColumns; ++k) gamma[k] = columns_[k].gamma;
    spread<kTC, 16>(gamma);
    if constexpr (!kShift) {
      OTDD_UNROLL
      for (int k = 0; k < kOwnRows; ++k) shifts[k] = rows_[k].shift;
      spread<kTR, 4>(shifts);
    }
    OTDD_UNROLL
    for (int t = 0; t < kTR; ++t) {
      const int i = 4 * t + p();
      double x[kTC], shift = -INFINITY;
      OTDD_UNROLL
      for (int c = 0; c < kTC; ++c) x[c] = exponent(gamma[c], i, 8 * c + q());
      if constexpr (kShift) {
        OTDD_UNROLL
        for (int c = 0; c < kTC; ++c) shift = ::fmax(shift, x[c]);
        for (int mask = 1; mask < 8; mask *= 2) shift = ::fmax(shift, chip::shuffle_xor(shift, mask));
        if (!(shift > -INFINITY)) shift = 0;  // a row of padding
      } else {
        shift = i < N_ ? shifts[t] : 0;
      }
      T total = 0, cost = 0;
      OTDD_UNROLL
      for (int c = 0; c < kTC; ++c) {
        const T e = power(x[c] - shift);
        total += e;
        if constexpr (kKeep) K_[t][c] = e;
        else if (e > 0) cost += e * T(C_.at(problem_, i, 8 * c + q()));
      }
      for (int mask = 1; mask < 8; mask *= 2) total += chip::shuffle_xor(total, mask);
      if constexpr (!kKeep)
        for (int mask = 1; mask < 8; mask *= 2) cost += chip::shuffle_xor(cost, mask);
      OTDD_UNROLL
      for (int k = 0; k < kOwnRows; ++k) {
        if (t != first_row_ + k || i >= N_) continue;
        rows_[k].r_new = total;
        if constexpr (kShift) rows_[k].shift = shift;
        if constexpr (!kKeep) rows_[k].cost = cost;
      }
    }
  }
};

}  // namespace otdd::cuda
