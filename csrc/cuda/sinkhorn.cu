// Whole solves in one launch: a warp, a block, a cluster of blocks or a group of them for each problem.
#include "layout.h"
#include "warp.h"

namespace otdd::cuda {

template <class T, int kTR, int kTC>
OTDD_KERNEL OTDD_THREADS(kWarps * 32, 1) sinkhorn_warp(OTDD_ARGUMENT SinkhornArgs<T> args) {
  const i64 problem = i64(chip::block()) * kWarps + chip::thread() / 32;
  if (problem >= args.B) return;
  using Grip = WarpGrip<T, Iterate<T>, kTR, kTC>;
  Grip grip;
  Solver<T, Grip>(args, grip, problem).solve();
}

template <class T, Team kTeam>
OTDD_KERNEL OTDD_THREADS(kMaxThreads, 1)
    sinkhorn_slab(OTDD_ARGUMENT SinkhornArgs<T> args, OTDD_ARGUMENT SlabPlan plan, char* workspace) {
  const int team = chip::block() / plan.peers;
  using Grip = SlabGrip<T, Iterate<T>, kTeam>;
  Grip grip(plan, workspace + team * plan.workspace);
  for (unsigned problem = team; problem < args.B; problem += teams_of(plan.peers))
    Solver<T, Grip>(args, grip, problem).solve();
  grip.leave();
}

template <class T>
OTDD_KERNEL OTDD_THREADS(kStreamThreads, 1)
    sinkhorn_stream(OTDD_ARGUMENT SinkhornArgs<T> args, OTDD_ARGUMENT StreamPlan plan, char* workspace) {
  const int team = chip::block() / plan.peers();
  using Grip = StreamGrip<T, Iterate<T>>;
  Grip grip(plan, workspace + team * plan.workspace);
  for (unsigned problem = team; problem < args.B; problem += teams_of(plan.peers()))
    Solver<T, Grip>(args, grip, problem).solve();
}

template <class T>
i64 sinkhorn_workspace(int device, i64 B, i64 N, i64 M) {
  if (B == 0) return 0;
  i64 bytes = -2;
  on_device(device, [&](const Chip& chip) {
    const Layout layout = layout_of<T, Iterate<T>>(chip, B, N, M);
    bytes = layout.teams * layout.workspace();
    return int(kOk);
  });
  return bytes;
}

template <class T>
int sinkhorn(const SinkhornArgs<T>& args, int device, void* workspace, void* stream) {
  if (args.B == 0) return kOk;
  return on_device(device, [&](const Chip& chip) {
    const Layout layout = layout_of<T, Iterate<T>>(chip, args.B, args.N, args.M);
    char* own = static_cast<char*>(workspace);
    return with_layout<T>(
        layout, args.N, args.M, workspace, layout.workspace(), stream,
        [&](auto rows, auto columns) {
          return launch(sinkhorn_warp<T, decltype(rows)::value, decltype(columns)::value>, layout.shape(),
                        stream, args);
        },
        [&](auto team) {
          return launch(sinkhorn_slab<T, decltype(team)::value>, layout.shape(), stream, args, layout.slab, own);
        },
        [&] { return launch(sinkhorn_stream<T>, layout.shape(), stream, args, layout.stream, own); });
  });
}

// The base-2 logarithm of w exp(p / eps).
OTDD_DEVICE double exponent_of(double w, double p, double to_exponent) {
  return w > 0 ? ::log2(w) + p * to_exponent : -INFINITY;
}

constexpr int kPlanRows = 8, kPlanColumns = 64, kPlanThreads = 256;

// A warp has 8 rows of 64 columns at a time. Logarithms and divisions are done once for a row, by one lane, and
// for a column: for each element they would take several times as long as memory does.
template <class T>
OTDD_KERNEL OTDD_THREADS(kPlanThreads, 1) plan_tiles(OTDD_ARGUMENT PlanArgs<T> args) {
  constexpr int kBeside = kPlanColumns / 32;
  const int lane = chip::thread() % 32;
  const i64 down = (args.N + kPlanRows - 1) / kPlanRows, across = (args.M + kPlanColumns - 1) / kPlanColumns;
  const i64 warps = i64(chip::blocks()) * (kPlanThreads / 32), tiles = args.B * down * across;
  for (i64 k = i64(chip::block()) * (kPlanThreads / 32) + chip::thread() / 32; k < tiles; k += warps) {
    const i64 i0 = k / across % down * kPlanRows, j0 = k % across * kPlanColumns + lane, problem = k / across / down;
    const double to_exponent = kLog2e / args.eps.at(problem, 0), scale = args.scale.at(problem, 0);
    const i64 own = i0 + lane % kPlanRows, rows = args.N - i0, columns = args.M - j0;  // left, from here on
    double row = -INFINITY, column[kBeside];
    if (own < args.N) row = exponent_of(args.a.at(problem, own), args.f.at(problem, own), to_exponent);
    OTDD_UNROLL
    for (int c = 0; c < kBeside; ++c) {
      const i64 j = j0 + 32 * c;
      column[c] = -INFINITY;
      if (j < args.M) column[c] = exponent_of(args.b.at(problem, j), args.g.at(problem, j), to_exponent);
    }
    T costs[kPlanRows][kBeside];
    with_number<T>(args.C.type, [&](auto number) {
      const i64 first = problem * args.C.batch + i0 * args.C.row + j0;
      OTDD_UNROLL
      for (int r = 0; r < kPlanRows; ++r) {
        OTDD_UNROLL
        for (int c = 0; c < kBeside; ++c)
          costs[r][c] = r < rows && 32 * c < columns ? T(number.read(args.C.data, first + r * args.C.row + 32 * c)) : 0;
      }
    });
    const i64 first = (problem * args.N + i0) * args.M + j0;
    OTDD_UNROLL
    for (int r = 0; r < kPlanRows; ++r) {
      const double of_row = chip::shuffle(row, r);
      OTDD_UNROLL
      for (int c = 0; c < kBeside; ++c) {
        const bool used = of_row != -INFINITY && column[c] != -INFINITY;
        const double x = of_row + column[c] - double(costs[r][c]) * to_exponent;
        const double P = used ? chip::exp2_fast(T(x)) : 0;
        if (r < rows && 32 * c < columns)
          write_number(args.P, args.P_type, first + r * args.M + 32 * c, T(P * scale));
      }
    }
  }
}

template <class T>
int plan(const PlanArgs<T>& args, int device, void* stream) {
  const i64 tiles = args.B * ceil_div(args.N, kPlanRows) * ceil_div(args.M, kPlanColumns);
  if (tiles == 0) return kOk;
  return on_device(device, [&](const Chip& chip) {
    const i64 blocks = ceil_div(tiles, kPlanThreads / 32), most = 16 * i64(chip.multiprocessors);
    return launch(plan_tiles<T>, {int(blocks < most ? blocks : most), kPlanThreads}, stream, args);
  });
}

const char* last_error() { return error_text().c_str(); }

template i64 sinkhorn_workspace<float>(int, i64, i64, i64);
template i64 sinkhorn_workspace<double>(int, i64, i64, i64);
template int sinkhorn<float>(const SinkhornArgs<float>&, int, void*, void*);
template int sinkhorn<double>(const SinkhornArgs<double>&, int, void*, void*);
template int plan<float>(const PlanArgs<float>&, int, void*);
template int plan<double>(const PlanArgs<double>&, int, void*);

}  // namespace otdd::cuda
