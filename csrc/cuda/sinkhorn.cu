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

// One element a thread, as many as there are.
template <class T>
OTDD_KERNEL OTDD_THREADS(256, 1) plan_elements(OTDD_ARGUMENT PlanArgs<T> args) {
  const i64 size = args.N * args.M, count = args.B * size;
  const i64 step = i64(chip::blocks()) * chip::threads();
  for (i64 k = i64(chip::block()) * chip::threads() + chip::thread(); k < count; k += step) {
    const i64 problem = k / size, i = k % size / args.M, j = k % args.M;
    const double a = args.a.at(problem, i), b = args.b.at(problem, j);
    const double potentials = double(args.f.at(problem, i)) + double(args.g.at(problem, j));
    const double x = (potentials - double(args.C.template at<T>(problem, i, j))) / args.eps.at(problem, 0);
    const double P = a > 0 && b > 0 ? chip::exp2_fast(T((x + ::log(a) + ::log(b)) * kLog2e)) : 0;
    write_number(args.P, args.P_type, k, T(P * double(args.scale.at(problem, 0))));
  }
}

template <class T>
int plan(const PlanArgs<T>& args, int device, void* stream) {
  const i64 blocks = (args.B * args.N * args.M + 255) / 256;
  if (blocks == 0) return kOk;
  return on_device(device, [&](const Chip& chip) {
    const i64 most = 16 * i64(chip.multiprocessors);
    return launch(plan_elements<T>, {int(blocks < most ? blocks : most), 256}, stream, args);
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
