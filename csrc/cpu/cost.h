// Pairwise costs from differences, tile by tile, and the L1 cost's gradient.
#pragma once

#include "simd.h"

namespace otdd::cpu::OTDD_ISA {

constexpr i64 kRowBlock = 64, kColBlock = 256, kDepthBlock = 1024;

template <class T, int kMetric>
inline Vec<T> add_difference(Vec<T> sum, Vec<T> x, Vec<T> y) {
  const Vec<T> t = x - y;
  return kMetric == kL1 ? sum + vabs<T>(t) : sum + t * t;
}

// C[0..R) x [0..S) += the cost over `depth` features; tails of the last vector are masked by zeros.
template <class T, int kMetric, int kRows, int kCols>
inline void cost_tile(const T* x, i64 x_row, const T* y, i64 y_row, i64 depth, T* C, i64 ldc) {
  constexpr i64 W = kWidth<T>;
  Vec<T> s[kRows][kCols] = {};
  i64 d = 0;
  for (; d + W <= depth; d += W) {
    Vec<T> ys[kCols];
    for (int j = 0; j < kCols; ++j) ys[j] = load(y + j * y_row + d);
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> xi = load(x + i * x_row + d);
      for (int j = 0; j < kCols; ++j) s[i][j] = add_difference<T, kMetric>(s[i][j], xi, ys[j]);
    }
  }
  if (d < depth) {
    Vec<T> ys[kCols];
    for (int j = 0; j < kCols; ++j) ys[j] = load_some(y + j * y_row + d, depth - d);
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> xi = load_some(x + i * x_row + d, depth - d);
      for (int j = 0; j < kCols; ++j) s[i][j] = add_difference<T, kMetric>(s[i][j], xi, ys[j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) C[i * ldc + j] += sum<T>(s[i][j]);
}

template <class T, int kMetric>
void cost_block(const CostArgs<T>& A, i64 problem, i64 i0, i64 i1, i64 j0, i64 j1) {
  const T* x = A.x.data + problem * A.x.batch;
  const T* y = A.y.data + problem * A.y.batch;
  T* C = A.C + problem * A.N * A.M;
  for (i64 i = i0; i < i1; ++i)
    for (i64 j = j0; j < j1; ++j) C[i * A.M + j] = 0;
  for (i64 d = 0; d < A.D; d += kDepthBlock) {
    const i64 depth = least(kDepthBlock, A.D - d);
    i64 j = j0;
    for (; j < j1; j += j + 4 <= j1 ? 4 : 1) {
      const T* yj = y + j * A.y.row + d;
      const bool four = j + 4 <= j1;
      i64 i = i0;
      for (; i + 4 <= i1; i += 4) {
        const T* xi = x + i * A.x.row + d;
        if (four) cost_tile<T, kMetric, 4, 4>(xi, A.x.row, yj, A.y.row, depth, C + i * A.M + j, A.M);
        else cost_tile<T, kMetric, 4, 1>(xi, A.x.row, yj, A.y.row, depth, C + i * A.M + j, A.M);
      }
      for (; i < i1; ++i) {
        const T* xi = x + i * A.x.row + d;
        if (four) cost_tile<T, kMetric, 1, 4>(xi, A.x.row, yj, A.y.row, depth, C + i * A.M + j, A.M);
        else cost_tile<T, kMetric, 1, 1>(xi, A.x.row, yj, A.y.row, depth, C + i * A.M + j, A.M);
      }
    }
  }
  if (A.metric == kL2)
    for (i64 i = i0; i < i1; ++i)
      for (i64 j = j0; j < j1; ++j) C[i * A.M + j] = T(::sqrt(double(C[i * A.M + j])));
}

template <class T>
int cost(const CostArgs<T>& A) {
  const i64 rows = (A.N + kRowBlock - 1) / kRowBlock, cols = (A.M + kColBlock - 1) / kColBlock;
  const i64 blocks = A.B * rows * cols;
#pragma omp parallel for num_threads(A.threads) schedule(dynamic) if (A.threads > 1 && blocks > 1)
  for (i64 k = 0; k < blocks; ++k) {
    const i64 i0 = k / cols % rows * kRowBlock, j0 = k % cols * kColBlock;
    const i64 i1 = least(A.N, i0 + kRowBlock), j1 = least(A.M, j0 + kColBlock);
    if (A.metric == kL1) cost_block<T, kL1>(A, k / cols / rows, i0, i1, j0, j1);
    else cost_block<T, kSqEuclidean>(A, k / cols / rows, i0, i1, j0, j1);
  }
  return kOk;
}

// out[0..kRows) over kVecs vectors of features: G_ij with the sign of x - y, nothing where equal.
template <class T, int kRows, int kVecs>
inline void sign_tile(const SignSumArgs<T>& A, const T* x, const T* y, const T* G, T* out, i64 depth) {
  using Int = typename Traits<T>::Int;
  constexpr i64 W = kWidth<T>;
  const Int sign_bit = ~magnitude_bits<T>();
  const Vec<T> zero{};
  Vec<T> s[kRows][kVecs] = {}, xs[kRows][kVecs];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVecs; ++v) xs[i][v] = load_some(x + i * A.x.row + v * W, depth - v * W);
  for (i64 j = 0; j < A.M; ++j) {
    Vec<T> ys[kVecs];
    for (int v = 0; v < kVecs; ++v) ys[v] = load_some(y + j * A.y.row + v * W, depth - v * W);
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> g = broadcast<T>(G[i * A.G_row + j * A.G_col]);
      for (int v = 0; v < kVecs; ++v) {
        const Vec<T> t = xs[i][v] - ys[v];
        const Vec<T> signed_g = (Vec<T>)((Int)g ^ ((Int)t & sign_bit));
        s[i][v] += t != zero ? signed_g : zero;
      }
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVecs; ++v)
      if (v * W < depth) store_some(out + i * A.D + v * W, s[i][v], depth - v * W);
}

template <class T>
int sign_sum(const SignSumArgs<T>& A) {
  constexpr i64 kVecs = 4, kDepth = kVecs * kWidth<T>;
  const i64 row_blocks = (A.N + kRowBlock - 1) / kRowBlock, depths = (A.D + kDepth - 1) / kDepth;
  const i64 blocks = A.B * depths * row_blocks;
#pragma omp parallel for num_threads(A.threads) schedule(dynamic) if (A.threads > 1 && blocks > 1)
  for (i64 k = 0; k < blocks; ++k) {
    const i64 problem = k / row_blocks / depths, d = k / row_blocks % depths * kDepth;
    const i64 begin = k % row_blocks * kRowBlock, end = least(A.N, begin + kRowBlock);
    const T* y = A.y.data + problem * A.y.batch + d;
    for (i64 i = begin; i < end;) {
      const T* x = A.x.data + problem * A.x.batch + i * A.x.row + d;
      const T* G = A.G + problem * A.G_batch + i * A.G_row;
      T* out = A.out + (problem * A.N + i) * A.D + d;
      const i64 depth = least(kDepth, A.D - d);
      if (i + 2 <= end) sign_tile<T, 2, kVecs>(A, x, y, G, out, depth), i += 2;
      else sign_tile<T, 1, kVecs>(A, x, y, G, out, depth), i += 1;
    }
  }
  return kOk;
}

}  // namespace otdd::cpu::OTDD_ISA
