// Gradients of the costs that are sums over features: of each difference the derivative, weighted.
//
// dx_id = sum_j G_ij w(x_id - y_jd) and dy_jd = -sum_i G_ij w(x_id - y_jd), where w is the sign for
// the L1 cost and twice the difference for the squared one. Lanes run along the features or, if
// those are few, along the points of y.
#pragma once

#include "cost.h"

namespace otdd::cpu::OTDD_ISA {

// Sums run over blocks of kSumCols points of the other side, for runs of features: of kSumWidth vectors
// if there are that many.
constexpr i64 kSumCols = 192, kSumWidth = 16, kColumn = 1024;
// Both gradients, or that of the side with more points: a tile is kSumRows points of x, one vector of
// features and points of y, which are copied: rows of memory are then read in runs. Their gradient
// stays in the first level of the cache while that of x is in registers.
constexpr int kSumRows = kBytes == 64 ? 10 : 5;
// That of the side with fewer points: kRunPoints of y wait in registers, read where they lie, while up
// to kRunHeight of x go by, kRunRows at a time. Of kPageWidth vectors, a page of memory of each point of
// y, a run is done after the other, longer ones if points of x are few.
constexpr int kRunPoints = kBytes == 64 ? 8 : 4, kRunRows = kBytes == 64 ? 5 : 4;
constexpr i64 kRunHeight = 60, kPageWidth = 4096 / kBytes;
constexpr i64 kFewHeight = 12, kFewWidth = kSumWidth * kRunHeight / kFewHeight;

// The derivative of a difference's cost: its sign, 0 for 0, or half of that of its square.
template <class T, int kMetric>
inline Vec<T> derivative(Vec<T> t) {
  if constexpr (kMetric != kL1) return t;
#if defined(__AVX512F__)
  // Chooses by the class of t; from the lowest digit: two kinds of NaN, 0, 1, -inf, inf, < 0, > 0.
  constexpr long long kChoices = 0xa9a9a822;  // 2: NaN, 8: 0, 9: -1, a: 1
  if constexpr (sizeof(T) == 4)
    return (VecF)_mm512_fixupimm_ps((__m512)t, (__m512)t, _mm512_set1_epi32(int(kChoices)), 0);
  else
    return (VecD)_mm512_fixupimm_pd((__m512d)t, (__m512d)t, _mm512_set1_epi64(kChoices), 0);
#else
  using Int = typename Traits<T>::Int;
  const Int sign_bit = ~magnitude_bits<T>();
  return (Vec<T>)(((Int)broadcast<T>(1) | ((Int)t & sign_bit)) & (Int)(t != Vec<T>{}));
#endif
}

// dx[0..kRows) = or += and, with kBoth, dy[0..cols) -= at `depth` features, at most a vector; y and
// dy are packed.
template <class T, int kMetric, int kRows, bool kBoth>
inline void sums_tile(const CostBackwardArgs<T>& A, const T* x, const T* y, const T* G, i64 cols,
                      i64 depth, bool first, T* dx, [[maybe_unused]] T* dy) {
  constexpr i64 W = kWidth<T>;
  Vec<T> s[kRows] = {}, xs[kRows];
  for (int i = 0; i < kRows; ++i) xs[i] = load_some(x + i * A.x.row, depth);
  for (i64 j = 0; j < cols; ++j) {
    const Vec<T> yj = load(y + j * W);
    [[maybe_unused]] Vec<T> sy{};
    if constexpr (kBoth) sy = load(dy + j * W);
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> w = derivative<T, kMetric>(xs[i] - yj);
      const T g = G[i * A.G_row + j * A.G_col];
      s[i] += g * w;
      if constexpr (kBoth) sy -= g * w;
    }
    if constexpr (kBoth) store(dy + j * W, sy);
  }
  for (int i = 0; i < kRows; ++i) {
    T* out = dx + i * A.D;
    const Vec<T> sum = kMetric == kL1 ? s[i] : s[i] + s[i];
    store_some(out, first ? sum : sum + load_some(out, depth), depth);
  }
}

// to[0..rows) = or += from[0..rows), packed sums, doubled for the squared cost.
template <class T, int kMetric>
inline void add_rows(const T* from, i64 rows, i64 depth, bool first, T* to, i64 row) {
  for (i64 j = 0; j < rows; ++j) {
    const Vec<T> s = load(from + j * kWidth<T>), sum = kMetric == kL1 ? s : s + s;
    T* out = to + j * row;
    store_some(out, first ? sum : sum + load_some(out, depth), depth);
  }
}

// Points of y by vectors of features, and of one such vector their gradient. An odd number of them,
// lest the vectors of one point share the sets of a cache.
template <class T>
struct Copies {
  static constexpr i64 kPanel = (kSumCols + 1) * kWidth<T>;
  T *y, *dy;
  explicit Copies(Scratch& s) : y(s.take<T>(kSumWidth * kPanel)), dy(s.take<T>(kPanel)) {}
};

// The gradient at `depth` features of `rows` points of x and, with kBoth, of all points of y. Sums
// are made of those over blocks of kSumCols points, on either side, so that a gradient is the same
// whether it is made with the other or alone.
template <class T, int kMetric, bool kBoth>
void sums_block(const CostBackwardArgs<T>& A, const T* x, const T* y, const T* G, i64 rows,
                i64 depth, T* dx, T* dy, const Copies<T>& copies) {
  constexpr i64 W = kWidth<T>;
  const i64 tiles = (rows / kSumRows + 1) * ((depth + W - 1) / W);
  const i64 share = (kSumCols + tiles - 1) / tiles;  // points to prefetch during a tile
  for (i64 j0 = 0; j0 < A.M; j0 += kSumCols) {
    const i64 cols = least(kSumCols, A.M - j0);
    for (i64 j = 0; j < cols; ++j)
      for (i64 d = 0; d < depth; d += W)
        store(copies.y + d / W * copies.kPanel + j * W,
              load_some(y + (j0 + j) * A.y.row + d, depth - d));
    i64 ahead = j0 + kSumCols;
    for (i64 d = 0; d < depth; d += W) {
      i64 i = 0;
      const auto tile = [&](auto kRows) {
        for (const i64 end = least(A.M, ahead + share); ahead < end; ++ahead)
          for (i64 v = 0; v < depth; v += W) __builtin_prefetch(y + ahead * A.y.row + v, 0, 2);
        sums_tile<T, kMetric, kRows, kBoth>(
            A, x + i * A.x.row + d, copies.y + d / W * copies.kPanel, G + i * A.G_row + j0 * A.G_col, cols,
            least(W, depth - d), j0 == 0, dx + i * A.D + d, copies.dy);
        i += kRows;
      };
      while (i < rows) {
        const bool first = i == 0;
        const i64 end = kBoth ? least(rows, i + kSumCols) : rows;
        if (kBoth)
          for (i64 k = 0; k < cols * W; k += W) store(copies.dy + k, Vec<T>{});
        while (i + kSumRows <= end) tile(Constant<kSumRows>{});
        while (i + 4 <= end) tile(Constant<4>{});
        while (i < end) tile(Constant<1>{});
        if (kBoth)
          add_rows<T, kMetric>(copies.dy, cols, least(W, depth - d), first, dy + j0 * A.D + d, A.D);
      }
    }
  }
}

// Points of x by vectors of features, and the sums of a run; weights, an odd number of lines to a row.
template <class T>
struct Runs {
  static constexpr i64 kWeights = kSumCols + 64 / i64(sizeof(T));
  T *x, *sums, *G;
  explicit Runs(Scratch& s)
      : x(s.take<T>(kPageWidth * kRunHeight * kWidth<T>)),
        sums(s.take<T>(kSumWidth * kRunHeight * kWidth<T>)), G(s.take<T>(kRunHeight * kWeights)) {}
};

// sums[0..kRows) += what the points `ys` give, one after the other, at one vector of features.
template <class T, int kMetric, int kRows, int kPoints>
inline void run_tile(const T* x, const Vec<T> (&ys)[kPoints], const T* G, T* sums) {
  constexpr i64 W = kWidth<T>, row = Runs<T>::kWeights;
  Vec<T> s[kRows], xs[kRows];
  for (int i = 0; i < kRows; ++i) xs[i] = load(x + i * W), s[i] = load(sums + i * W);
  for (int k = 0; k < kPoints; ++k)
    for (int i = 0; i < kRows; ++i)
      s[i] += G[i * row + k] * derivative<T, kMetric>(xs[i] - ys[k]);
  for (int i = 0; i < kRows; ++i) store(sums + i * W, s[i]);
}

// The gradient at `depth` features of `rows` points of x, as by sums_block to the bit.
template <class T, int kMetric>
void run_sums(const CostBackwardArgs<T>& A, const T* x, const T* y, const T* G, i64 rows, i64 depth,
              T* dx, const Runs<T>& runs) {
  constexpr i64 W = kWidth<T>;
  // Of the vectors from `begin` to `end`: where they begin, how many features they have.
  const auto each = [&](i64 begin, i64 end, auto part) __attribute__((always_inline)) {
    for (i64 d = begin; d < end; d += W) part(d, least(W, end - d));
  };
  const i64 run = (rows <= kFewHeight ? kFewWidth : kSumWidth) * W;
  each(0, depth, [&](i64 d, i64 count) {
    for (i64 i = 0; i < rows; ++i)
      store(runs.x + d * rows + i * W, load_some(x + i * A.x.row + d, count));
  });
  for (i64 j0 = 0; j0 < A.M; j0 += kSumCols) {
    const i64 end = j0 + least(kSumCols, A.M - j0);
    if (A.G_col == 1)
      for (i64 i = 0; i < rows; ++i)
        __builtin_memcpy(runs.G + i * runs.kWeights, G + i * A.G_row + j0, (end - j0) * sizeof(T));
    else
      for (i64 j = j0; j < end; ++j)
        for (i64 i = 0; i < rows; ++i)
          runs.G[i * runs.kWeights + j - j0] = G[i * A.G_row + j * A.G_col];
    for (i64 d0 = 0; d0 < depth; d0 += run) {
      const i64 d1 = least(depth, d0 + run);
      T* const sums = runs.sums - d0 * rows;  // found by the offsets of runs.x
      for (i64 k = d0 * rows; k < round_up(d1, W) * rows; k += W) store(sums + k, Vec<T>{});
      i64 j = j0;
      const auto pass = [&](auto kPoints) {
        const i64 next = least(kPoints, A.M - j - kPoints);  // points to prefetch meanwhile
        each(d0, d1, [&](i64 d, i64 count) __attribute__((always_inline)) {
          const T* p = y + j * A.y.row + d;
          Vec<T> ys[kPoints];
          for (int k = 0; k < kPoints; ++k) ys[k] = load_some(p + k * A.y.row, count);
          for (i64 k = 0; k < next; ++k) __builtin_prefetch(p + (kPoints + k) * A.y.row, 0, 2);
          i64 i = 0;
          const auto tile = [&](auto kRows) __attribute__((always_inline)) {
            const i64 at = d * rows + i * W;
            run_tile<T, kMetric, kRows>(runs.x + at, ys, runs.G + i * runs.kWeights + j - j0, sums + at);
            i += kRows;
          };
          while (i + kRunRows <= rows) tile(Constant<kRunRows>{});
          while (i + 2 <= rows) tile(Constant<2>{});
          while (i < rows) tile(Constant<1>{});
        });
        j += kPoints;
      };
      while (j + kRunPoints <= end) pass(Constant<kRunPoints>{});
      while (j < end) pass(Constant<1>{});
      each(d0, d1, [&](i64 d, i64 count) {
        add_rows<T, kMetric>(sums + d * rows, rows, count, j0 == 0, dx + d, A.D);
      });
    }
  }
}

// Features are shared among threads in runs, shorter if there are few.
template <class T, int kMetric, bool kBoth>
int sums(const CostBackwardArgs<T>& A, Patience& patience) {
  const bool runs = !kBoth && A.N <= A.M;
  i64 height = kBoth ? A.N : least(A.N, kRowBlock);  // dx is the same whatever the block
  if (runs) {
    const i64 blocks = (A.N + kRunHeight - 1) / kRunHeight;
    height = (A.N + blocks - 1) / blocks;
  }
  i64 width = (runs ? kPageWidth : kSumWidth) * kWidth<T>;
  const auto count = [&] { return A.B * ((A.D + width - 1) / width) * ((A.N + height - 1) / height); };
  while (width > kWidth<T> && count() < 4 * A.threads) width /= 2;
  while (!kBoth && height > 16 && count() < 4 * A.threads) height /= 2;
  const i64 chunks = (A.D + width - 1) / width, blocks = (A.N + height - 1) / height;
  const i64 parts = count();
  int status = kOk;
  Scratch needed;
  if (runs) Runs<T>{needed};
  else Copies<T>{needed};
#pragma omp parallel num_threads(A.threads) if (A.threads > 1 && parts > 1)
  {
    Scratch scratch(needed.used());
    if (!scratch.ok()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
#pragma omp for schedule(dynamic) nowait
    for (i64 k = 0; k < parts; ++k) {
      if (!scratch.ok() || patience.look()) continue;
      const i64 p = k / chunks / blocks, i = k / chunks % blocks * height, d = k % chunks * width;
      const T* x = A.x.data + p * A.x.batch + i * A.x.row + d;
      const T* y = A.y.data + p * A.y.batch + d;
      const T* G = A.G + p * A.G_batch + i * A.G_row;
      const i64 rows = least(height, A.N - i), depth = least(width, A.D - d);
      T* dx = A.dx + (p * A.N + i) * A.D + d;
      T* dy = kBoth ? A.dy + p * A.M * A.D + d : nullptr;
      scratch.rewind();
      if (runs)
        run_sums<T, kMetric>(A, x, y, G, rows, depth, dx, Runs<T>(scratch));
      else
        sums_block<T, kMetric, kBoth>(A, x, y, G, rows, depth, dx, dy, Copies<T>(scratch));
    }
  }
  return status;
}

// kRows entries of dx, and part of dy, at one feature; lanes run along `cols` points of y.
template <class T, int kMetric, int kRows>
inline void column_tile(const CostBackwardArgs<T>& A, const T* x, const T* ys, const T* G, i64 cols,
                        bool first, T* dx, T* sy) {
  Vec<T> s[kRows] = {}, xs[kRows];
  for (int i = 0; i < kRows; ++i) xs[i] = broadcast<T>(x[i * A.x.row]);
  for (i64 j = 0; j < cols; j += kWidth<T>) {
    const Vec<T> y = load(ys + j);
    Vec<T> column = load(sy + j);
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> g = load_some(G + i * A.G_row + j, cols - j);
      const Vec<T> w = derivative<T, kMetric>(xs[i] - y);
      s[i] += g * w;
      column -= g * w;
    }
    store(sy + j, column);
  }
  for (int i = 0; dx && i < kRows; ++i) {
    const T total = sum<T>(kMetric == kL1 ? s[i] : s[i] + s[i]);
    dx[i * A.D] = first ? total : dx[i * A.D] + total;
  }
}

// Both gradients, those that are wanted, at one feature.
template <class T, int kMetric>
void column(const CostBackwardArgs<T>& A, const T* x, const T* y, const T* G, T* dx, T* dy) {
  alignas(64) T ys[kColumn], sy[kColumn];
  for (i64 j0 = 0; j0 < A.M; j0 += kColumn) {
    const i64 cols = least(kColumn, A.M - j0);
    for (i64 j = 0; j < round_up(cols, kWidth<T>); ++j) {
      ys[j] = j < cols ? y[(j0 + j) * A.y.row] : T(0);
      sy[j] = 0;
    }
    i64 i = 0;
    const auto tile = [&](auto kRows) {
      column_tile<T, kMetric, kRows>(A, x + i * A.x.row, ys, G + i * A.G_row + j0, cols, j0 == 0,
                                     dx ? dx + i * A.D : nullptr, sy);
      i += kRows;
    };
    while (i + kSumRows <= A.N) tile(Constant<kSumRows>{});
    while (i < A.N) tile(Constant<1>{});
    for (i64 j = 0; dy && j < cols; ++j) dy[(j0 + j) * A.D] = kMetric == kL1 ? sy[j] : 2 * sy[j];
  }
}

template <class T, int kMetric>
void columns(const CostBackwardArgs<T>& A, Patience& patience) {
  const i64 parts = A.B * A.D;
#pragma omp parallel for num_threads(A.threads) schedule(dynamic) if (A.threads > 1 && parts > 1)
  for (i64 k = 0; k < parts; ++k) {
    if (patience.look()) continue;
    const i64 p = k / A.D, d = k % A.D;
    column<T, kMetric>(A, A.x.data + p * A.x.batch + d, A.y.data + p * A.y.batch + d,
                       A.G + p * A.G_batch, A.dx ? A.dx + p * A.N * A.D + d : nullptr,
                       A.dy ? A.dy + p * A.M * A.D + d : nullptr);
  }
}

// One pass makes both gradients, if there are enough features to share among threads.
template <class T, int kMetric>
int cost_gradients(const CostBackwardArgs<T>& A, Patience& patience) {
  if (A.D <= kWidth<T>) {
    columns<T, kMetric>(A, patience);
    return kOk;
  }
  const bool enough = A.B * ((A.D + kWidth<T> - 1) / kWidth<T>) >= A.threads;
  if (A.dx && A.dy && enough) return sums<T, kMetric, true>(A, patience);
  int status = A.dx ? sums<T, kMetric, false>(A, patience) : kOk;
  if (status == kOk && A.dy) {
    const CostBackwardArgs<T> swapped{A.B, A.M, A.N, A.D, A.y, A.x, A.metric, A.G, A.G_batch,
                                      A.G_col, A.G_row, A.dy, nullptr, A.threads};
    status = sums<T, kMetric, false>(swapped, patience);
  }
  return status;
}

template <class T>
int cost_backward(const CostBackwardArgs<T>& A) {
  Patience patience;
  const int status = A.metric == kL1 ? cost_gradients<T, kL1>(A, patience)
                                     : cost_gradients<T, kSqEuclidean>(A, patience);
  return patience.over() ? kInterrupted : status;
}

}  // namespace otdd::cpu::OTDD_ISA
