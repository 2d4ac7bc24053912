// The matrix kept in memory while an iteration runs on it, and the one loop that uses it.
//
// Forward iteration, unrolled backward and conjugate gradients all do the same with K: a product
// with every row, a few numbers per row made of it, and the transposed product with those.
#pragma once

#include "crew.h"

namespace otdd::cpu::OTDD_ISA {

// Rows are worked in parts fixed by the shape alone, so that sums, and so results, don't depend on
// the number of threads.
constexpr i64 kMaxParts = 8;
inline i64 parts_of(i64 N, i64 M) { return N * M < (1 << 16) ? 1 : least(kMaxParts, (N + 63) / 64); }

// out = exp(column_j - c_j / eps - shift) for kCount vectors; there are `count` costs. The exponent is
// formed in double: it is a small difference of large numbers.
template <class T, int kCount>
inline void entries(const T* c, i64 count, const double* column, double inv_eps, double shift,
                    Vec<T> (&out)[kCount]) {
  constexpr i64 W = kWidth<T>;
  alignas(kBytes) T lane[kCount * W];
  if (count < kCount * W) {
    for (i64 j = 0; j < kCount * W; j += W) store(lane + j, load_some(c + j, most(0, count - j)));
    c = lane;
  }
  for (int v = 0; v < kCount; ++v)
    out[v] = narrowed<T>([&](i64 h) __attribute__((always_inline)) {
      return (load(column + v * W + h) - widen(c + v * W + h) * inv_eps - shift) * kLog2e;
    });
  powers_or_zero<T>(out);
}

// visit(j, entries from j on) for all of a row, `padded` of them; some at a time, as one exp alone
// would wait for its own results.
template <class T, class Visit>
inline void for_entries(const T* c, i64 count, i64 padded, const double* column, double inv_eps,
                        double shift, Visit visit) {
  constexpr int kTogether = 4;
  constexpr i64 W = kWidth<T>;
  i64 j = 0;
  for (; j + kTogether * W <= padded; j += kTogether * W) {
    Vec<T> e[kTogether];
    entries<T>(c + j, count - j, column + j, inv_eps, shift, e);
    for (int v = 0; v < kTogether; ++v) visit(j + v * W, e[v]);
  }
  for (; j < padded; j += W) {
    Vec<T> e[1];
    entries<T>(c + j, count - j, column + j, inv_eps, shift, e);
    visit(j, e[0]);
  }
}

template <class T>
struct Resident {
  i64 N, M, ld, parts, per_part, block;
  Crew& crew;  // the threads that share this matrix
  Patience& patience;
  i64 work = 0;  // since patience was asked last
  T* K;      // (N, ld), columns from M on are 0
  T* partial;  // (parts, ld)

  static constexpr i64 kMaxBlock = 64;  // a multiple of every kWidth
  static constexpr i64 kTogether = kBytes == 64 ? 8 : least(4, kWidth<T>);

  Resident(i64 N, i64 M, Crew& crew, Scratch& scratch, Patience& patience)
      : N(N), M(M), ld(round_up(M, kWidth<T>)), parts(parts_of(N, M)), crew(crew),
        patience(patience) {
    per_part = round_up((N + parts - 1) / parts, kWidth<T>);
    block = 16384 / (ld * i64(sizeof(T))) / kWidth<T> * kWidth<T>;  // half of a common L1
    block = least(kMaxBlock, most(kWidth<T>, block));
    K = scratch.take<T>(N * ld);
    partial = scratch.take<T>(parts * ld);
  }

  T* row(i64 i) { return K + i * ld; }

  // fn(part, first row, end row) for every part; parts are left out once patience is over.
  template <class Fn>
  void for_parts(Fn fn) {
    work += N * ld;
    const bool look = work > Patience::kWork;
    if (look) work = 0;
    crew.for_parts(parts, [&](i64 p, int) {
      if (look && patience.look()) return;
      const i64 begin = least(N, p * per_part);
      fn(p, begin, least(N, begin + per_part));
    });
  }

  // col = K' coefficients, where, kWidth rows at a time, produce(i, rows, dots) gives the rows'
  // products (entries from `rows` on stay 1) and weigh(part, i, rows, dots, coefficients) what to
  // weigh the rows with. A block of rows is still in cache when it is weighed.
  template <class Produce, class Weigh>
  void sweep(Produce produce, Weigh weigh, T* col) {
    constexpr i64 W = kWidth<T>;
    for_parts([&](i64 part, i64 begin, i64 end) {
      T* acc = parts == 1 ? col : partial + part * ld;
      for (i64 j = 0; j < ld; ++j) acc[j] = 0;
      for (i64 i = begin; i < end; i += block) {
        const i64 rows = least(block, end - i);
        alignas(kBytes) T dots[kMaxBlock], coefficients[kMaxBlock];
        for (i64 k = 0; k < rows; k += W) {
          store(dots + k, broadcast<T>(1));
          produce(i + k, least(W, rows - k), dots + k);
        }
        for (i64 k = 0; k < rows; k += W)
          weigh(part, i + k, least(W, rows - k), dots + k, coefficients + k);
        add_rows(i, rows, coefficients, acc);
      }
    });
    if (parts == 1) return;
    for (i64 j = 0; j < ld; j += W) {
      Vec<T> s = load(partial + j);
      for (i64 p = 1; p < parts; ++p) s += load(partial + p * ld + j);
      store(col + j, s);
    }
  }

  // dots[k] = <K_{i+k}, w>
  void products(i64 i, i64 rows, const T* w, T* dots) const {
    switch (ld / kWidth<T>) {  // narrow matrices keep w, and in add_rows the sums, in registers
      case 1: return products_of<1>(i, rows, w, dots);
      case 2: return products_of<2>(i, rows, w, dots);
      case 3: return products_of<3>(i, rows, w, dots);
      case 4: return products_of<4>(i, rows, w, dots);
      case 5: return products_of<5>(i, rows, w, dots);
      case 6: return products_of<6>(i, rows, w, dots);
      case 7: return products_of<7>(i, rows, w, dots);
      case 8: return products_of<8>(i, rows, w, dots);
      default: return products_of<0>(i, rows, w, dots);
    }
  }

  // acc += sum_k c[k] K_{i+k}
  void add_rows(i64 i, i64 rows, const T* c, T* acc) const {
    switch (ld / kWidth<T>) {
      case 1: return add_rows_of<1>(i, rows, c, acc);
      case 2: return add_rows_of<2>(i, rows, c, acc);
      case 3: return add_rows_of<3>(i, rows, c, acc);
      case 4: return add_rows_of<4>(i, rows, c, acc);
      case 5: return add_rows_of<5>(i, rows, c, acc);
      case 6: return add_rows_of<6>(i, rows, c, acc);
      case 7: return add_rows_of<7>(i, rows, c, acc);
      case 8: return add_rows_of<8>(i, rows, c, acc);
      default: return add_rows_of<0>(i, rows, c, acc);
    }
  }

 private:
  template <int kVecs>
  __attribute__((always_inline)) Vec<T> product(const T* r, const T* w) const {
    Vec<T> s[2] = {};
    i64 j = 0;
    for (; j + kWidth<T> < (kVecs ? kVecs * kWidth<T> : ld); j += 2 * kWidth<T>) {
      s[0] += load(r + j) * load(w + j);
      s[1] += load(r + j + kWidth<T>) * load(w + j + kWidth<T>);
    }
    if (j < (kVecs ? kVecs * kWidth<T> : ld)) s[0] += load(r + j) * load(w + j);
    return s[0] + s[1];
  }

  // Of rows beside each other: each vector of w is read once for all of them.
  void products_together(const T* r, const T* w, Vec<T>* part) const {
    Vec<T> s[kTogether] = {};
    for (i64 j = 0; j < ld; j += kWidth<T>) {
      const Vec<T> v = load(w + j);
      for (int k = 0; k < kTogether; ++k) s[k] += load(r + k * ld + j) * v;
    }
    for (int k = 0; k < kTogether; ++k) part[k] = s[k];
  }

  template <int kVecs>
  void products_of(i64 i, i64 rows, const T* w, T* dots) const {
    constexpr i64 W = kWidth<T>;
    const i64 width = kVecs ? kVecs * W : ld;
    const T* r = K + i * width;
    if (rows == W && kVecs == 0) {
      Vec<T> part[W];
      for (i64 k = 0; k < W; k += kTogether) products_together(r + k * ld, w, part + k);
      store(dots, sums<T, int(W)>(0, [&](int k) { return part[k]; }));
      return;
    }
    if (rows == W) {
      const auto dot = [&](int k) __attribute__((always_inline)) {
        return product<kVecs>(r + k * width, w);
      };
      store(dots, sums<T, int(W)>(0, dot));
      return;
    }
    for (i64 k = 0; k < rows; ++k) dots[k] = sum<T>(product<kVecs>(r + k * width, w));
  }

  template <int kVecs>
  void add_rows_of(i64 i, i64 rows, const T* c, T* acc) const {
    constexpr i64 W = kWidth<T>;
    const T* r = K + i * (kVecs ? kVecs * W : ld);
    if constexpr (kVecs > 0) {
      constexpr int kSums = kVecs < 3 ? 4 : 2;  // enough of them to hide the latency of an addition
      Vec<T> s[kSums][kVecs] = {};
      for (int v = 0; v < kVecs; ++v) s[0][v] = load(acc + v * W);
      i64 k = 0;
      for (; k + kSums <= rows; k += kSums)
        for (int l = 0; l < kSums; ++l, r += kVecs * W)
          for (int v = 0; v < kVecs; ++v) s[l][v] += load(r + v * W) * c[k + l];
      for (; k < rows; ++k, r += kVecs * W)
        for (int v = 0; v < kVecs; ++v) s[0][v] += load(r + v * W) * c[k];
      for (int v = 0; v < kVecs; ++v) {
        for (int l = 1; l < kSums; ++l) s[0][v] += s[l][v];
        store(acc + v * W, s[0][v]);
      }
    } else {
      i64 k = 0;
      for (; k + 4 <= rows; k += 4, r += 4 * ld)
        for (i64 j = 0; j < ld; j += W) {
          Vec<T> s = load(acc + j) + load(r + j) * c[k], t = load(r + ld + j) * c[k + 1];
          s += load(r + 2 * ld + j) * c[k + 2], t += load(r + 3 * ld + j) * c[k + 3];
          store(acc + j, s + t);
        }
      for (; k < rows; ++k, r += ld)
        for (i64 j = 0; j < ld; j += W) store(acc + j, load(acc + j) + load(r + j) * c[k]);
    }
  }

 public:
  // K_i = exp(column_j - c_j / eps - shift) for one row, and its sum; column_j is -inf from M on.
  T fill_row(i64 i, const T* c, const double* column, double inv_eps, double shift) {
    T* out = row(i);
    Vec<T> s{};
    for_entries(c, M, ld, column, inv_eps, shift, [&](i64 j, Vec<T> e) {
      store(out + j, e);
      s += e;
    });
    return sum<T>(s);
  }
};

// max_j column_j - c_j / eps in the precision of S. A shift need not be exact, only near.
template <class S, class T>
inline S row_max(const T* c, const S* column, S inv_eps, i64 M) {
  constexpr i64 W = kWidth<S>;
  Vec<S> m = broadcast<S>(-INFINITY);
  i64 j = 0;
  for (; j + W <= M; j += W) {
    if constexpr (sizeof(S) == sizeof(T)) m = vmax<S>(m, load(column + j) - load(c + j) * inv_eps);
    else m = vmax<S>(m, load(column + j) - widen(c + j) * inv_eps);
  }
  S best = max<S>(m);
  for (; j < M; ++j) {
    const S x = column[j] - S(c[j]) * inv_eps;
    best = x > best ? x : best;
  }
  return best;
}

template <class T>
inline bool all_finite(const T* c, i64 n) {
  constexpr i64 W = kWidth<T>;
  Vec<T> s{};
  i64 j = 0;
  for (; j + W <= n; j += W) s += load(c + j) * T(0);  // NaN and inf times 0 are NaN
  T t = sum<T>(s);
  for (; j < n; ++j) t += c[j] * T(0);
  return t == T(0);
}

// What a solver takes of its scratch memory.
template <class Solver, class Args>
i64 bytes_of(const Args& args) {
  Scratch count;
  Patience patience;
  Crew alone(1, patience);
  Solver solver(args, alone, count, patience);
  return count.used();
}

// run(scratch, crew, problem, patience) -> status for every problem of a batch: one thread a problem
// when there are enough of them, else all threads on each. `bytes` is what one problem needs.
template <class Args, class Run>
int each_problem(const Args& args, i64 bytes, Run run) {
  const bool share =
      args.threads > 1 && args.B < args.threads && parts_of(args.N, args.M) > 1;
  const int outer = share ? 1 : int(least(args.threads, args.B)), each = share ? args.threads : 1;
  int status = kOk;
  Patience patience;
#pragma omp parallel num_threads(outer) if (outer > 1)
  {
    FlushDenormals guard;
    Scratch scratch(bytes);
    if (!scratch.ok()) {
#pragma omp atomic write
      status = kOutOfMemory;
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (i64 problem = 0; problem < args.B; ++problem) {
      if (!scratch.ok() || patience.look()) continue;
      scratch.rewind();
      int seen = kOk;
      Crew crew(each, patience);
      crew.together([&] { seen = run(scratch, crew, problem, patience); });
      if (seen != kOk) {
#pragma omp atomic write
        status = seen;
      }
    }
    patience.wait(outer);
  }
  return patience.over() ? kInterrupted : status;
}

}  // namespace otdd::cpu::OTDD_ISA
