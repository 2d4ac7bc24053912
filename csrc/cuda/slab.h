// A matrix shared by blocks: each holds some of its rows in shared memory.
//
// A block alone, the blocks of a cluster, which reach each other's shared memory, or a group of blocks
// of a cooperative launch, which meet in a workspace. Rows belong to their block; columns are shared
// out among the blocks too: a block adds up what all have for its columns, makes v of it, and shows it
// to all, so that an iteration has two barriers. Sums are added in an order that the shape alone fixes.
#pragma once

#include "block.h"

namespace otdd::cuda {

enum class Team { kAlone, kCluster, kGroup };

// Numbers of each block that the others read after a barrier. Where the next use may come without
// another barrier there are two in turn: whoever writes the first again has met all that read it.
enum Slot { kErrorSlot, kShowSlot, kSumSlot = kShowSlot + 2, kSlots = kSumSlot + 2 };

// Where things are, in bytes from the start of shared memory and of a group's workspace.
struct SlabPlan {
  int peers = 1, threads = 256, groups = 1;
  i64 rows = 0, ld = 0, own = 0;  // a block's rows, row length, a block's columns
  i64 tiles = 0;                  // of four rows and four columns
  // gamma has the place of v and scratch: it is of use while K is made, they while it is there.
  i64 K = 0, v = 0, gamma = 0, scratch = 0, partial = 0, row_states = 0, column_states = 0, sums = 0;
  i64 slots = 0, uniform = 0, shared = 0;
  i64 w_counter = 0, w_partial = 0, w_v = 0, w_gamma = 0, w_lse = 0, w_slots = 0, workspace = 0;

  OTDD_BOTH i64 row_stride() const { return peers * rows + 3; }  // of outer products: four are read from each row on
};

template <class T, class State>
inline void place_slab(SlabPlan& s, Team team) {
  const i64 size = sizeof(T);
  Pieces m;
  s.K = m.take(s.rows * s.ld * size);
  s.gamma = s.v = m.take(s.ld * size), s.scratch = m.take(s.groups * s.ld * size);
  s.partial = m.take(team == Team::kCluster ? s.ld * size : 0);
  s.row_states = m.take(s.rows * i64(sizeof(typename State::Row)));
  s.column_states = m.take(s.own * i64(sizeof(typename State::Column)));
  s.sums = m.take(kMostWarps * 8), s.slots = m.take(kSlots * 8), s.uniform = m.take(kUniformBytes);
  s.shared = m.bytes;
}

// It fits if its `shared` is at most what is given.
template <class T, class State>
inline SlabPlan plan_slab(i64 N, i64 M, Team team, int peers, int threads, i64 shared) {
  SlabPlan s;
  s.peers = peers, s.threads = threads;
  s.rows = (N + peers - 1) / peers, s.ld = fours(M), s.own = (M + peers - 1) / peers;
  s.tiles = fours(s.rows) / 4 * (s.ld / 4);
  const i64 groups = threads / (s.ld / 4);
  s.groups = int(groups < 1 ? 1 : groups > 8 ? 8 : groups);
  while (s.groups > 1 && s.groups * 4 > s.rows) --s.groups;
  for (place_slab<T, State>(s, team); s.shared > shared && s.groups > 1; place_slab<T, State>(s, team)) --s.groups;
  if (team != Team::kGroup) return s;
  const i64 size = sizeof(T);
  Pieces w;
  s.w_counter = w.take(128), s.w_partial = w.take(peers * s.ld * size), s.w_v = w.take(s.ld * size);
  s.w_gamma = w.take(s.ld * 8), s.w_lse = w.take(peers * s.ld * 8), s.w_slots = w.take(peers * kSlots * 8);
  s.workspace = (w.bytes + 127) / 128 * 128;
  return s;
}

template <class T, class State, Team kTeam>
class SlabGrip {
  using Row = typename State::Row;
  using Column = typename State::Column;

 public:
  // `workspace` is the group's own; only its counter must be 0, at the launch.
  OTDD_DEVICE SlabGrip(const SlabPlan& plan, char* workspace)
      : S(plan), thread_(chip::thread()), threads_(chip::threads()), workspace_(workspace) {
    rank_ = kTeam == Team::kCluster ? chip::block_of_cluster()
            : kTeam == Team::kGroup ? chip::block() % plan.peers : 0;
  }

  template <class Args>
  OTDD_DEVICE void begin(const Args& args, i64 problem, double inv_eps) {
    C_ = &args.C, problem_ = problem, inv_eps_ = inv_eps, M_ = int(args.M);
    count_ = int(inside(args.N - row0(), S.rows)), own_ = int(inside(M_ - column0(), S.own));
    meet();  // the problem before is done with, and all blocks have started
    for (int i = count_ + thread_; i < S.rows; i += threads_) rows()[i] = Row();
  }

  // At the end of a kernel: no block ends while others may still look at its shared memory.
  OTDD_DEVICE void leave() {
    if (kTeam == Team::kCluster) chip::sync_cluster();
  }

  OTDD_DEVICE bool first() const { return rank_ == 0 && thread_ == 0; }
  // Of those that share shared memory.
  OTDD_DEVICE bool leads() const { return thread_ == 0; }
  OTDD_DEVICE void sync() const { chip::sync(); }

  template <class Uniform>
  OTDD_DEVICE Uniform& uniform() const {
    static_assert(sizeof(Uniform) <= kUniformBytes, "");
    return *at<Uniform>(chip::shared() + S.uniform);
  }

  template <class Fn>
  OTDD_DEVICE void for_rows(Fn fn) {
    for (int i = thread_; i < count_; i += threads_) fn(rows()[i], row0() + i, true);
  }
  template <class Fn>
  OTDD_DEVICE void for_columns(Fn fn) {
    for (int j = thread_; j < own_; j += threads_) fn(columns()[j], column0() + j, true);
  }

  OTDD_DEVICE bool show(Shown what, bool flag) {
    if (what == kGamma) change_place();
    for (int j = M_ + thread_; j < S.ld; j += threads_) {  // padding
      if (what == kV) v()[j] = 0;
      else gamma()[j] = -INFINITY;
    }
    for (int j = thread_; j < own_; j += threads_) {
      if (what == kV) show_to_all(v(), S.w_v, column0() + j, columns()[j].v);
      else show_to_all(gamma(), S.w_gamma, column0() + j, columns()[j].gamma);
    }
    flag = chip::any_of_block(flag);
    if constexpr (kTeam != Team::kAlone) {
      const int k = kShowSlot + (show_turn_ ^= 1);
      if (thread_ == 0) set_slot(k, flag);
      meet();
      if (kTeam == Team::kGroup)
        for (int j = thread_; j < M_; j += threads_) {
          if (what == kV) v()[j] = chip::fetch_fresh(in_workspace<T>(S.w_v) + j);
          else gamma()[j] = chip::fetch_fresh(in_workspace<double>(S.w_gamma) + j);
        }
      bool any = false;
      for (int r = thread_; r < S.peers; r += threads_) any |= slot(k, r) != 0;
      flag = chip::any_of_block(any);
    }
    return flag;
  }

  // A warp has one row at a time.
  OTDD_DEVICE void fill(bool fresh, bool keep) {
    const int lane = thread_ % 32, warps = threads_ / 32;
    for (int i = thread_ / 32; i < S.rows; i += warps) {
      if (i >= count_) {
        for (int j = lane; keep && j < S.ld; j += 32) put(i, j, T(0));
        continue;
      }
      double shift = rows()[i].shift;
      if (fresh) {
        shift = -INFINITY;
        for (int j = lane; j < M_; j += 32) shift = ::fmax(shift, gamma()[j] - exponent(i, j));
        shift = over_warp(shift, Most());
      }
      T total = 0, spent = 0;
      for (int j = lane; j < S.ld; j += 32) {
        const T c = j < M_ ? cost(i, j) : T(0);
        const T e = power(gamma()[j] - double(c) * inv_eps_ - shift);  // 0 in the padding
        total += e, spent += e * c;
        if (keep) put(i, j, e);
      }
      for (int mask = 16; mask > 0; mask /= 2) {
        total += chip::shuffle_xor(total, mask);
        spent += chip::shuffle_xor(spent, mask);
      }
      if (lane == 0) rows()[i].r_new = total, rows()[i].shift = shift, rows()[i].cost() = spent;
    }
    change_place();
  }

  // A warp has four rows at a time; of the last four some may be a row once more.
  OTDD_DEVICE void products() {
    const int lane = thread_ % 32, warps = threads_ / 32;
    for (int i = 4 * (thread_ / 32); i < S.rows; i += 4 * warps) {
      T s[4] = {0, 0, 0, 0};
      for (int j = 4 * lane; j < S.ld; j += 128) {
        const Four<T> weights = four(v() + j);
        OTDD_UNROLL
        for (int k = 0; k < 4; ++k) {
          const Four<T> e = element4(i + k < S.rows ? i + k : int(S.rows) - 1, j);
          s[k] += (e.x * weights.x + e.y * weights.y) + (e.z * weights.z + e.w * weights.w);
        }
      }
      const T total = fold4(s, lane);
      if (lane % 8 == 0 && i + lane / 8 < S.rows) rows()[i + lane / 8].r_new = total;
    }
    chip::sync();
  }

  // A thread has four columns and, where there are threads enough, some of the rows.
  OTDD_DEVICE double transposed(double error, bool wanted) {
    chip::sync();
    const int quads = int(S.ld / 4), rows = int(S.rows);
    if (S.groups == 1) {
      for (int q = thread_; q < quads; q += threads_) sum_columns(q, 0, rows, scratch());
    } else if (thread_ < quads * S.groups) {
      const int group = thread_ / quads;
      sum_columns(thread_ % quads, rows * group / S.groups, rows * (group + 1) / S.groups,
                  scratch() + group * S.ld);
    }
    if (wanted) error = sum_of_block(error);
    else chip::sync();
    if constexpr (kTeam == Team::kAlone) {
      for (int j = thread_; j < own_; j += threads_) columns()[j].c = over_groups(j);
    } else {
      for (int j = thread_; j < M_; j += threads_) {
        if (kTeam == Team::kCluster) partial()[j] = over_groups(j);
        else chip::put(in_workspace<T>(S.w_partial) + rank_ * S.ld + j, over_groups(j));
      }
      if (thread_ == 0) set_slot(kErrorSlot, error);
      meet();
      for (int j = thread_; j < own_; j += threads_) {
        T c = 0;
        for (int r = 0; r < S.peers; ++r) c += partial_of(r, column0() + j);
        columns()[j].c = c;
      }
      if (wanted) {
        error = 0;
        for (int r = thread_; r < S.peers; r += threads_) error += slot(kErrorSlot, r);
        error = sum_of_block(error);
      }
    }
    return error;
  }

  // gamma's place is used; a block then looks at its own columns alone, and none but it shows these.
  OTDD_DEVICE void column_lse() {
    chip::sync();
    for (int j = thread_; j < M_; j += threads_) {
      double top = -INFINITY, total = 0;
      for (int i = 0; i < count_; ++i) top = ::fmax(top, rows()[i].shift - exponent(i, j));
      for (int i = 0; i < count_ && top > -INFINITY; ++i)
        total += double(power(rows()[i].shift - exponent(i, j) - top));
      const double lse = top + ::log(total);  // -inf where no row has weight
      if (kTeam == Team::kGroup) chip::put(in_workspace<double>(S.w_lse) + rank_ * S.ld + j, lse);
      else gamma()[j] = lse;
    }
    meet();
    for (int j = thread_; j < own_; j += threads_) {
      double top = -INFINITY, total = 0;
      for (int r = 0; r < S.peers; ++r) top = ::fmax(top, lse_of(r, column0() + j));
      for (int r = 0; r < S.peers; ++r) total += ::exp(lse_of(r, column0() + j) - top);
      columns()[j].lse = top + ::log(total);
    }
  }

  OTDD_DEVICE double sum(double x) { return over_all(x, Add(), 0); }
  OTDD_DEVICE double least(double x) { return over_all(x, Least(), INFINITY); }
  OTDD_DEVICE double most(double x) { return over_all(x, Most(), -INFINITY); }

  // dC = K_ij (u_i + v_j)
  OTDD_DEVICE void write_sums(T* dC) {
    const int lane = thread_ % 32, warps = threads_ / 32;
    for (int i = thread_ / 32; i < count_; i += warps)
      for (int j = lane; j < M_; j += 32)
        chip::write(dC + (row0() + i) * M_ + j, element(i, j) * (rows()[i].u_new + v()[j]));
  }

  // dC (+)= K_ij sum_k rows[k, i] columns[k, j]; a thread has four rows of four columns at a time.
  OTDD_DEVICE void add_outer(const T* rows, const T* columns, i64 terms, T* dC, bool add) {
    meet();
    const i64 quads = S.ld / 4;
    for (i64 tile = thread_; tile < S.tiles; tile += threads_) {
      const i64 i0 = tile / quads * 4, j0 = tile % quads * 4;
      T s[4][4] = {};
      for (i64 k = 0; k < terms; ++k) {
        const auto x = fetch4(rows + k * row_stride() + row0() + i0);  // some may be another block's, or nobody's
        const auto y = fetch4(columns + k * column_stride() + j0);
        const T xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
        OTDD_UNROLL
        for (int r = 0; r < 4; ++r) {
          OTDD_UNROLL
          for (int c = 0; c < 4; ++c) s[r][c] += xs[r] * ys[c];
        }
      }
      OTDD_UNROLL
      for (int r = 0; r < 4; ++r) {
        OTDD_UNROLL
        for (int c = 0; c < 4; ++c) {
          if (i0 + r >= count_ || j0 + c >= M_) continue;
          T* out = dC + (row0() + i0 + r) * M_ + j0 + c;
          const T e = terms ? element(i0 + r, j0 + c) * s[r][c] : T(0);
          if (add) chip::put(out, chip::fetch(out) + e);
          else chip::write(out, e);
        }
      }
    }
  }
  OTDD_DEVICE i64 row_stride() const { return S.row_stride(); }
  OTDD_DEVICE i64 column_stride() const { return S.ld; }
  OTDD_DEVICE static i64 row_place(i64 i) { return i; }
  OTDD_DEVICE static i64 column_place(i64 j) { return j; }

 private:
  const SlabPlan& S;
  int thread_, threads_, rank_;
  char* workspace_;
  unsigned meetings_ = 0;
  int show_turn_ = 0, sum_turn_ = 0;
  const Costs* C_;
  i64 problem_;
  int M_, count_, own_;  // columns; rows and columns of the block that there are
  double inv_eps_;

  template <class X>
  OTDD_DEVICE static X* at(char* p) {
    return reinterpret_cast<X*>(p);
  }
  // Addresses are made anew from the plan, which is in constant memory: kept, they would take registers.
  template <class X>
  OTDD_DEVICE static X* shared(i64 offset) {
    return at<X>(chip::shared() + offset);
  }
  template <class X>
  OTDD_DEVICE X* in_workspace(i64 offset) const {
    return at<X>(workspace_ + chip::fresh(offset));
  }
  OTDD_DEVICE T* K() const { return shared<T>(S.K); }
  OTDD_DEVICE T* v() const { return shared<T>(S.v); }
  OTDD_DEVICE double* gamma() const { return shared<double>(S.gamma); }
  OTDD_DEVICE T* scratch() const { return shared<T>(S.scratch); }
  OTDD_DEVICE T* partial() const { return shared<T>(S.partial); }
  OTDD_DEVICE Row* rows() const { return shared<Row>(S.row_states); }
  OTDD_DEVICE Column* columns() const { return shared<Column>(S.column_states); }
  OTDD_DEVICE double* sums() const { return shared<double>(S.sums); }
  OTDD_DEVICE double* slots() const { return shared<double>(S.slots); }
  OTDD_DEVICE i64 row0() const { return S.rows * rank_; }
  OTDD_DEVICE i64 column0() const { return S.own * rank_; }

  // All blocks of the problem.
  OTDD_DEVICE void meet() {
    if (kTeam == Team::kAlone) chip::sync();
    if (kTeam == Team::kCluster) chip::sync_cluster();
    if (kTeam == Team::kGroup) chip::sync_blocks(in_workspace<unsigned>(S.w_counter), S.peers, meetings_);
  }

  // From v and scratch to gamma, or back: nobody reads any more what others are about to write over.
  OTDD_DEVICE void change_place() {
    if (kTeam == Team::kCluster) meet();
    else chip::sync();
  }

  template <class X>
  OTDD_DEVICE void show_to_all(X* mine, i64 offset, i64 j, X x) {
    if (kTeam == Team::kAlone) mine[j] = x;
    if (kTeam == Team::kCluster)
      for (int r = 0; r < S.peers; ++r) chip::of_block(mine, r)[j] = x;
    if (kTeam == Team::kGroup) chip::put(in_workspace<X>(offset) + j, x);
  }
  OTDD_DEVICE T partial_of(int rank, i64 j) {
    if (kTeam == Team::kCluster) return chip::of_block(partial(), rank)[j];
    return chip::fetch_fresh(in_workspace<T>(S.w_partial) + rank * S.ld + j);
  }
  OTDD_DEVICE double lse_of(int rank, i64 j) {
    if (kTeam == Team::kAlone) return gamma()[j];
    if (kTeam == Team::kCluster) return chip::of_block(gamma(), rank)[j];
    return chip::fetch_fresh(in_workspace<double>(S.w_lse) + rank * S.ld + j);
  }
  OTDD_DEVICE void set_slot(int k, double x) {
    if (kTeam == Team::kCluster) slots()[k] = x;
    else chip::put(in_workspace<double>(S.w_slots) + rank_ * kSlots + k, x);
  }
  OTDD_DEVICE double slot(int k, int rank) {
    if (kTeam == Team::kCluster) return chip::of_block(slots(), rank)[k];
    return chip::fetch_fresh(in_workspace<double>(S.w_slots) + rank * kSlots + k);
  }

  OTDD_DEVICE double sum_of_block(double x) { return over_block(x, Add(), 0.0, sums()); }
  template <class Op>
  OTDD_DEVICE double over_all(double x, Op op, double nothing) {
    x = over_block(x, op, nothing, sums());
    if constexpr (kTeam != Team::kAlone) {
      const int k = kSumSlot + (sum_turn_ ^= 1);
      if (thread_ == 0) set_slot(k, x);
      meet();
      x = nothing;
      for (int r = thread_; r < S.peers; r += threads_) x = op(x, slot(k, r));
      x = over_block(x, op, nothing, sums());
    }
    return x;
  }

  // Of what other blocks wrote.
  OTDD_DEVICE static Four<T> fetch4(const T* p) {
    return {chip::fetch_fresh(p), chip::fetch_fresh(p + 1), chip::fetch_fresh(p + 2), chip::fetch_fresh(p + 3)};
  }
  OTDD_DEVICE static Four<T> four(const T* p) { return *reinterpret_cast<const Four<T>*>(p); }
  OTDD_DEVICE Four<T> element4(i64 i, i64 j) const { return four(K() + i * S.ld + j); }
  OTDD_DEVICE T element(i64 i, i64 j) const { return K()[i * S.ld + j]; }
  OTDD_DEVICE void put(i64 i, i64 j, T e) { K()[i * S.ld + j] = e; }

  OTDD_DEVICE void sum_columns(int quad, int begin, int end, T* out) {
    Four<T> s = {0, 0, 0, 0};
    for (int i = begin; i < end; ++i) {
      s.add(rows()[i].u_new, element4(i, 4 * quad));
    }
    *reinterpret_cast<Four<T>*>(out + 4 * quad) = s;
  }
  OTDD_DEVICE T over_groups(i64 j) const {
    T s = scratch()[j];
    for (int g = 1; g < S.groups; ++g) s += scratch()[g * S.ld + j];
    return s;
  }

  OTDD_DEVICE T cost(i64 i, i64 j) const { return C_->at<T>(problem_, row0() + i, j); }
  OTDD_DEVICE double exponent(i64 i, i64 j) const { return double(cost(i, j)) * inv_eps_; }
  OTDD_DEVICE static T power(double x) { return chip::exp2_fast(T(x * kLog2e)); }
};

}  // namespace otdd::cuda
