// Pairwise costs from differences, tile by tile: nothing cancels, and no buffer of N x M x D.
#pragma once

#include "patience.h"

namespace otdd::cpu::OTDD_ISA {

// A tile is kTileRows points of x against kTileVecs vectors of points of y, one point a lane; its
// sums stay in registers. For it kPackDepth features of y at a time are transposed into a panel,
// which all rows of the block then use. Blocks are of kRowBlock points of x and one panel.
constexpr int kTileRows = kBytes == 64 ? 6 : 4, kTileVecs = kBytes == 64 ? 4 : 2;
constexpr i64 kPackDepth = 128, kRowBlock = 252, kFewPoints = 8;
template <class T>
constexpr i64 kPanel = kTileVecs * kWidth<T>;

// A 1 that the compiler can't see through: x - y * one is then a fused multiply-add, with the same
// result as x - y, and leaves the adder to the sums.
template <class T>
inline Vec<T> hidden_one() {
  Vec<T> one = broadcast<T>(1);
#if defined(__AVX512F__)
  asm("" : "+v"(one));
#elif defined(__FMA__)
  asm("" : "+x"(one));
#endif
  return one;
}

template <class T, int kMetric>
inline Vec<T> add_difference(Vec<T> sum, Vec<T> x, Vec<T> y, [[maybe_unused]] Vec<T> one) {
  if constexpr (kMetric == kL1) return sum + vabs<T>(x - y * one);
  const Vec<T> t = x - y;
  return sum + t * t;
}

#if defined(__AVX512F__)
// Transposes kWidth rows of kWidth. Each round moves the highest bit of the row's number to the end
// of the column's, and that of the column's to the end of the row's.
template <class T>
inline void transpose(Vec<T>* r) {
  constexpr int W = kWidth<T>;
  typename Traits<T>::Int low, high;
  for (int l = 0; l < W; ++l) low[l] = l / 2 + l % 2 * W, high[l] = low[l] + W / 2;
  for (int round = 1; round < W; round *= 2) {
    Vec<T> t[W];
    for (int i = 0; i < W / 2; ++i) {
      const Vec<T> a = r[i], b = r[i + W / 2];
      if constexpr (sizeof(T) == 4) {
        t[2 * i] = (Vec<T>)_mm512_permutex2var_ps((__m512)a, (__m512i)low, (__m512)b);
        t[2 * i + 1] = (Vec<T>)_mm512_permutex2var_ps((__m512)a, (__m512i)high, (__m512)b);
      } else {
        t[2 * i] = (Vec<T>)_mm512_permutex2var_pd((__m512d)a, (__m512i)low, (__m512d)b);
        t[2 * i + 1] = (Vec<T>)_mm512_permutex2var_pd((__m512d)a, (__m512i)high, (__m512d)b);
      }
    }
    for (int i = 0; i < W; ++i) r[i] = t[i];
  }
}
#endif

// panel[d][l] = y[l][d], 0 beyond the `cols` points; `panel` has room for kPackDepth features.
template <class T>
inline void pack(const T* y, i64 row, i64 cols, i64 depth, T* panel) {
  constexpr i64 P = kPanel<T>;
#if defined(__AVX512F__)
  constexpr i64 W = kWidth<T>;
  for (i64 l = 0; l < P; l += W)
    for (i64 d = 0; d < depth; d += W) {
      Vec<T> r[W];
      for (i64 k = 0; k < W; ++k)
        r[k] = l + k < cols ? load_some(y + (l + k) * row + d, depth - d) : Vec<T>{};
      transpose<T>(r);
      for (i64 k = 0; k < W; ++k) store(panel + (d + k) * P + l, r[k]);
    }
#else
  for (i64 l = 0; l < P; ++l)
    for (i64 d = 0; d < depth; ++d) panel[d * P + l] = l < cols ? y[l * row + d] : T(0);
#endif
}

// C[0..kRows) x [0..cols) = or += the cost over `depth` features.
template <class T, int kMetric, int kRows, int kVecs>
inline void cost_tile(const T* x, i64 x_row, const T* panel, i64 depth, bool first, T* C, i64 ldc,
                      i64 cols) {
  constexpr i64 W = kWidth<T>;
  const Vec<T> one = hidden_one<T>();
  Vec<T> s[kRows][kVecs] = {};
  for (i64 d = 0; d < depth; ++d) {
    Vec<T> ys[kVecs];
    for (int v = 0; v < kVecs; ++v) ys[v] = load(panel + d * kPanel<T> + v * W);
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> xi = broadcast<T>(x[i * x_row + d]);
      for (int v = 0; v < kVecs; ++v)
        s[i][v] = add_difference<T, kMetric>(s[i][v], xi, ys[v], one);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVecs; ++v) {
      T* c = C + i * ldc + v * W;
      const i64 count = cols - v * W;
      store_some(c, first ? s[i][v] : s[i][v] + load_some(c, count), count);
    }
}

template <class T, int kMetric, int kRows>
inline void cost_rows(const T* x, i64 x_row, const T* panel, i64 depth, bool first, T* C, i64 ldc,
                      i64 cols) {
  if (cols == kPanel<T>)
    return cost_tile<T, kMetric, kRows, kTileVecs>(x, x_row, panel, depth, first, C, ldc, cols);
  for (i64 j = 0; j < cols; j += kWidth<T>)
    cost_tile<T, kMetric, kRows, 1>(x, x_row, panel + j, depth, first, C + j, ldc, cols - j);
}

// Features [d, d + kPackDepth) of point y, for the next panel.
template <class T>
inline void prefetch(const T* y, i64 d, i64 D) {
  for (const T* end = y + least(D, d + kPackDepth); y + d < end; d += 64 / i64(sizeof(T)))
    __builtin_prefetch(y + d, 0, 2);
}

template <class T, int kMetric>
void cost_block(const CostArgs<T>& A, const T* x, const T* y, i64 rows, i64 cols, T* C) {
  alignas(64) T panel[kPackDepth * kPanel<T>];
  const i64 share = (cols * kTileRows + rows - 1) / rows;  // points to prefetch during one tile
  for (i64 d = 0; d < A.D; d += kPackDepth) {
    const i64 depth = least(kPackDepth, A.D - d);
    const bool first = d == 0;
    pack(y + d, A.y.row, cols, depth, panel);
    i64 i = 0, ahead = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
      for (const i64 end = least(cols, ahead + share); ahead < end; ++ahead)
        prefetch(y + ahead * A.y.row, d + kPackDepth, A.D);
      cost_rows<T, kMetric, kTileRows>(x + i * A.x.row + d, A.x.row, panel, depth, first,
                                       C + i * A.M, A.M, cols);
    }
    for (; i < rows; ++i)
      cost_rows<T, kMetric, 1>(x + i * A.x.row + d, A.x.row, panel, depth, first, C + i * A.M, A.M,
                               cols);
  }
}

// Many features, or few points on one side, need no panels: here lanes run along the features, and
// a tile of kSide x kSide points keeps its sums in registers for up to kStep bytes of each. Sums of
// whole vectors wait in `parts`, one for every entry of the block.
constexpr int kSide = kBytes == 64 ? 5 : 3;
constexpr i64 kStep = 16384, kSideRows = 240, kSideCols = 480, kFewCols = 60;
// Points of x are copied kApart lines of the cache apart, modulo its sets: if features are a power of
// two, the same features of all points share a set and push each other out. The copy is made where
// 2 kFewCols points of y or more use it and it takes no more than kCopied bytes.
constexpr i64 kLine = 64, kSets = 64, kApart = 13, kCopied = 1 << 21;
constexpr i64 kUnseen = 1 << 28;  // differences made before patience is asked again

template <int kValue>
struct Constant {
  constexpr operator int() const { return kValue; }
};

// Points whose features are fetched while others are worked on.
template <class T>
struct Ahead {
  const T* y;
  i64 row, begin, end;
};

template <class T, int kMetric, int kRows, int kCols>
inline void feature_tile(const T* x, i64 x_row, const T* y, i64 y_row, i64 depth, bool first,
                         const Ahead<T>& ahead, Vec<T>* parts) {
  constexpr i64 W = kWidth<T>;
  const Vec<T> one = hidden_one<T>();
  Vec<T> s[kRows][kCols] = {};
  if (!first)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kCols; ++j) s[i][j] = parts[i * kCols + j];
  const auto step = [&](auto take) __attribute__((always_inline)) {
    Vec<T> ys[kCols];
    for (int j = 0; j < kCols; ++j) ys[j] = take(y + j * y_row);
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> xi = take(x + i * x_row);
      for (int j = 0; j < kCols; ++j)
        s[i][j] = add_difference<T, kMetric>(s[i][j], xi, ys[j], one);
    }
  };
  i64 d = 0;
  for (; d + W <= depth; d += W) {
    for (i64 j = ahead.begin; j < ahead.end; ++j)
      __builtin_prefetch(ahead.y + j * ahead.row + d, 0, 2);
    step([&](const T* p) __attribute__((always_inline)) { return load(p + d); });
  }
  if (d < depth)
    step([&](const T* p) __attribute__((always_inline)) { return load_some(p + d, depth - d); });
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) parts[i * kCols + j] = s[i][j];
}

// Costs of kCols points of y; `next` more follow, of which the first features are fetched meanwhile.
template <class T, int kMetric, int kCols>
void feature_columns(const CostArgs<T>& A, const T* x, i64 x_row, const T* y, i64 rows, i64 next, T* C) {
  constexpr i64 W = kWidth<T>, longest = kStep / i64(sizeof(T));
  const i64 steps = (A.D + longest - 1) / longest, step = round_up((A.D + steps - 1) / steps, W);
  Vec<T> parts[kSideRows * kSide + W];
  const i64 tiles = rows / kSide + rows % kSide / 2 + rows % kSide % 2;
  for (i64 d = 0; d < A.D; d += step) {
    const bool last = d + step >= A.D;
    const i64 depth = least(step, A.D - d), points = last ? next : kCols;
    Ahead<T> ahead{last ? y + kCols * A.y.row : y + d + step, A.y.row, 0, 0};
    i64 i = 0, done = 0;
    const auto tile = [&](auto kRows) __attribute__((always_inline)) {
      ahead.begin = points * done / tiles, ahead.end = points * ++done / tiles;
      feature_tile<T, kMetric, kRows, kCols>(x + i * x_row + d, x_row, y + d, A.y.row, depth, d == 0,
                                             ahead, parts + i * kCols);
      i += kRows;
    };
    while (i + kSide <= rows) tile(Constant<kSide>{});
    while (i + 2 <= rows) tile(Constant<2>{});
    while (i < rows) tile(Constant<1>{});
  }
  for (i64 k = 0; k < W; ++k) parts[rows * kCols + k] = Vec<T>{};
  for (i64 k = 0; k < rows * kCols; k += W) {
    alignas(kBytes) T total[W];
    store(total, sums<T, int(W)>(0, [&](int l) { return parts[k + l]; }));
    for (i64 l = 0; l < least(W, rows * kCols - k); ++l)
      C[(k + l) / kCols * A.M + (k + l) % kCols] = total[l];
  }
}

// The length of a row in that copy.
template <class T>
i64 row_apart(i64 D) {
  const i64 lines = (D * i64(sizeof(T)) + kLine - 1) / kLine;
  return (lines + (kApart - lines % kSets + kSets) % kSets) * kLine / i64(sizeof(T));
}

// Costs of a block, lanes along the features.
template <class T, int kMetric>
void feature_block(const CostArgs<T>& A, const T* x, const T* y, i64 rows, i64 cols, T* C) {
  i64 x_row = A.x.row;
  const i64 apart = row_apart<T>(A.D), bytes = rows * apart * i64(sizeof(T));
  const bool copied = cols >= 2 * kFewCols && bytes <= kCopied;
  Scratch scratch(copied ? bytes : 0);
  if (copied && scratch.ok()) {
    T* copy = scratch.take<T>(rows * apart);
    for (i64 i = 0; i < rows; ++i)
      __builtin_memcpy(copy + i * apart, x + i * x_row, A.D * sizeof(T));
    x = copy, x_row = apart;
  }
  i64 j = 0;
  for (; j + kSide <= cols; j += kSide)
    feature_columns<T, kMetric, kSide>(A, x, x_row, y + j * A.y.row, rows,
                                       least(kSide, cols - j - kSide), C + j);
  for (; j < cols; ++j)
    feature_columns<T, kMetric, 1>(A, x, x_row, y + j * A.y.row, rows, least(1, cols - j - 1), C + j);
}

// |x - y| where its square over- or underflows: differences are divided by the largest.
template <class T>
T scaled_distance(const T* x, const T* y, i64 D) {
  double top = 0, s = 0;
  for (i64 d = 0; d < D; ++d) {
    const double t = ::fabs(double(x[d]) - double(y[d]));
    if (!(t <= top)) top = t;
  }
  if (!(top > 0 && top < HUGE_VAL)) return T(top);  // no distance, one beyond all numbers, NaN
  for (i64 d = 0; d < D; ++d) {
    const double t = (double(x[d]) - double(y[d])) / top;
    s += t * t;
  }
  return T(top * ::sqrt(s));
}

inline float root(float s) { return ::sqrtf(s); }
inline double root(double s) { return ::sqrt(s); }

// Squared distances from x become distances.
template <class T>
void take_roots(const T* x, const T* y, i64 y_row, i64 D, i64 cols, T* c) {
  constexpr T kTiny = T(sizeof(T) == 4 ? 1e-30 : 1e-290), kHuge = T(sizeof(T) == 4 ? 3e38 : 1e308);
  int lost = 0;
  for (i64 j = 0; j < cols; ++j) lost += !((c[j] >= kTiny) & (c[j] <= kHuge));
  if (lost == 0)
    for (i64 j = 0; j < cols; ++j) c[j] = root(c[j]);
  else
    for (i64 j = 0; j < cols; ++j)
      c[j] = c[j] >= kTiny && c[j] <= kHuge ? root(c[j]) : scaled_distance(x, y + j * y_row, D);
}

template <class T>
bool along_features(const CostArgs<T>& A) {
  return A.D >= 32 * kWidth<T> || (least(A.N, A.M) < kFewPoints && A.D >= kWidth<T>);
}

template <class T, int kMetric>
void cost_part(const CostArgs<T>& A, const T* x, const T* y, i64 rows, i64 cols, T* C) {
  if (along_features(A)) feature_block<T, kMetric>(A, x, y, rows, cols, C);
  else cost_block<T, kMetric>(A, x, y, rows, cols, C);
  if (A.metric == kL2)
    for (i64 i = 0; i < rows; ++i)
      take_roots(x + i * A.x.row, y, A.y.row, A.D, cols, C + i * A.M);
}

template <class T>
int cost(const CostArgs<T>& A) {
  const bool features = along_features(A);  // an entry's sum is the same in any block
  i64 width = features ? kSideCols : kPanel<T>, height = features ? kSideRows : kRowBlock;
  if (features)
    while (height > 30 && least(height, A.N) * row_apart<T>(A.D) * i64(sizeof(T)) > kCopied) height /= 2;
  const auto count = [&] { return A.B * ((A.M + width - 1) / width) * ((A.N + height - 1) / height); };
  while (features && width > kFewCols &&
         (count() < 4 * A.threads || least(height, A.N) * width * A.D > kUnseen))
    width /= 2;
  while (height > 30 && count() < 4 * A.threads) height /= 2;
  const i64 cols = (A.M + width - 1) / width, rows = (A.N + height - 1) / height, parts = count();
  Patience patience;
#pragma omp parallel for num_threads(A.threads) schedule(dynamic) if (A.threads > 1 && parts > 1)
  for (i64 k = 0; k < parts; ++k) {
    if (patience.look()) continue;
    const i64 problem = k / cols / rows, i = k / cols % rows * height, j = k % cols * width;
    const T* x = A.x.data + problem * A.x.batch + i * A.x.row;
    const T* y = A.y.data + problem * A.y.batch + j * A.y.row;
    T* C = A.C + (problem * A.N + i) * A.M + j;
    const i64 n = least(height, A.N - i), m = least(width, A.M - j);
    if (A.metric == kL1) cost_part<T, kL1>(A, x, y, n, m, C);
    else cost_part<T, kSqEuclidean>(A, x, y, n, m, C);
  }
  return patience.over() ? kInterrupted : kOk;
}

}  // namespace otdd::cpu::OTDD_ISA
