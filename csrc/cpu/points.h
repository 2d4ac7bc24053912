// Sinkhorn's iteration between point clouds: costs are made tile by tile and never stored.
//
// Potentials are kept in double and base 2: phi = f / (eps ln 2) and gamma = g / (eps ln 2) + log2 b.
// For a block of rows e_ij = 2^(gamma_j - C_ij / (eps ln 2) - m_i) is made once, in a buffer that
// stays in cache; its row sums s give phi_i = -m_i - log2 s_i, and then the same e, weighted with
// a_i / s_i, is added to the column sums, which are relative to the gamma that went in. So one
// iteration, rows then columns, costs one cost and one exp an element.
//
// The shift m_i is the row's last potential as long as no gamma has grown by more than kRise since;
// otherwise, and for rows whose sum fell below kLeast, it is the row's exact maximum. Entries below
// 2^kLowest are lost: against a row that is at most M 2^kLowest / kLeast, and a column whose sum is
// not far above what could be missing is done by itself, from its exact maximum.
//
// Costs come from differences of coordinates, so nothing cancels however far the clouds are from the
// origin; gamma and m are split so that their difference, too, is exact to the digits of the result.
//
// Costs between labels are read from a table with a row for each label of the rows and an entry for
// each point of the columns: a tile adds whole vectors of it. A gather would do with K L numbers
// in place of K M, but takes a load for each entry, and the baseline instruction set has none.
#pragma once

#include "resident.h"

namespace otdd::cpu::OTDD_ISA {

// A tile's costs stay in registers, and its exps, a row at a time, don't wait for each other.
constexpr int kPointRows = 2, kPointVecs = 4, kBlockRows = 32;
template <class T>
constexpr i64 kPointPanel = kPointVecs * kWidth<T>;

template <class T>
inline Vec<T> square_root(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_sqrt_ps((__m512)x);
  else return (Vec<T>)_mm512_sqrt_pd((__m512d)x);
#else
  for (int l = 0; l < kWidth<T>; ++l) x[l] = T(::sqrt(double(x[l])));
  return x;
#endif
}

// Vectors of D numbers, transposed in panels of kPointPanel: lanes run along the points.
template <class T>
struct Panels {
  i64 n, D, count;
  T* data;  // (count, D, kPointPanel), points from n on are 0

  Panels(i64 n, i64 D, Scratch& s) : n(n), D(D), count((n + kPointPanel<T> - 1) / kPointPanel<T>) {
    data = s.take<T>(count * kPointPanel<T> * D);
  }
  void pack(const T* rows, i64 stride) {
    for (i64 j = 0; j < count * kPointPanel<T>; ++j) {
      T* to = data + j / kPointPanel<T> * kPointPanel<T> * D + j % kPointPanel<T>;
      for (i64 d = 0; d < D; ++d) to[d * kPointPanel<T>] = j < n ? rows[j * stride + d] : T(0);
    }
  }
  i64 padded() const { return count * kPointPanel<T>; }
};

// A cloud in both roles: rows whose coordinates are broadcast, and panels with a potential.
template <class T>
struct Cloud {
  const T* rows;
  i64 stride;
  Panels<T> panels;
  T *high, *low;  // potential, on the grid and what remains; -inf where there is no weight

  Cloud(i64 n, i64 D, Scratch& s) : panels(n, D, s) {
    high = s.take<T>(panels.padded()), low = s.take<T>(panels.padded());
  }
  void place(const Matrices<T>& points, i64 problem) {
    rows = points.data + problem * points.batch, stride = points.row;
    panels.pack(rows, stride);
  }
  const T* row(i64 i) const { return rows + i * stride; }
};

// A buffer for a row of M numbers; no power of two, whose rows would share cache sets.
template <class T>
i64 buffer_width(i64 M) {
  return round_up(M, kPointPanel<T>) + kWidth<T>;
}

// Costs between labels: for each label of one side a row with an entry for each point of the other.
template <class T>
class LabelCosts {
 public:
  LabelCosts(const Labels<T>& labels, i64 N, i64 M, bool of_columns, Scratch& s)
      : L_(labels), N_(N), M_(M) {
    if (!L_.cost.data) return;
    by_x_ = s.take<T>(L_.K * buffer_width<T>(M));
    if (of_columns) by_y_ = s.take<T>(L_.L * buffer_width<T>(N));
  }

  // False if a point has a label without costs.
  bool place(i64 problem) {
    if (!L_.cost.data) return true;
    x_ = L_.x.data + problem * L_.x.batch, y_ = L_.y.data + problem * L_.y.batch;
    for (i64 i = 0; i < N_; ++i)
      if (x_[i * L_.x.item] < 0 || x_[i * L_.x.item] >= L_.K) return false;
    for (i64 j = 0; j < M_; ++j)
      if (y_[j * L_.y.item] < 0 || y_[j * L_.y.item] >= L_.L) return false;
    const T* cost = L_.cost.data + problem * L_.cost.batch;
    reach_ = 0;
    for (i64 k = 0; k < L_.K; ++k)
      for (i64 l = 0; l < L_.L; ++l) {
        const double size = ::fabs(double(cost[k * L_.cost.row + l]));
        reach_ = size > reach_ ? size : reach_;
      }
    spread(by_x_, L_.K, M_, y_, L_.y.item, cost, L_.cost.row, 1);
    if (by_y_) spread(by_y_, L_.L, N_, x_, L_.x.item, cost, 1, L_.cost.row);
    return true;
  }

  double reach() const { return reach_; }  // of the label costs: none is larger in magnitude
  // What labels add to the costs of a point, or null.
  const T* of_row(i64 i) const {
    return by_x_ ? by_x_ + x_[i * L_.x.item] * buffer_width<T>(M_) : nullptr;
  }
  const T* of_column(i64 j) const {
    return by_y_ ? by_y_ + y_[j * L_.y.item] * buffer_width<T>(N_) : nullptr;
  }

 private:
  const Labels<T>& L_;
  i64 N_, M_;
  const i64 *x_ = nullptr, *y_ = nullptr;
  T *by_x_ = nullptr, *by_y_ = nullptr;
  double reach_ = 0;

  static void spread(T* table, i64 count, i64 n, const i64* labels, i64 item, const T* cost, i64 own,
                     i64 other) {
    const i64 ld = buffer_width<T>(n);
    for (i64 k = 0; k < count; ++k)
      for (i64 j = 0; j < ld; ++j)
        table[k * ld + j] = j < n ? cost[k * own + labels[j * item] * other] : T(0);
  }
};

// Up to kBlockRows rows and what a pass over all columns gives for each.
template <class T>
struct RowBlock {
  int count = 0;
  const T* x[kBlockRows];
  const T* labels[kBlockRows] = {};  // what they add to the row's costs, or null
  T shift[kBlockRows];
  double sum[kBlockRows], cost[kBlockRows];

  void add(const T* row, const T* by_label, T m) {
    x[count] = row, labels[count] = by_label, shift[count++] = m;
  }
  // Whole tiles: the last row is repeated.
  void fill_up() {
    while (count % 4) add(x[count - 1], labels[count - 1], shift[count - 1]);
  }
};

// The grid of potentials: multiples of a power of two with all of them below 2^kMantissa of it, but
// none above 1: costs that no plan uses, of a mask or a forbidden pair, must not make it coarse.
struct Grid {
  double unit = 1;
  void cover(double bound, int mantissa) {
    unit = ::ldexp(1.0, ::ilogb(bound + 1) + 1 - mantissa);
    unit = unit < 1 ? unit : 1;
  }
  double nearest(double x) const { return ::nearbyint(x / unit) * unit; }
};

template <class T, int kMetric, bool kLabels>
struct Tiles {
  i64 D;
  T scale;  // 1 / (eps ln 2)
  double exact_scale;
  double reach;  // no cost is larger in magnitude
  Grid grid;

  // q = distances of a tile
  void distances(const T* const* x, const T* panel, Vec<T> (&q)[kPointRows][kPointVecs]) const {
    for (int k = 0; k < kPointRows; ++k)
      for (int v = 0; v < kPointVecs; ++v) q[k][v] = Vec<T>{};
    for (i64 d = 0; d < D; ++d, panel += kPointPanel<T>) {
      Vec<T> y[kPointVecs];
      for (int v = 0; v < kPointVecs; ++v) y[v] = load(panel + v * kWidth<T>);
      for (int k = 0; k < kPointRows; ++k) {
        const T x_kd = x[k][d];
        for (int v = 0; v < kPointVecs; ++v) {
          const Vec<T> t = y[v] - x_kd;
          q[k][v] = kMetric == kL1 ? q[k][v] + vabs<T>(t) : q[k][v] + t * t;
        }
      }
    }
    if constexpr (kMetric == kL2)
      for (int k = 0; k < kPointRows; ++k)
        for (int v = 0; v < kPointVecs; ++v) q[k][v] = square_root<T>(q[k][v]);
  }

  // Runs visit(row, first column, exponents, costs, distances) for a panel's width of every row of a
  // block, and between() now and then and at the end.
  template <class Visit, class Between>
  void sweep(const RowBlock<T>& block, const Cloud<T>& cloud, Visit visit, Between between) const {
    const T scale = this->scale;  // a copy that stores cannot change
    for (i64 p = 0; p < cloud.panels.count; ++p) {
      const T* panel = cloud.panels.data + p * kPointPanel<T> * D;
      const T *high = cloud.high + p * kPointPanel<T>, *low = cloud.low + p * kPointPanel<T>;
      for (int k0 = 0; k0 < block.count; k0 += kPointRows) {
        Vec<T> q[kPointRows][kPointVecs];
        distances(block.x + k0, panel, q);
#pragma GCC unroll 2
        for (int k = 0; k < kPointRows; ++k) {  // unrolled: costs then need not leave their registers
          Vec<T> t[kPointVecs], with_labels[kPointVecs];
          const Vec<T>* C = q[k];
          if constexpr (kLabels) {
            const T* more = block.labels[k0 + k] + p * kPointPanel<T>;
            for (int v = 0; v < kPointVecs; ++v) with_labels[v] = q[k][v] + load(more + v * kWidth<T>);
            C = with_labels;
          }
          for (int v = 0; v < kPointVecs; ++v) {
            t[v] = load(high + v * kWidth<T>) - block.shift[k0 + k];
            t[v] += load(low + v * kWidth<T>);
            t[v] -= C[v] * scale;
          }
          visit(k0 + k, p * kPointPanel<T>, t, C, q[k]);
        }
      }
      if (p % 16 == 15 || p + 1 == cloud.panels.count) between();
    }
  }

  // Shifts at the rows' maxima, rounded to the grid.
  void tops(RowBlock<T>& block, const Cloud<T>& cloud) const {
    Vec<T> best[kBlockRows];
    for (int k = 0; k < block.count; ++k) best[k] = Vec<T>{} - T(INFINITY), block.shift[k] = 0;
    const auto visit = [&](int k, i64, Vec<T>(&t)[kPointVecs], const Vec<T>*, const Vec<T>*) {
      for (int v = 0; v < kPointVecs; ++v) best[k] = larger<T>(best[k], t[v]);
    };
    sweep(block, cloud, visit, [] {});
    for (int k = 0; k < block.count; ++k) block.shift[k] = T(grid.nearest(max<T>(best[k])));
  }

  // e = 2^exponent and its row sums; kept in `out` if that is given (rows of ld).
  template <bool kKeep, bool kCost>
  void fill(RowBlock<T>& block, const Cloud<T>& cloud, T* out, i64 ld) const {
    Vec<T> s[kBlockRows], c[kBlockRows];
    for (int k = 0; k < block.count; ++k)
      s[k] = c[k] = Vec<T>{}, block.sum[k] = block.cost[k] = 0;
    const auto visit = [&](int k, i64 j, Vec<T>(&t)[kPointVecs], const Vec<T>* C, const Vec<T>*) {
      decltype(t[0] > t[0]) kept[kPointVecs];
      for (int v = 0; v < kPointVecs; ++v) kept[v] = t[v] > Powers<T>::kLowest - Vec<T>{};
      exp2<T>(t);
      for (int v = 0; v < kPointVecs; ++v) {
        if constexpr (kCost) t[v] = kept[v] ? t[v] : Vec<T>{};  // also against a mass of next to 0
        if constexpr (kKeep) store(out + k * ld + j + v * kWidth<T>, t[v]);
        if constexpr (kCost) c[k] += t[v] * C[v];
        s[k] += t[v];
      }
    };
    sweep(block, cloud, visit, [&] {  // sums of many columns go on in double
      for (int k = 0; k < block.count; ++k) {
        block.sum[k] += double(sum<T>(s[k])), s[k] = Vec<T>{};
        if constexpr (kCost) block.cost[k] += double(sum<T>(c[k])), c[k] = Vec<T>{};
      }
    });
  }

  // Potential of a cloud from one in double (-inf where there is no weight).
  void split(const double* potential, Cloud<T>& cloud) {
    double most = 0;
    for (i64 j = 0; j < cloud.panels.n; ++j) {
      const double p = ::fabs(potential[j]);
      if (p > most && p < INFINITY) most = p;
    }
    grid.cover(most + reach * exact_scale, Powers<T>::kMantissa);
    for (i64 j = 0; j < cloud.panels.padded(); ++j) {
      const double p = j < cloud.panels.n ? potential[j] : -INFINITY;
      cloud.high[j] = p == -INFINITY ? T(p) : T(grid.nearest(p));
      cloud.low[j] = p == -INFINITY ? T(0) : T(p - double(cloud.high[j]));
    }
  }
};

// A bound on every distance, from the box that holds both clouds.
template <class T, int kMetric>
double reach_of(const Matrices<T>& x, const Matrices<T>& y, i64 N, i64 M, i64 D, i64 problem) {
  double total = 0;
  for (i64 d = 0; d < D; ++d) {
    double low = INFINITY, high = -INFINITY;
    const auto cover = [&](const Matrices<T>& points, i64 n) {
      const T* p = points.data + problem * points.batch + d;
      for (i64 i = 0; i < n; ++i) {
        const double t = p[i * points.row];
        low = t < low ? t : low, high = t > high ? t : high;
      }
    };
    cover(x, N), cover(y, M);
    total += kMetric == kL1 ? high - low : (high - low) * (high - low);
  }
  return kMetric == kL2 ? ::sqrt(total) : total;
}

// Rows worked together: their e fill a part of a core's own cache.
template <class T>
i64 block_rows(i64 ld) {
  const i64 rows = (i64(384) << 10) / (ld * i64(sizeof(T))) / 4 * 4;
  return least(kBlockRows, most(4, rows));
}

// acc += sum_k weight_k e_k over rows of ld, whose end is padding
template <class T>
inline void add_weighted(const T* e, const T* weight, int count, i64 ld, T* acc) {
  for (int k = 0; k < count; k += 4, e += 4 * ld, weight += 4)
    for (i64 j = 0; j < ld - kWidth<T>; j += kWidth<T>) {
      Vec<T> s = load(acc + j) + load(e + j) * weight[0] + load(e + ld + j) * weight[1];
      s += load(e + 2 * ld + j) * weight[2] + load(e + 3 * ld + j) * weight[3];
      store(acc + j, s);
    }
}

template <class T, int kMetric, bool kLabels>
class PointSinkhorn {
 public:
  static i64 parts_for(i64 N, i64 M) { return N * M < (1 << 17) ? 1 : least(16, (N + 63) / 64); }

  PointSinkhorn(const PointsArgs<T>& args, Crew& crew, Scratch& s, Patience& patience)
      : A(args), N(args.N), M(args.M), crew_(crew), patience_(patience), parts_(parts_for(N, M)),
        X_(N, args.D, s), Y_(M, args.D, s), labels_(args.labels, N, M, true, s),
        ld_(buffer_width<T>(M)), block_(block_rows<T>(ld_)) {
    buffer_ = s.take<T>(A.threads * block_ * ld_);
    acc_ = s.take<T>(parts_ * stride<T>()), total_ = s.take<double>(parts_ * stride<double>());
    a_ = s.take<double>(N), log_a_ = s.take<double>(N), phi_ = s.take<double>(N);
    lse_ = s.take<double>(N), lse_new_ = s.take<double>(N);
    b_ = s.take<double>(ld_), log_b_ = s.take<double>(ld_), gamma_ = s.take<double>(ld_);
    col_ = s.take<double>(ld_), lse_col_ = s.take<double>(ld_), lost_ = s.take<i64>(ld_);
  }

  int solve(i64 problem) {
    if (!start(problem)) return kBadValue;
    const double tol = A.tol.data[problem * A.tol.batch];
    stops_ = tol > 0;
    i64 done = 0;
    for (; done < A.max_iter; ++done) {
      const double error = rows(done > 0);
      if (patience_.over()) return kInterrupted;
      if (done > 0 && stops_ && error <= tol) break;
      double* t = lse_;
      lse_ = lse_new_, lse_new_ = t;
      for (i64 i = 0; i < N; ++i) phi_[i] = -lse_[i] / (1 + pull_a_);
      columns();
    }
    finish(problem, done);
    return kOk;
  }

 private:
  static constexpr double kLeast = sizeof(T) == 4 ? 1e-6 : 1e-30;
  static constexpr double kRise = sizeof(T) == 4 ? 60 : 500;
  const PointsArgs<T>& A;
  i64 N, M;
  Crew& crew_;
  Patience& patience_;
  i64 parts_;
  Cloud<T> X_, Y_;
  LabelCosts<T> labels_;
  i64 ld_, block_;
  Tiles<T, kMetric, kLabels> tiles_;
  double unit_, mass_a_, pull_a_, pull_b_, rise_;  // unit: eps ln 2; pull: eps / rho
  bool stops_ = false;
  double offset_, weights_;  // rows weigh 2^-offset of what they do, which sums to weights, near 1
  T *buffer_, *acc_;
  double *total_, *a_, *log_a_, *phi_, *lse_, *lse_new_, *b_, *log_b_, *gamma_, *col_, *lse_col_;
  i64* lost_;
  double error_[16], cost_[16], weight_[16];

  bool start(i64 problem) {
    if (!labels_.place(problem)) return false;
    X_.place(A.x, problem), Y_.place(A.y, problem);
    const double eps = A.eps.data[problem * A.eps.batch];
    unit_ = eps * 0.693147180559945309417;
    tiles_.D = A.D, tiles_.exact_scale = 1 / unit_, tiles_.scale = T(1 / unit_);
    tiles_.reach = reach_of<T, kMetric>(A.x, A.y, N, M, A.D, problem) + labels_.reach();
    pull_a_ = eps / A.rho_a.data[problem * A.rho_a.batch];
    pull_b_ = eps / A.rho_b.data[problem * A.rho_b.batch];
    mass_a_ = 0;
    for (i64 i = 0; i < N; ++i) {
      a_[i] = A.a.data[problem * A.a.batch + i * A.a.item];
      log_a_[i] = ::log2(a_[i]), mass_a_ += a_[i];
    }
    for (i64 j = 0; j < M; ++j) {
      b_[j] = A.b.data[problem * A.b.batch + j * A.b.item];
      log_b_[j] = ::log2(b_[j]);
      gamma_[j] = log_b_[j] + A.g0.data[problem * A.g0.batch + j * A.g0.item] / unit_;
    }
    rise_ = INFINITY, offset_ = ::log2(mass_a_);
    return true;
  }

  i64 first_row(i64 part) const { return N * part / parts_; }

  // log-sum-exp of every row at gamma, and the column sums of what it leaves; the marginal error of
  // the potentials before.
  double rows(bool started) {
    tiles_.split(gamma_, Y_);
    crew_.for_parts(parts_, [&](i64 part, int thread) {
      T *acc = acc_ + part * stride<T>(), *buffer = buffer_ + thread * (block_ * ld_);
      double* total = total_ + part * stride<double>();
      for (i64 j = 0; j < ld_; ++j) acc[j] = 0, total[j] = 0;
      error_[part] = weight_[part] = 0;
      const i64 end = first_row(part + 1);
      i64 unsaved = 0;
      for (i64 i = first_row(part); i < end && !patience_.look(); i += block_) {
        const i64 count = least(block_, end - i);
        block(part, i, count, started, buffer, acc);
        unsaved += count;
        if (unsaved < 512 && i + block_ < end) continue;
        for (i64 j = 0; j < ld_; ++j) total[j] += acc[j], acc[j] = 0;
        unsaved = 0;
      }
    });
    double error = 0;
    weights_ = 0;
    for (i64 p = 0; p < parts_; ++p) error += error_[p], weights_ += weight_[p];
    for (i64 j = 0; j < M; ++j) {
      double s = 0;
      for (i64 p = 0; p < parts_; ++p) s += total_[p * stride<double>() + j];
      col_[j] = s;
    }
    return error;
  }

  template <class S>
  i64 stride() const {
    return round_up(ld_, 64 / i64(sizeof(S)));
  }

  void block(i64 part, i64 i, i64 count, bool started, T* buffer, T* acc) {
    const bool known = started && rise_ <= kRise;
    RowBlock<T> block;
    for (i64 k = 0; k < count; ++k)
      block.add(X_.row(i + k), labels_.of_row(i + k), known ? T(tiles_.grid.nearest(lse_[i + k])) : T(0));
    block.fill_up();
    if (!known) tiles_.tops(block, Y_);
    tiles_.template fill<true, false>(block, Y_, buffer, ld_);
    bool low = false;
    for (i64 k = 0; k < count; ++k) low |= !(block.sum[k] >= kLeast);
    if (known && low) {
      tiles_.tops(block, Y_);
      tiles_.template fill<true, false>(block, Y_, buffer, ld_);
    }
    T weight[kBlockRows] = {};
    for (i64 k = 0; k < count; ++k) {
      const bool used = a_[i + k] > 0;
      const double lse = block.shift[k] + log2_of_sum(block.sum[k], used), phi = -lse / (1 + pull_a_);
      lse_new_[i + k] = lse;
      if (!used) continue;
      weight[k] = T(a_[i + k] * ::exp2(phi + block.shift[k] - offset_));
      weight_[part] += weight[k];
      if (started && stops_)
        error_[part] += a_[i + k] * ::fabs(::exp2(lse + phi_[i + k]) - ::exp2(-pull_a_ * phi_[i + k]));
    }
    for (i64 k = 0; k < block.count; ++k) {  // of no weight: 0 times what overflowed is no number
      if (a_[i + least(k, count - 1)] > 0) continue;
      for (i64 j = 0; j < ld_; ++j) buffer[k * ld_ + j] = 0;
    }
    add_weighted(buffer, weight, block.count, ld_, acc);
  }

  // The logarithm of a sum above its shift. Without weight a point may be so far off that a digit of
  // its shift is more than all exponents there are: then it adds nothing.
  static double log2_of_sum(double sum, bool used) {
    return used || (sum >= kLeast && sum < INFINITY) ? ::log2(sum) : 0;
  }

  // gamma from the column sums.
  void columns() {
    const double drift = ::log2(weights_);
    const double low = (weights_ > 1 ? weights_ : 1) * ::exp2(Powers<T>::kLowest + Powers<T>::kMantissa + 4);
    i64 lost = 0;
    for (i64 j = 0; j < M; ++j) {
      if (!(b_[j] > 0)) continue;
      if (col_[j] >= low && col_[j] < INFINITY) lse_col_[j] = ::log2(col_[j]) + offset_ - gamma_[j];
      else lost_[lost++] = j;
    }
    if (lost) columns_alone(lost);
    offset_ = ::fabs(drift) < kRise ? offset_ + drift : row_offset();
    rise_ = -INFINITY;
    for (i64 j = 0; j < M; ++j) {
      if (!(b_[j] > 0)) continue;
      const double gamma = log_b_[j] - lse_col_[j] / (1 + pull_b_);
      rise_ = gamma - gamma_[j] > rise_ ? gamma - gamma_[j] : rise_;
      gamma_[j] = gamma;
    }
  }

  // The largest of the rows' weights, where their sum left the range of T.
  double row_offset() const {
    double top = -INFINITY;
    for (i64 i = 0; i < N; ++i) {
      const double w = log_a_[i] + lse_[i] + phi_[i];
      top = w > top ? w : top;
    }
    return top;
  }

  // lse_col of the columns listed in lost_, from phi alone.
  void columns_alone(i64 count) {
    for (i64 i = 0; i < N; ++i) lse_new_[i] = a_[i] > 0 ? phi_[i] + log_a_[i] : -INFINITY;
    tiles_.split(lse_new_, X_);
    crew_.for_parts((count + kBlockRows - 1) / kBlockRows, [&](i64 part, int) {
      if (patience_.look()) return;
      RowBlock<T> block;
      const i64 begin = part * kBlockRows, end = least(count, begin + kBlockRows);
      for (i64 k = begin; k < end; ++k) {
        const i64 j = lost_[k];
        block.add(Y_.row(j), labels_.of_column(j), T(0));
      }
      block.fill_up();
      tiles_.tops(block, X_);
      tiles_.template fill<false, false>(block, X_, nullptr, 0);
      for (i64 k = begin; k < end; ++k)
        lse_col_[lost_[k]] = block.shift[k - begin] + log2_of_sum(block.sum[k - begin], b_[lost_[k]] > 0);
    });
  }

  // Outputs. The plan's row sums and its cost need one more pass, with e the plan itself.
  void finish(i64 problem, i64 done) {
    tiles_.split(gamma_, Y_);
    crew_.for_parts(parts_, [&](i64 part, int) {
      if (patience_.look()) return;
      error_[part] = cost_[part] = 0;
      for (i64 i = first_row(part); i < first_row(part + 1);) {
        RowBlock<T> block;
        i64 index[kBlockRows];
        for (; i < first_row(part + 1) && block.count < kBlockRows; ++i) {
          if (!(a_[i] > 0)) continue;
          index[block.count] = i;
          block.add(X_.row(i), labels_.of_row(i), T(-tiles_.grid.nearest(phi_[i] + log_a_[i])));
        }
        const int count = block.count;
        block.fill_up();
        tiles_.template fill<false, true>(block, Y_, nullptr, 0);
        for (int k = 0; k < count; ++k) {
          const double phi = phi_[index[k]], a = a_[index[k]];
          const double rest = ::exp2(phi + log_a_[index[k]] + double(block.shift[k]));
          error_[part] += ::fabs(block.sum[k] * rest - a * ::exp2(-pull_a_ * phi));
          cost_[part] += block.cost[k] * rest;
        }
      }
    });
    double error = 0, cost = 0;
    for (i64 p = 0; p < parts_; ++p) error += error_[p], cost += cost_[p];
    i64 masked = 0;
    for (i64 j = 0; j < M; ++j)
      if (!(b_[j] > 0)) lost_[masked++] = j;
    if (masked) columns_alone(masked);
    T *f = A.f + problem * N, *g = A.g + problem * M;
    for (i64 i = 0; i < N; ++i) phi_[i] *= unit_, f[i] = T(phi_[i]);
    for (i64 j = 0; j < M; ++j) {
      gamma_[j] = -unit_ * lse_col_[j] / (1 + pull_b_);  // gamma less log b, with all its digits
      g[j] = T(gamma_[j]);
    }
    A.value[problem] = T(value(problem)), A.cost[problem] = T(cost);
    A.marginal_error[problem] = T(error), A.n_iter[problem] = done;
  }

  // Dual objective at f and g, which phi_ and gamma_ now hold.
  double value(i64 problem) const {
    const double rho_a = A.rho_a.data[problem * A.rho_a.batch];
    const double rho_b = A.rho_b.data[problem * A.rho_b.batch];
    const auto side = [](const double* w, const double* h, i64 n, double rho, double* mass) {
      double s = 0;
      for (i64 k = 0; k < n; ++k) {
        if (!(w[k] > 0)) continue;
        s += rho < INFINITY ? -rho * w[k] * ::expm1(-h[k] / rho) : w[k] * h[k];
        *mass += rho < INFINITY ? w[k] * ::exp(-h[k] / rho) : w[k];
      }
      return s;
    };
    double mass_a = 0, mass_b = 0, plan = 0;
    double s = side(a_, phi_, N, rho_a, &mass_a) + side(b_, gamma_, M, rho_b, &plan);
    if (!(rho_a < INFINITY || rho_b < INFINITY)) return s;
    for (i64 j = 0; j < M; ++j) mass_b += b_[j];
    return s - A.eps.data[problem * A.eps.batch] * (plan - mass_a_ * mass_b);
  }
};

// Without labels no code asks for them: a branch in a tile costs some percent.
template <int kMetric_, bool kLabels_>
struct Kind {
  static constexpr int kMetric = kMetric_;
  static constexpr bool kLabels = kLabels_;
};
template <bool kLabels, class Run>
int with_metric(int metric, Run run) {
  if (metric == kL1) return run(Kind<kL1, kLabels>{});
  if (metric == kL2) return run(Kind<kL2, kLabels>{});
  return run(Kind<kSqEuclidean, kLabels>{});
}
template <class Args, class Run>
int with_kind(const Args& args, Run run) {
  return args.labels.cost.data ? with_metric<true>(args.metric, run)
                               : with_metric<false>(args.metric, run);
}

template <class T>
int points(const PointsArgs<T>& args) {
  const auto run = [&](auto kind) {
    using Kind = decltype(kind);
    using Solver = PointSinkhorn<T, Kind::kMetric, Kind::kLabels>;
    return each_problem(args, bytes_of<Solver>(args), [&](Scratch& scratch, Crew& crew, i64 problem,
                                                          Patience& patience) {
      return Solver(args, crew, scratch, patience).solve(problem);
    });
  };
  return with_kind(args, run);
}

// out_i = sum_j w_ij h(x_i, z_j) with w_ij = P_ij (u_i + v_j + kappa C_ij), by mode also over c(x_i, y_j),
// and h the value z_j, the difference x_i - z_j or its sign: products with the plan, with its transpose
// (the clouds in the other order) and gradients with respect to points.
template <class T, int kMetric, bool kLabels>
class PlanProduct {
 public:
  PlanProduct(const PlanProductArgs<T>& args, Crew& crew, Scratch& s, Patience& patience)
      : A(args), crew_(crew), patience_(patience), Y_(A.M, A.D, s), Z_(A.M, A.K, s),
        labels_(A.labels, A.N, A.M, false, s), ld_(buffer_width<T>(A.M)), block_(block_rows<T>(ld_)) {
    buffer_ = s.take<T>(A.threads * block_ * ld_);
    v_ = s.take<T>(ld_), gamma_ = s.take<double>(ld_);
  }

  int run(i64 problem) {
    if (!labels_.place(problem)) return kBadValue;
    Y_.place(A.y, problem);
    Z_.pack(A.z.data + problem * A.z.batch, A.z.row);
    const double unit = A.eps.data[problem * A.eps.batch] * 0.693147180559945309417;
    tiles_.D = A.D, tiles_.exact_scale = 1 / unit, tiles_.scale = T(1 / unit);
    tiles_.reach = reach_of<T, kMetric>(A.x, A.y, A.N, A.M, A.D, problem) + labels_.reach();
    for (i64 j = 0; j < ld_; ++j) {
      v_[j] = j < A.M ? at(A.v, problem, j) : T(0);
      if (j < A.M)
        gamma_[j] = ::log2(double(at(A.b, problem, j))) + double(at(A.g, problem, j)) / unit;
    }
    tiles_.split(gamma_, Y_);
    crew_.for_parts((A.N + block_ - 1) / block_, [&](i64 part, int thread) {
      if (patience_.look()) return;
      block(problem, part * block_, unit, buffer_ + thread * (block_ * ld_));
    });
    return kOk;
  }

 private:
  const PlanProductArgs<T>& A;
  Crew& crew_;
  Patience& patience_;
  Cloud<T> Y_;
  Panels<T> Z_;
  LabelCosts<T> labels_;
  i64 ld_, block_;
  Tiles<T, kMetric, kLabels> tiles_;
  T *buffer_, *v_;
  double* gamma_;

  template <class S>
  static S at(const Vectors<S>& w, i64 problem, i64 i) {
    return w.data[problem * w.batch + i * w.item];
  }

  void block(i64 problem, i64 i0, double unit, T* buffer) const {
    const i64 rows = least(block_, A.N - i0);
    const T* x = A.x.data + problem * A.x.batch;
    const Vec<T> zero{}, kappa = T(A.kappa.data[problem * A.kappa.batch]) - zero;
    RowBlock<T> block;
    T rest[kBlockRows] = {}, u[kBlockRows] = {};
    for (i64 k = 0; k < rows; ++k) {
      const double a = at(A.a, problem, i0 + k);
      const double phi = ::log2(a) + double(at(A.f, problem, i0 + k)) / unit;
      block.add(x + (i0 + k) * A.x.row, labels_.of_row(i0 + k), T(a > 0 ? -tiles_.grid.nearest(phi) : INFINITY));
      rest[k] = T(a > 0 ? ::exp2(phi + double(block.shift[k])) : 0), u[k] = at(A.u, problem, i0 + k);
    }
    block.fill_up();
    tiles_.sweep(
        block, Y_,
        [&](int k, i64 j, Vec<T>(&t)[kPointVecs], const Vec<T>* C, const Vec<T>* distance) {
          const Vec<T> low = Powers<T>::kLowest - zero, high = T(120) - zero;
          decltype(low > low) kept[kPointVecs];
          for (int v = 0; v < kPointVecs; ++v)
            kept[v] = t[v] > low, t[v] = t[v] > high ? high : t[v];
          exp2<T>(t);
          for (int v = 0; v < kPointVecs; ++v, j += kWidth<T>) {
            Vec<T> w = t[v] * rest[k] * (load(v_ + j) + u[k] + kappa * C[v]);
            if (A.over_distance) w = distance[v] > zero ? w / distance[v] : zero;
            store(buffer + k * ld_ + j, kept[v] ? w : zero);
          }
        },
        [] {});
    for (i64 k = 0; k < block.count; k += kPointRows)
      for (i64 d = 0; d < A.K; d += kPointVecs) {
        T* out = A.out + (problem * A.N + i0 + k) * A.K + d;
        const i64 height = least(kPointRows, rows - k), width = least(kPointVecs, A.K - d);
        if (A.mode == kValue) tile<kValue>(block.x + k, buffer + k * ld_, d, height, width, out);
        else if (A.mode == kSign) tile<kSign>(block.x + k, buffer + k * ld_, d, height, width, out);
        else tile<kDifference>(block.x + k, buffer + k * ld_, d, height, width, out);
      }
  }

  // Entries d .. d + width - 1 of `height` rows; dimensions from K on repeat the last.
  template <int kMode>
  void tile(const T* const* x, const T* w, i64 d, i64 height, i64 width, T* out) const {
    using Int = typename Traits<T>::Int;
    const Int sign_bit = ~magnitude_bits<T>();
    const Vec<T> zero{};
    double total[kPointRows][kPointVecs] = {};
    Vec<T> s[kPointRows][kPointVecs] = {};
    for (i64 p = 0; p < Z_.count; ++p) {
      for (i64 l = 0; l < kPointPanel<T>; l += kWidth<T>) {
        Vec<T> ws[kPointRows];
        for (int k = 0; k < kPointRows; ++k) ws[k] = load(w + k * ld_ + p * kPointPanel<T> + l);
        for (int c = 0; c < kPointVecs; ++c) {
          const i64 e = least(d + c, A.K - 1);
          const Vec<T> z = load(Z_.data + (p * A.K + e) * kPointPanel<T> + l);
          for (int k = 0; k < kPointRows; ++k) {
            if constexpr (kMode == kValue) s[k][c] += ws[k] * z;
            else {
              const Vec<T> t = broadcast<T>(x[k][e]) - z;
              if constexpr (kMode == kDifference) s[k][c] += ws[k] * t;
              else s[k][c] += t != zero ? (Vec<T>)((Int)ws[k] ^ ((Int)t & sign_bit)) : zero;
            }
          }
        }
      }
      if (p % 16 != 15 && p + 1 != Z_.count) continue;
      for (int k = 0; k < kPointRows; ++k)
        for (int c = 0; c < kPointVecs; ++c) total[k][c] += double(sum<T>(s[k][c])), s[k][c] = zero;
    }
    for (i64 k = 0; k < height; ++k)
      for (i64 c = 0; c < width; ++c) out[k * A.K + c] = T(total[k][c]);
  }
};

template <class T>
int plan_product(const PlanProductArgs<T>& args) {
  const auto run = [&](auto kind) {
    using Kind = decltype(kind);
    using Product = PlanProduct<T, Kind::kMetric, Kind::kLabels>;
    return each_problem(args, bytes_of<Product>(args), [&](Scratch& scratch, Crew& crew, i64 problem,
                                                           Patience& patience) {
      return Product(args, crew, scratch, patience).run(problem);
    });
  };
  return with_kind(args, run);
}

}  // namespace otdd::cpu::OTDD_ISA
