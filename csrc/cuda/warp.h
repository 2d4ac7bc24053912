// A matrix of up to 4 kTR rows and 8 kTC columns in the registers of one warp.
//
// Lanes stand in 4 rows of 8. Lane (p, q) has the elements (4 t + p, 8 s + q) of K. Sums over a row's 8
// lanes are folded: at each of three exchanges a lane gives away half of its sums and adds what it
// gets to the other half, so that in the end it has its own rows' alone; what it makes of them the others
// fetch from it. Nothing waits for another warp.
#pragma once

#include "solver.h"

namespace otdd::cuda {

template <class T, class State, int kTR, int kTC>
class WarpGrip {
  using Row = typename State::Row;
  using Column = typename State::Column;
  static constexpr int kOwnRows = kTR >= 8 ? kTR / 8 : 1, kOwnColumns = kTC >= 4 ? kTC / 4 : 1;

 public:
  static constexpr int kRows = 4 * kTR, kColumns = 8 * kTC;

  template <class Args>
  OTDD_DEVICE void begin(const Args& args, i64 problem, double inv_eps) {
    C_ = &args.C, problem_ = unsigned(problem), inv_eps_ = inv_eps;
    N_ = int(args.N), M_ = int(args.M), lane_ = chip::thread() % 32;
    OTDD_UNROLL
    for (int k = 0; k < kOwnRows; ++k) rows_[k] = Row();
    OTDD_UNROLL
    for (int k = 0; k < kOwnColumns; ++k) columns_[k] = Column();
  }

  OTDD_DEVICE bool first() const { return lane_ == 0; }
  // Of those that share shared memory.
  OTDD_DEVICE bool leads() const { return lane_ == 0; }
  OTDD_DEVICE void sync() const { chip::sync_warp(); }

  template <class Uniform>
  OTDD_DEVICE Uniform& uniform() const {
    return reinterpret_cast<Uniform*>(chip::shared())[chip::thread() / 32];
  }

  template <class Fn>
  OTDD_DEVICE void for_rows(Fn fn) {
    // Where there are fewer rows than lanes to a row, neighbours have the same one.
    const bool counted = kTR >= 8 || (lane_ & (8 / kTR - 1)) == 0;
    OTDD_UNROLL
    for (int k = 0; k < kOwnRows; ++k) {
      const unsigned i = 4 * (first_row() + k) + p();  // whose upper half, as an i64, takes no register
      if (int(i) < N_) fn(rows_[k], i64(i), counted);
    }
  }
  template <class Fn>
  OTDD_DEVICE void for_columns(Fn fn) {
    const bool counted = kTC >= 4 || (lane_ >> 3 & (4 / kTC - 1)) == 0;
    OTDD_UNROLL
    for (int k = 0; k < kOwnColumns; ++k) {
      const unsigned j = 8 * (first_column() + k) + q();
      if (int(j) < M_) fn(columns_[k], i64(j), counted);
    }
  }

  // Nothing: a lane fetches what it needs where it needs it. Kept, v would take registers from K.
  OTDD_DEVICE bool show(Shown, bool flag) { return chip::any_of_warp(flag); }

  OTDD_DEVICE void fill(bool fresh, bool keep) {
    const i64 row = chip::fresh(C_->row);
    const void* costs_of = C_->of(chip::fresh(problem_));
    double gamma[kTC];
    OTDD_UNROLL
    for (int c = 0; c < kTC; ++c) gamma[c] = of_column(c, columns_[c % kOwnColumns].gamma);
    // What they were is of no use any more, and so takes no registers from here.
    OTDD_UNROLL
    for (int k = 0; k < kOwnRows; ++k) rows_[k].r_new = 1, rows_[k].cost() = 0;
    OTDD_UNROLL
    for (int t = 0; t < kTR; ++t) {
      const int i = 4 * t + p();
      T costs[kTC];
      double shift = of_row(t, rows_[t % kOwnRows].shift);
      with_number<T>(C_->type, [&](auto number) {
        OTDD_UNROLL
        for (int c = 0; c < kTC; ++c) costs[c] = cost(number, costs_of, i, 8 * c + q(), row);
      });
      const auto exponent_of = [&](int c) { return exponent(gamma[c], costs[c], i, 8 * c + q()); };
      if (fresh) {
        shift = -INFINITY;
        OTDD_UNROLL
        for (int c = 0; c < kTC; ++c) shift = ::fmax(shift, exponent_of(c));
        for (int mask = 1; mask < 8; mask *= 2) shift = ::fmax(shift, chip::shuffle_xor(shift, mask));
      }
      if (i >= N_) shift = 0;  // padding: its x are -inf
      T total = 0, spent = 0;
      OTDD_UNROLL
      for (int c = 0; c < kTC; ++c) {
        const T e = power(exponent_of(c) - shift);
        total += e, spent += e * costs[c];
        K_[t][c] = keep ? e : K_[t][c];
      }
      for (int mask = 1; mask < 8; mask *= 2) {
        total += chip::shuffle_xor(total, mask);
        spent += chip::shuffle_xor(spent, mask);
      }
      OTDD_UNROLL
      for (int k = 0; k < kOwnRows; ++k)
        if (t == first_row() + k && i < N_)
          rows_[k].r_new = total, rows_[k].shift = shift, rows_[k].cost() = spent;
    }
  }

  OTDD_DEVICE void products() {
    T s[kTR] = {};
    OTDD_UNROLL
    for (int c = 0; c < kTC; ++c) {
      const T v = of_column(c, columns_[c % kOwnColumns].v);
      OTDD_UNROLL
      for (int t = 0; t < kTR; ++t) s[t] = c > 0 ? s[t] + K_[t][c] * v : K_[t][c] * v;
    }
    fold<kTR, 4>(s);
    OTDD_UNROLL
    for (int k = 0; k < kOwnRows; ++k) rows_[k].r_new = s[k];
  }

  OTDD_DEVICE double transposed(double error, bool wanted) {
    T s[kTC] = {};
    OTDD_UNROLL
    for (int t = 0; t < kTR; ++t) {
      const T u = of_row(t, rows_[t % kOwnRows].u_new);
      OTDD_UNROLL
      for (int c = 0; c < kTC; ++c) s[c] = t > 0 ? s[c] + K_[t][c] * u : K_[t][c] * u;
    }
    fold<kTC, 16>(s);
    OTDD_UNROLL
    for (int k = 0; k < kOwnColumns; ++k) columns_[k].c = s[k];
    return wanted ? sum(error) : 0;
  }

  OTDD_DEVICE void column_lse() {
    OTDD_NO_UNROLL
    for (int c = 0; c < kTC; ++c) {
      const int j = 8 * c + q();
      T costs[kTR];
      with_number<T>(C_->type, [&](auto number) {
        const i64 row = chip::fresh(C_->row);
        const void* costs_of = C_->of(chip::fresh(problem_));
        OTDD_UNROLL
        for (int t = 0; t < kTR; ++t) costs[t] = cost(number, costs_of, 4 * t + p(), j, row);
      });
      double top = -INFINITY;
      OTDD_UNROLL
      for (int t = 0; t < kTR; ++t) top = ::fmax(top, weighted(t, costs[t], j));
      for (int mask = 8; mask < 32; mask *= 2) top = ::fmax(top, chip::shuffle_xor(top, mask));
      T total = 0;
      OTDD_UNROLL
      for (int t = 0; t < kTR; ++t) total += power(weighted(t, costs[t], j) - top);
      for (int mask = 8; mask < 32; mask *= 2) total += chip::shuffle_xor(total, mask);
      OTDD_UNROLL
      for (int k = 0; k < kOwnColumns; ++k)
        if (c == first_column() + k) columns_[k].lse = top + log_of(total);
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

  // dC = K_ij (u_i + v_j)
  OTDD_DEVICE void write_sums(T* dC) {
    T v[kTC];
    OTDD_UNROLL
    for (int c = 0; c < kTC; ++c) v[c] = of_column(c, columns_[c % kOwnColumns].v);
    OTDD_UNROLL
    for (int t = 0; t < kTR; ++t) {
      const T u = of_row(t, rows_[t % kOwnRows].u_new);
      OTDD_UNROLL
      for (int c = 0; c < kTC; ++c) {
        const int i = 4 * t + p(), j = 8 * c + q();
        if (i < N_ && j < M_) chip::write(dC + i64(i) * M_ + j, K_[t][c] * (u + v[c]));
      }
    }
  }

  // dC (+)= K_ij sum_k rows[k, i] columns[k, j], some rows at a time: the sums need registers too.
  OTDD_DEVICE void add_outer(const T* rows, const T* columns, i64 terms, T* dC, bool add) {
    constexpr int kSome = kTR * kTC > 32 ? 16 / kTC : kTR;
    const i64 row = chip::fresh(M_);
    rows += chip::fresh(0), columns += chip::fresh(0);
    chip::sync_warp();
    OTDD_UNROLL
    for (int first = 0; first < kTR; first += kSome) {
      T s[kSome][kTC] = {};
      OTDD_NO_UNROLL
      for (i64 k = 0; k < terms; ++k) {
        // Beyond the matrix there is memory of any value, of which sums are made that nobody wants.
        const auto x = chip::fetch(at<Lot<kSome>>(rows + k * row_stride() + p() * kTR + first));
        const auto y = chip::fetch(at<Lot<kTC>>(columns + k * column_stride() + q() * kTC));
        OTDD_UNROLL
        for (int t = 0; t < kSome; ++t) {
          OTDD_UNROLL
          for (int c = 0; c < kTC; ++c) s[t][c] += x.v[t] * y.v[c];
        }
      }
      OTDD_UNROLL
      for (int t = 0; t < kSome; ++t) {
        OTDD_UNROLL
        for (int c = 0; c < kTC; ++c) {
          const int i = 4 * (first + t) + p(), j = 8 * c + q();
          if (i >= N_ || j >= M_) continue;
          T* at = dC + i * row + j;
          const T x = terms ? K_[first + t][c] * s[t][c] : T(0);
          if (add) chip::put(at, chip::fetch(at) + x);
          else chip::write(at, x);
        }
      }
    }
    chip::sync_warp();
  }
  OTDD_DEVICE i64 row_stride() const { return kRows; }
  OTDD_DEVICE i64 column_stride() const { return kColumns; }
  // What a lane reads of a term lies together.
  OTDD_DEVICE static unsigned row_place(i64 i) {
    const unsigned row = unsigned(chip::fresh(i));
    return row % 4 * kTR + row / 4;
  }
  OTDD_DEVICE static unsigned column_place(i64 j) {
    const unsigned column = unsigned(chip::fresh(j));
    return column % 8 * kTC + column / 8;
  }

 private:
  template <int n>
  struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Lot {
    T v[n];
  };
  template <class X>
  OTDD_DEVICE static const X* at(const T* p) {
    return reinterpret_cast<const X*>(p);
  }

  const Costs* C_;
  unsigned problem_;
  double inv_eps_;
  int N_, M_, lane_;
  T K_[kTR][kTC];
  Row rows_[kOwnRows];
  Column columns_[kOwnColumns];

  OTDD_DEVICE int p() const { return lane_ >> 3; }
  OTDD_DEVICE int q() const { return lane_ & 7; }
  // Of those that `fold` leaves to the lane.
  OTDD_DEVICE int first_row() const { return q() * kTR / 8; }
  OTDD_DEVICE int first_column() const { return p() * kTC / 4; }

  // fold: of sums s[0 .. n), added up over the lanes that differ in bits `mask` and below (down to that
  // of the side's last lane), this lane keeps the share that is its own. The masks of a side are
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
  // What a row's or a column's own lane has, for all lanes that need it.
  template <class X>
  OTDD_DEVICE X of_row(int t, X own) const {
    return chip::shuffle(own, 8 * p() + (kTR >= 8 ? t / kOwnRows : t * 8 / kTR));
  }
  template <class X>
  OTDD_DEVICE X of_column(int c, X own) const {
    return chip::shuffle(own, 8 * (kTC >= 4 ? c / kOwnColumns : c * 4 / kTC) + q());
  }

  // `of` is where the problem's costs are and `row` their stride, for this use alone (`fresh`): what is kept over
  // the iterations would take registers from K.
  template <class Kind>
  OTDD_DEVICE T cost(Kind kind, const void* of, int i, int j, i64 row) const {
    return i < N_ && j < M_ ? T(kind.read(of, i * row + j)) : T(0);
  }
  OTDD_DEVICE double exponent(double from, T cost, int i, int j) const {
    return i < N_ && j < M_ ? from - double(cost) * inv_eps_ : -INFINITY;
  }
  OTDD_DEVICE double weighted(int t, T cost, int j) const {
    return exponent(of_row(t, rows_[t % kOwnRows].shift), cost, 4 * t + p(), j);
  }
  OTDD_DEVICE static T power(double x) { return chip::exp2_fast(T(x * kLog2e)); }
};

}  // namespace otdd::cuda
