// A matrix in device memory, for those that are too large for the chip: any number of rows and columns.
//
// The blocks of a group stand in `down` rows of `across`, and each has a rectangle of K, and the states of
// its rows and columns, in a part of the workspace that is its own. What a row's sum is made of, the
// blocks beside each other leave in the workspace; then each of them adds it up by itself, in the same
// order, so that all come to the same bits and nothing needs to be shown to others. The same holds for
// columns and the blocks below each other. Passes read K once, whole rectangles of it in a row.
#pragma once

#include "block.h"

namespace otdd::cuda {

constexpr int kStreamThreads = 256;  // with 512, which leaves each of them half the registers, kernels spill

// Where things are, in bytes from the start of a group's workspace, or of a block's own part of it.
struct StreamPlan {
  int down = 1, across = 1, threads = kStreamThreads;
  i64 rows = 0, columns = 0;            // of a block, multiples of 4
  int row_parts = 1, column_parts = 1;  // of a block's rows, among its warps; of columns, among threads
  i64 counter = 0, slots = 0, row_sums = 0, row_costs = 0, row_tops = 0, column_sums = 0, column_lses = 0;
  i64 own = 0, own_bytes = 0, K = 0, v = 0, gamma = 0, row_states = 0, column_states = 0, workspace = 0;

  OTDD_BOTH i64 peers() const { return i64(down) * across; }
  OTDD_BOTH i64 all_rows() const { return down * rows; }
  OTDD_BOTH i64 all_columns() const { return across * columns; }
  OTDD_BOTH i64 of_row_sums() const { return across * row_parts * all_rows(); }  // and of their costs
  OTDD_BOTH i64 of_column_sums() const { return down * column_parts * all_columns(); }
  i64 shared() const { return kMostWarps * 8 + kUniformBytes; }

  // An iteration, in numbers that a block reads: K twice, the parts of sums, and what the barriers take.
  double time(double barrier) const {
    const double parts = double(across) * row_parts * rows + double(down) * column_parts * columns;
    return 2 * double(rows * columns) + parts + barrier * ((down > 1) + (across > 1) + (peers() > 1));
  }
};

template <class T, class State>
StreamPlan plan_stream(i64 N, i64 M, i64 peers, double barrier) {
  StreamPlan best;
  for (i64 down = 1; down <= peers; ++down) {
    StreamPlan s;
    const i64 across = peers / down;
    s.rows = fours((N + down - 1) / down), s.columns = fours((M + across - 1) / across);
    s.down = int((N + s.rows - 1) / s.rows), s.across = int((M + s.columns - 1) / s.columns);
    while (s.row_parts < s.threads / 32 && 2 * s.row_parts * s.rows / 4 <= s.threads / 32 &&
           s.columns >= 256 * s.row_parts)
      s.row_parts *= 2;
    const i64 groups = 4 * s.threads / s.columns;
    s.column_parts = int(groups < 1 ? 1 : groups > 8 ? 8 : groups);
    while (s.column_parts > 1 && s.column_parts * 4 > s.rows) --s.column_parts;
    if (best.rows == 0 || s.time(barrier) < best.time(barrier)) best = s;
  }
  StreamPlan& s = best;
  constexpr i64 size = sizeof(T);
  Pieces group, own;
  s.counter = group.take(128), s.slots = group.take(2 * s.peers() * 8);
  // Of each there are two, in turn: whoever writes the first again has met all that read it.
  s.row_sums = group.take(2 * s.of_row_sums() * size), s.row_costs = group.take(2 * s.of_row_sums() * size);
  s.row_tops = group.take(2 * s.of_row_sums() * 8);
  s.column_sums = group.take(2 * s.of_column_sums() * size);
  s.column_lses = group.take(2 * s.of_column_sums() * 8);
  s.K = own.take(s.rows * s.columns * size), s.v = own.take(s.columns * size), s.gamma = own.take(s.columns * 8);
  s.row_states = own.take(s.rows * i64(sizeof(typename State::Row)));
  s.column_states = own.take(s.columns * i64(sizeof(typename State::Column)));
  s.own = (group.bytes + 127) / 128 * 128, s.own_bytes = (own.bytes + 127) / 128 * 128;
  s.workspace = s.own + s.peers() * s.own_bytes;
  return s;
}

template <class T, class State>
class StreamGrip {
  using Row = typename State::Row;
  using Column = typename State::Column;
  static constexpr i64 kRun = 256;  // terms to a sum before it joins the ones before

 public:
  // Of `workspace` only the counter must be 0, at the launch.
  OTDD_DEVICE StreamGrip(const StreamPlan& plan, char* workspace)
      : S(plan), workspace_(workspace) {
    const int rank = int(chip::block() % plan.peers());
    r_ = rank / plan.across, s_ = rank % plan.across;
    own_part_ = workspace + plan.own + rank * plan.own_bytes;
  }

  template <class Args>
  OTDD_DEVICE void begin(const Args& args, i64 problem, double inv_eps) {
    C_ = &args.C, problem_ = problem, inv_eps_ = inv_eps, M_ = args.M;
    count_ = int(inside(args.N - row0(), S.rows)), own_ = int(inside(M_ - column0(), S.columns));
    meet();  // the problem before is done with
    for (i64 j = own_ + thread(); j < S.columns; j += S.threads)
      chip::put(v() + j, T(0)), chip::put(gamma() + j, -double(INFINITY));
    for (i64 i = count_ + thread(); i < S.rows; i += S.threads) chip::put(rows() + i, Row());
  }
  OTDD_DEVICE void leave() {}

  OTDD_DEVICE bool first() const { return r_ == 0 && s_ == 0 && thread() == 0; }
  // Of those that share shared memory.
  OTDD_DEVICE bool leads() const { return thread() == 0; }
  OTDD_DEVICE void sync() const { chip::sync(); }

  template <class Uniform>
  OTDD_DEVICE Uniform& uniform() const {
    static_assert(sizeof(Uniform) <= kUniformBytes, "");
    return *at<Uniform>(chip::shared() + kMostWarps * 8);
  }

  template <class Fn>
  OTDD_DEVICE void for_rows(Fn fn) {
    for (i64 i = thread(); i < count_; i += S.threads) change(rows() + i, row0() + i, s_ == 0, fn);
  }
  template <class Fn>
  OTDD_DEVICE void for_columns(Fn fn) {
    for (i64 j = thread(); j < own_; j += S.threads) change(columns() + j, column0() + j, r_ == 0, fn);
  }

  OTDD_DEVICE bool show(Shown what, bool flag) {
    for (i64 j = thread(); j < own_; j += S.threads) {
      if (what == kV) chip::put(v() + j, chip::fetch(&columns()[j].v));
      else chip::put(gamma() + j, chip::fetch(&columns()[j].gamma));
    }
    return most(flag) > 0;
  }

  // A warp has a part of one row at a time.
  OTDD_DEVICE void fill(bool fresh, bool keep) {
    if (fresh) {
      row_turn_ ^= 1;
      double* tops = of_rows<double>(S.row_tops);
      each_row(1, [&](i64 i, i64 begin, i64 end, i64 part, int lane) {
        if (i >= count_) return;
        double top = -INFINITY;
        for (i64 j = begin + lane; j < end && j < own_; j += 32)
          top = ::fmax(top, chip::fetch(gamma() + j) - exponent(i, j));
        top = over_warp(top, Most());
        if (lane == 0) chip::put(tops + part * S.all_rows() + row0() + i, top);
      });
      meet_beside();
      for_rows([&](Row& row, i64 i, bool) {
        row.shift = of_row(tops, i, -double(INFINITY), Most());
      });
      chip::sync();
    }
    row_turn_ ^= 1;
    T *sums = of_rows<T>(S.row_sums), *costs = of_rows<T>(S.row_costs);
    each_row(1, [&](i64 i, i64 begin, i64 end, i64 part, int lane) {
      if (i >= count_) {
        for (i64 j = begin + lane; keep && j < end; j += 32) chip::put(K() + i * S.columns + j, T(0));
        return;
      }
      const double shift = chip::fetch(&rows()[i].shift);
      double total = 0, spent = 0;
      for (i64 j = begin + lane; j < end; j += 32) {
        const T c = j < own_ ? cost(i, j) : T(0);
        const T e = power(chip::fetch(gamma() + j) - double(c) * inv_eps_ - shift);  // 0 in the padding
        total += double(e), spent += double(e) * double(c);
        if (keep) chip::put(K() + i * S.columns + j, e);
      }
      total = over_warp(total, Add()), spent = over_warp(spent, Add());
      if (lane > 0) return;
      chip::put(sums + part * S.all_rows() + row0() + i, T(total));
      chip::put(costs + part * S.all_rows() + row0() + i, T(spent));
    });
    meet_beside();
    for_rows([&](Row& row, i64 i, bool) {
      row.r_new = T(of_row(sums, i, 0, Add())), row.cost() = T(of_row(costs, i, 0, Add()));
    });
  }

  // A warp has a part of four rows at a time.
  OTDD_DEVICE void products() {
    row_turn_ ^= 1;
    T* sums = of_rows<T>(S.row_sums);
    each_row(4, [&](i64 i, i64 begin, i64 end, i64 part, int lane) {
      T s[4] = {0, 0, 0, 0};
      for (i64 run = begin; run < end; run += 128 * kRun) {
        T t[4] = {0, 0, 0, 0};
        const i64 stop = run + 128 * kRun < end ? run + 128 * kRun : end;
        OTDD_UNROLL_BY_2
        for (i64 j = run + 4 * lane; j < stop; j += 128) {
          const Four<T> weights = fetch4(v() + j);
          OTDD_UNROLL
          for (int k = 0; k < 4; ++k) {
            const Four<T> e = fetch4(K() + (i + k) * S.columns + j);
            t[k] += (e.x * weights.x + e.y * weights.y) + (e.z * weights.z + e.w * weights.w);
          }
        }
        OTDD_UNROLL
        for (int k = 0; k < 4; ++k) s[k] += t[k];
      }
      const T total = fold4(s, lane);
      if (lane % 8 == 0) chip::put(sums + part * S.all_rows() + row0() + i + lane / 8, total);
    });
    meet_beside();
    for_rows([&](Row& row, i64 i, bool) {
      row.r_new = T(of_row(sums, i, 0, Add()));
    });
  }

  // A thread has four columns of some rows at a time.
  OTDD_DEVICE double transposed(double error, bool wanted) {
    column_turn_ ^= 1;
    T* sums = of_columns<T>(S.column_sums);
    chip::sync();
    const i64 quads = S.columns / 4;
    for (i64 task = thread(); task < quads * S.column_parts; task += S.threads) {
      const i64 j = task % quads * 4, part = task / quads;
      Four<T> s = {0, 0, 0, 0};
      const i64 end = S.rows * (part + 1) / S.column_parts;
      for (i64 i = S.rows * part / S.column_parts; i < end;) {
        Four<T> t = {0, 0, 0, 0};
        const i64 stop = i + kRun < end ? i + kRun : end;
        OTDD_UNROLL_BY_8
        for (; i < stop; ++i)
          t.add(chip::fetch(&rows()[i].u_new), fetch4(K() + i * S.columns + j));
        s.add(T(1), t);
      }
      put4(sums + (r_ * S.column_parts + part) * S.all_columns() + column0() + j, s);
    }
    meet_below();
    for_columns([&](Column& column, i64 j, bool) {
      column.c = T(of_column(sums, j, 0, Add()));
    });
    return wanted ? sum(error) : 0;
  }

  OTDD_DEVICE void column_lse() {
    column_turn_ ^= 1;
    double* lses = of_columns<double>(S.column_lses);
    chip::sync();
    for (i64 task = thread(); task < S.columns * S.column_parts; task += S.threads) {
      const i64 j = task % S.columns, part = task / S.columns;
      if (j >= own_) continue;
      const i64 begin = S.rows * part / S.column_parts, end = inside(count_, S.rows * (part + 1) / S.column_parts);
      double top = -INFINITY, total = 0;
      for (i64 i = begin; i < end; ++i) top = ::fmax(top, chip::fetch(&rows()[i].shift) - exponent(i, j));
      for (i64 i = begin; i < end && top > -INFINITY; ++i)
        total += double(power(chip::fetch(&rows()[i].shift) - exponent(i, j) - top));
      // -inf where no row has weight
      chip::put(lses + (r_ * S.column_parts + part) * S.all_columns() + column0() + j, top + ::log(total));
    }
    meet_below();
    for_columns([&](Column& column, i64 j, bool) {
      const double top = of_column(lses, j, -INFINITY, Most());
      const auto add = [&](double total, double lse) { return total + ::exp(lse - top); };
      column.lse = top + ::log(of_column(lses, j, 0, add));
    });
  }

  OTDD_DEVICE double sum(double x) { return over_all(x, Add(), 0); }
  OTDD_DEVICE double least(double x) { return over_all(x, Least(), INFINITY); }
  OTDD_DEVICE double most(double x) { return over_all(x, Most(), -INFINITY); }

  // dC = K_ij (u_i + v_j)
  OTDD_DEVICE void write_sums(T* dC) {
    each_row(1, [&](i64 i, i64 begin, i64 end, i64, int lane) {
      for (i64 j = begin + lane; i < count_ && j < end && j < own_; j += 32)
        chip::write(dC + (row0() + i) * M_ + column0() + j,
                    chip::fetch(K() + i * S.columns + j) * (chip::fetch(&rows()[i].u_new) + chip::fetch(v() + j)));
    });
  }

  // dC (+)= K_ij sum_k rows[k, i] columns[k, j]; a thread has four rows of four columns at a time.
  OTDD_DEVICE void add_outer(const T* rows, const T* columns, i64 terms, T* dC, bool add) {
    meet();
    const i64 quads = S.columns / 4;
    for (i64 tile = thread(); tile < S.rows / 4 * quads; tile += S.threads) {
      const i64 i0 = tile / quads * 4, j0 = tile % quads * 4;
      T s[4][4] = {};
      for (i64 k = 0; k < terms; ++k) {
        T x[4], y[4];
        OTDD_UNROLL
        for (int l = 0; l < 4; ++l) {
          x[l] = chip::fetch_fresh(rows + k * row_stride() + row0() + i0 + l);
          y[l] = chip::fetch_fresh(columns + k * column_stride() + column0() + j0 + l);
        }
        OTDD_UNROLL
        for (int l = 0; l < 16; ++l) s[l / 4][l % 4] += x[l / 4] * y[l % 4];
      }
      OTDD_UNROLL
      for (int l = 0; l < 16; ++l) {
        const i64 i = i0 + l / 4, j = j0 + l % 4;
        if (i >= count_ || j >= own_) continue;
        T* out = dC + (row0() + i) * M_ + column0() + j;
        const T e = terms ? chip::fetch(K() + i * S.columns + j) * s[l / 4][l % 4] : T(0);
        if (add) chip::put(out, chip::fetch(out) + e);
        else chip::write(out, e);
      }
    }
    meet();  // the terms are done with
  }
  OTDD_DEVICE i64 row_stride() const { return S.all_rows(); }
  OTDD_DEVICE i64 column_stride() const { return S.all_columns(); }
  OTDD_DEVICE static i64 row_place(i64 i) { return i; }
  OTDD_DEVICE static i64 column_place(i64 j) { return j; }

 private:
  const StreamPlan& S;
  int r_, s_, row_turn_ = 0, column_turn_ = 0, slot_turn_ = 0;
  int count_, own_;  // rows and columns of the block that there are
  unsigned meetings_ = 0;
  char *workspace_, *own_part_;
  const Costs* C_;
  i64 problem_, M_;
  double inv_eps_;

  // Addresses are made anew from the plan, which is in constant memory: kept, they would take registers.
  OTDD_DEVICE static int thread() { return chip::thread(); }
  OTDD_DEVICE i64 row0() const { return S.rows * r_; }
  OTDD_DEVICE i64 column0() const { return S.columns * s_; }
  OTDD_DEVICE T* K() const { return at<T>(own_part_ + S.K); }
  OTDD_DEVICE T* v() const { return at<T>(own_part_ + S.v); }
  OTDD_DEVICE double* gamma() const { return at<double>(own_part_ + S.gamma); }
  OTDD_DEVICE Row* rows() const { return at<Row>(own_part_ + S.row_states); }
  OTDD_DEVICE Column* columns() const { return at<Column>(own_part_ + S.column_states); }
  OTDD_DEVICE static double* of_warps() { return at<double>(chip::shared()); }

  template <class X>
  OTDD_DEVICE static X* at(char* p) {
    return reinterpret_cast<X*>(p);
  }
  template <class X>
  OTDD_DEVICE X* of_rows(i64 offset) const {
    return at<X>(workspace_ + offset) + row_turn_ * S.of_row_sums();
  }
  template <class X>
  OTDD_DEVICE X* of_columns(i64 offset) const {
    return at<X>(workspace_ + offset) + column_turn_ * S.of_column_sums();
  }

  // All blocks of the problem; those that have parts of the same rows; of the same columns.
  OTDD_DEVICE void meet() {
    if (S.peers() > 1) chip::sync_blocks(at<unsigned>(workspace_ + S.counter), int(S.peers()), meetings_);
    else chip::sync();
  }
  OTDD_DEVICE void meet_beside() {
    if (S.across > 1) meet();
    else chip::sync();
  }
  OTDD_DEVICE void meet_below() {
    if (S.down > 1) meet();
    else chip::sync();
  }

  template <class X, class Fn>
  OTDD_DEVICE static void change(X* at, i64 index, bool counted, Fn& fn) {
    X x = chip::fetch(at);
    fn(x, index, counted);
    chip::put(at, x);
  }

  // fn(row, first column, end, part of all parts of the row, lane), `at_once` rows at a time.
  template <class Fn>
  OTDD_DEVICE void each_row(int at_once, Fn fn) {
    const int warp = thread() / 32, part = warp % S.row_parts;
    const i64 step = at_once * (S.threads / 32 / S.row_parts), width = (S.columns / 4 + S.row_parts - 1) / S.row_parts * 4;
    const i64 begin = width * part < S.columns ? width * part : S.columns;
    const i64 end = begin + width < S.columns ? begin + width : S.columns;
    for (i64 i = at_once * (warp / S.row_parts); i < S.rows; i += step)
      fn(i, begin, end, i64(s_) * S.row_parts + part, thread() % 32);
  }

  // The parts of what concerns a row or a column, in their order.
  template <class X, class Op>
  OTDD_DEVICE double of_row(const X* parts, i64 i, double x, Op op) const {
    for (int k = 0; k < S.across * S.row_parts; ++k) x = op(x, chip::fetch_fresh(parts + k * S.all_rows() + i));
    return x;
  }
  template <class X, class Op>
  OTDD_DEVICE double of_column(const X* parts, i64 j, double x, Op op) const {
    for (int k = 0; k < S.down * S.column_parts; ++k)
      x = op(x, chip::fetch_fresh(parts + k * S.all_columns() + j));
    return x;
  }

  template <class Op>
  OTDD_DEVICE double over_all(double x, Op op, double nothing) {
    x = over_block(x, op, nothing, of_warps());
    if (S.peers() == 1) return x;
    double* slots = at<double>(workspace_ + S.slots) + (slot_turn_ ^= 1) * S.peers();
    if (thread() == 0) chip::put(slots + r_ * S.across + s_, x);
    meet();
    x = nothing;
    for (i64 k = thread(); k < S.peers(); k += S.threads) x = op(x, chip::fetch_fresh(slots + k));
    return over_block(x, op, nothing, of_warps());
  }

  OTDD_DEVICE static Four<T> fetch4(const T* p) { return chip::fetch(reinterpret_cast<const Four<T>*>(p)); }
  OTDD_DEVICE static void put4(T* p, const Four<T>& x) { chip::put(reinterpret_cast<Four<T>*>(p), x); }

  OTDD_DEVICE T cost(i64 i, i64 j) const { return C_->at<T>(problem_, row0() + i, column0() + j); }
  OTDD_DEVICE double exponent(i64 i, i64 j) const { return double(cost(i, j)) * inv_eps_; }
  OTDD_DEVICE static T power(double x) { return chip::exp2_fast(T(x * kLog2e)); }
};

}  // namespace otdd::cuda
