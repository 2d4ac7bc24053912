// Derivatives of whole solves in one launch, laid out like the solves.
#include "backward.h"

#include "layout.h"
#include "warp.h"

namespace otdd::cuda {

template <class T, int kTR, int kTC>
OTDD_KERNEL OTDD_THREADS(kWarps * 32, 1)
    unrolled_warp(OTDD_ARGUMENT BackwardArgs<T> args, OTDD_ARGUMENT TeamSpace space, char* workspace) {
  using Grip = WarpGrip<T, Unroll<T>, kTR, kTC>;
  const auto team = [] { return int(chip::fresh(chip::block())) * kWarps + chip::thread() / 32; };
  Grip grip;
  for (unsigned problem = team(); problem < args.B; problem += kWarps * unsigned(chip::fresh(chip::blocks()))) {
    char* own = workspace + team() * space.bytes;
    Unrolled<T, Grip>(args, grip, problem)
        .run(reinterpret_cast<T*>(own + space.rows), reinterpret_cast<T*>(own + space.columns));
  }
}

template <class T, Team kTeam>
OTDD_KERNEL OTDD_THREADS(kMaxThreads, 1)
    unrolled_slab(OTDD_ARGUMENT BackwardArgs<T> args, OTDD_ARGUMENT SlabPlan plan,
                  OTDD_ARGUMENT TeamSpace space, char* workspace) {
  using Grip = SlabGrip<T, Unroll<T>, kTeam>;
  const int team = chip::block() / plan.peers;
  char* own = workspace + team * space.bytes;
  Grip grip(plan, own);
  for (unsigned problem = team; problem < args.B; problem += teams_of(plan.peers))
    Unrolled<T, Grip>(args, grip, problem)
        .run(reinterpret_cast<T*>(own + space.rows), reinterpret_cast<T*>(own + space.columns));
  grip.leave();
}

template <class T>
OTDD_KERNEL OTDD_THREADS(kStreamThreads, 1)
    unrolled_stream(OTDD_ARGUMENT BackwardArgs<T> args, OTDD_ARGUMENT StreamPlan plan,
                    OTDD_ARGUMENT TeamSpace space, char* workspace) {
  using Grip = StreamGrip<T, Unroll<T>>;
  const int team = chip::block() / plan.peers();
  char* own = workspace + team * space.bytes;
  Grip grip(plan, own);
  for (unsigned problem = team; problem < args.B; problem += teams_of(plan.peers()))
    Unrolled<T, Grip>(args, grip, problem)
        .run(reinterpret_cast<T*>(own + space.rows), reinterpret_cast<T*>(own + space.columns));
}

template <class T, int kTR, int kTC>
OTDD_KERNEL OTDD_THREADS(kWarps * 32, 1) implicit_warp(OTDD_ARGUMENT BackwardArgs<T> args) {
  const i64 problem = i64(chip::block()) * kWarps + chip::thread() / 32;
  if (problem >= args.B) return;
  using Grip = WarpGrip<T, Conjugate<T>, kTR, kTC>;
  Grip grip;
  Implicit<T, Grip>(args, grip, problem).run();
}

template <class T, Team kTeam>
OTDD_KERNEL OTDD_THREADS(kMaxThreads, 1)
    implicit_slab(OTDD_ARGUMENT BackwardArgs<T> args, OTDD_ARGUMENT SlabPlan plan, char* workspace) {
  using Grip = SlabGrip<T, Conjugate<T>, kTeam>;
  const int team = chip::block() / plan.peers;
  Grip grip(plan, workspace + team * plan.workspace);
  for (unsigned problem = team; problem < args.B; problem += teams_of(plan.peers))
    Implicit<T, Grip>(args, grip, problem).run();
  grip.leave();
}

template <class T>
OTDD_KERNEL OTDD_THREADS(kStreamThreads, 1)
    implicit_stream(OTDD_ARGUMENT BackwardArgs<T> args, OTDD_ARGUMENT StreamPlan plan, char* workspace) {
  using Grip = StreamGrip<T, Conjugate<T>>;
  const int team = chip::block() / plan.peers();
  Grip grip(plan, workspace + team * plan.workspace);
  for (unsigned problem = team; problem < args.B; problem += teams_of(plan.peers()))
    Implicit<T, Grip>(args, grip, problem).run();
}

// No more teams than run at the same time, about: each has a workspace of its own.
template <class T>
Layout unrolled_layout(const Chip& chip, i64 B, i64 N, i64 M) {
  Layout l = layout_of<T, Unroll<T>>(chip, B, N, M);
  const bool warp = l.kind == Layout::kWarp;
  const i64 together = warp ? 12 * i64(chip.multiprocessors) : 4 * i64(chip.multiprocessors) / l.slab.peers;
  const i64 most = together < 1 ? 1 : together;
  if (l.team != Team::kGroup && l.teams > most) l.teams = most;
  if (warp) l.teams = (l.teams + kWarps - 1) / kWarps * kWarps;
  return l;
}

template <class T>
TeamSpace space_of(const Layout& l, i64 N, i64 M, i64 steps) {
  i64 row = 4 * tile_rows(N), column = 8 * tile_columns(M);
  if (l.kind == Layout::kSlab) row = l.slab.row_stride(), column = l.slab.ld;
  if (l.kind == Layout::kStream) row = l.stream.all_rows(), column = l.stream.all_columns();
  const auto padded = [](i64 bytes) { return (bytes + 127) / 128 * 128; };
  TeamSpace s;
  s.rows = l.workspace(), s.columns = s.rows + padded(2 * steps * row * i64(sizeof(T)));
  s.bytes = s.columns + padded(2 * steps * column * i64(sizeof(T)));
  return s;
}

template <class T>
i64 backward_workspace(int device, bool unrolled, i64 B, i64 N, i64 M, i64 steps) {
  if (B == 0) return 0;
  i64 bytes = -2;
  on_device(device, [&](const Chip& chip) {
    const Layout l = unrolled ? unrolled_layout<T>(chip, B, N, M)
                              : layout_of<T, Conjugate<T>>(chip, B, N, M);
    bytes = l.teams * (unrolled ? space_of<T>(l, N, M, steps).bytes : l.workspace());
    return int(kOk);
  });
  return bytes;
}

template <class T>
int backward_unrolled(const BackwardArgs<T>& args, const Chip& chip, char* own, void* stream) {
  const Layout l = unrolled_layout<T>(chip, args.B, args.N, args.M);
  const TeamSpace space = space_of<T>(l, args.N, args.M, args.steps);
  return with_layout<T>(
      l, args.N, args.M, own, space.bytes, stream,
      [&](auto rows, auto columns) {
        return launch(unrolled_warp<T, decltype(rows)::value, decltype(columns)::value>, l.shape(), stream,
                      args, space, own);
      },
      [&](auto team) {
        return launch(unrolled_slab<T, decltype(team)::value>, l.shape(), stream, args, l.slab, space, own);
      },
      [&] { return launch(unrolled_stream<T>, l.shape(), stream, args, l.stream, space, own); });
}

template <class T>
int backward_implicit(const BackwardArgs<T>& args, const Chip& chip, char* own, void* stream) {
  const Layout l = layout_of<T, Conjugate<T>>(chip, args.B, args.N, args.M);
  return with_layout<T>(
      l, args.N, args.M, own, l.workspace(), stream,
      [&](auto rows, auto columns) {
        return launch(implicit_warp<T, decltype(rows)::value, decltype(columns)::value>, l.shape(), stream,
                      args);
      },
      [&](auto team) {
        return launch(implicit_slab<T, decltype(team)::value>, l.shape(), stream, args, l.slab, own);
      },
      [&] { return launch(implicit_stream<T>, l.shape(), stream, args, l.stream, own); });
}

// The implicit system is solved in float64 only.
template <class T>
int backward(const BackwardArgs<T>& args, bool unrolled, int device, void* workspace, void* stream) {
  if (args.B == 0) return kOk;
  char* own = static_cast<char*>(workspace);
  return on_device(device, [&](const Chip& chip) {
    if (unrolled) return backward_unrolled(args, chip, own, stream);
    if constexpr (sizeof(T) == 8) return backward_implicit(args, chip, own, stream);
    else return int(kFailed);
  });
}

template i64 backward_workspace<float>(int, bool, i64, i64, i64, i64);
template i64 backward_workspace<double>(int, bool, i64, i64, i64, i64);
template int backward<float>(const BackwardArgs<float>&, bool, int, void*, void*);
template int backward<double>(const BackwardArgs<double>&, bool, int, void*, void*);

}  // namespace otdd::cuda
