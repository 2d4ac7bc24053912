// From the points of many classes to their transport, and to the gradient of its cost, in few launches of one call:
// L1 or squared costs, their spread, the solve, and signed sums weighted by the plan, or the plan itself.
#include "block.h"
#include "cost_side.h"

namespace otdd::cuda {

constexpr int kSpreadThreads = 1024;

// What one launch leaves in the workspace for the next, and what the solve writes and nobody asks for.
template <class T>
struct MoveSpace {
  double *eps, *to_exponent;
  T *joined, *with_weight;  // all costs of a class, of the moving points first; 1 where a row has weight
  T *value, *cost, *error;
  i64* n_iter;
  i64 bytes;

  MoveSpace(void* own, i64 B, i64 N, i64 L, i64 M) {
    Pieces m;
    const auto begin = reinterpret_cast<std::uintptr_t>(own);  // null where only the bytes are asked for
    const auto take = [&](i64 bytes) { return begin + std::uintptr_t(m.take(bytes)); };
    eps = reinterpret_cast<double*>(take(B * 8)), to_exponent = reinterpret_cast<double*>(take(B * 8));
    joined = reinterpret_cast<T*>(take(L > 0 ? B * (N + L) * M * i64(sizeof(T)) : 0));
    with_weight = reinterpret_cast<T*>(take(B * N * i64(sizeof(T))));
    value = reinterpret_cast<T*>(take(B * i64(sizeof(T)))), cost = reinterpret_cast<T*>(take(B * i64(sizeof(T))));
    error = reinterpret_cast<T*>(take(B * i64(sizeof(T)))), n_iter = reinterpret_cast<i64*>(take(B * 8));
    bytes = (m.bytes + 127) / 128 * 128;
  }
};

// A cluster of blocks for each class, where there are clusters: eps, and the costs of all its points in one place.
// Sums in double; a warp has a row at a time.
template <class T>
OTDD_KERNEL OTDD_THREADS(kSpreadThreads, 1)
    spread_costs(OTDD_ARGUMENT MoveArgs<T> args, OTDD_ARGUMENT MoveSpace<T> space) {
  double* of_warps = reinterpret_cast<double*>(chip::shared());
  double* of_block = of_warps + kMostWarps;
  const int lane = chip::thread() % 32, peers = chip::blocks_of_cluster(), rank = chip::block_of_cluster();
  const i64 warp = rank * (chip::threads() / 32) + chip::thread() / 32, warps = peers * (chip::threads() / 32);
  const i64 rows = args.N + args.L;
  for (i64 k = chip::block() / peers; k < args.B; k += chip::blocks() / peers) {
    const auto row_of = [&](i64 i) {
      const i64 moving = k * args.N + i, given = k * args.L + i - args.N;
      return i < args.N ? args.C + moving * args.M : args.given + given * args.M;
    };
    const auto over_class = [&](double x, int slot) {
      x = over_block(x, Add(), 0, of_warps);
      if (peers == 1) return x;
      if (chip::thread() == 0) of_block[slot] = x;
      chip::sync_cluster();
      x = 0;
      for (int r = 0; r < peers; ++r) x += chip::of_block(of_block, r)[slot];
      return x;
    };
    double sum = 0, count = 0;
    for (i64 i = warp; i < rows; i += warps) {
      const bool used = args.a.at(k, i) > 0;
      const T* row = row_of(i);
      T* out = space.joined + (k * rows + i) * args.M;
      if (lane == 0 && i < args.N) chip::write(space.with_weight + k * args.N + i, T(used ? 1 : 0));
      for (i64 j = lane; j < args.M; j += 32) {
        const T c = chip::read(row + j);
        if (args.L > 0) chip::write(out + j, c);
        if (used && args.b.at(k, j) > 0) sum += double(c), count += 1;
      }
    }
    sum = over_class(sum, 0), count = over_class(count, 1);
    const double mean = sum / count;
    double squares = 0;
    for (i64 i = warp; i < rows; i += warps) {
      if (!(args.a.at(k, i) > 0)) continue;
      const T* row = row_of(i);
      for (i64 j = lane; j < args.M; j += 32) {
        const double off = double(chip::read(row + j)) - mean;
        if (args.b.at(k, j) > 0) squares += off * off;
      }
    }
    squares = over_class(squares, 2);
    if (peers > 1) chip::sync_cluster();  // all have read what the next class, or nobody, will have here
    if (rank > 0 || chip::thread() != 0) continue;
    const double spread = ::sqrt(squares / count), least = 1e-6 * ::fabs(mean) + 1e-12;  // of a single pair: 0
    const T eps = T(args.lambda * (spread < least ? least : spread));
    chip::write(args.eps + k, eps), chip::write(space.eps + k, double(eps));
    chip::write(space.to_exponent + k, kLog2e / double(eps));
  }
}

// A block's share is better not less than 8192 costs.
inline Shape shape_of_spread(const Chip& chip, i64 B, i64 costs) {
  int peers = 1;
  while (2 * peers <= 8 && 2 * peers <= chip.cluster && 2 * peers * 8192 <= costs) peers *= 2;
  return {grid_of(chip, B) * peers, kSpreadThreads, (kMostWarps + 3) * i64(sizeof(double)), peers};
}

// The plan, from its potentials. Without its weights no entry overflows: each column has the mass of its weight.
template <class T>
struct MoveWeights {
  const T* C;
  Vectors<T> f, g, a, b;
  const double* to_exponent;
  i64 N, M;

  OTDD_DEVICE bool along_x() const { return false; }
  OTDD_DEVICE T at(i64 problem, i64 i, i64 j) const {
    const T a_i = a.at(problem, i), b_j = b.at(problem, j);
    if (!(a_i > 0 && b_j > 0)) return 0;
    const double potentials = double(f.at(problem, i)) + double(g.at(problem, j));
    const double less = potentials - double(chip::read(C + (problem * N + i) * M + j));
    return a_i * (b_j * chip::exp2_fast(T(less * chip::read(to_exponent + problem))));
  }
};

template <class T>
i64 moves_workspace(int device, i64 B, i64 N, i64 L, i64 M, i64 D) {
  const i64 costs = cost_workspace<T>(device, B, N, M, D), solve = sinkhorn_workspace<T>(device, B, N + L, M);
  i64 copies = -2;
  on_device(device, [&](const Chip& chip) {
    const i64 slices = side_layout<T>(chip, B, N, M, D).cut.slices;
    copies = slices > 1 ? slices * B * N * D * i64(sizeof(T)) : 0;
    return int(kOk);
  });
  if (costs < 0 || solve < 0 || copies < 0) return -2;
  const i64 most = costs > solve ? costs : solve;
  return MoveSpace<T>(nullptr, B, N, L, M).bytes + (most > copies ? most : copies);
}

template <class T>
int moves(const MoveArgs<T>& m, int device, void* workspace, void* stream) {
  if (m.B == 0) return kOk;
  const i64 rows = m.N + m.L;
  const MoveSpace<T> space(workspace, m.B, m.N, m.L, m.M);
  char* rest = static_cast<char*>(workspace) + space.bytes;
  int status = kOk;
  if (m.x.data) status = cost<T>({m.B, m.N, m.M, m.D, m.x, m.y, m.C, m.squared}, device, rest, stream);
  if (status != kOk) return status;
  status = on_device(device, [&](const Chip& chip) {
    return launch(spread_costs<T>, shape_of_spread(chip, m.B, rows * m.M), stream, m, space);
  });
  if (status != kOk) return status;
  SinkhornArgs<T> s{};
  const Number type = sizeof(T) == 8 ? kFloat64 : kFloat32;
  s.B = m.B, s.N = rows, s.M = m.M, s.C = {m.L > 0 ? space.joined : m.C, rows * m.M, m.M, type};
  s.a = m.a, s.b = m.b, s.eps = {space.eps, 1, 0, 0}, s.g0 = m.g0;
  s.rho_a = s.rho_b = {nullptr, 0, 0, HUGE_VAL};
  s.max_iter = m.max_iter, s.f = m.f, s.g = m.g;
  s.value = space.value, s.cost = space.cost, s.marginal_error = space.error, s.n_iter = space.n_iter;
  status = sinkhorn<T>(s, device, rest, stream);
  if (status != kOk) return status;
  const Vectors<T> f{m.f, rows, 1, T()}, g{m.g, m.M, 1, T()};
  if (m.plan) {
    PlanArgs<T> p{};
    static_cast<Problems<T>&>(p) = s;
    p.N = m.N, p.C = {m.C, m.N * m.M, m.M, type}, p.f = f, p.g = g, p.scale = {nullptr, 0, 0, T(1)};
    if (m.relative) p.a = {space.with_weight, m.N, 1, T()};
    p.P = m.plan, p.P_type = type;
    return plan<T>(p, device, stream);
  }
  return on_device(device, [&](const Chip& chip) {
    const SideLayout layout = side_layout<T>(chip, m.B, m.N, m.M, m.D);
    const MoveWeights<T> weights{m.C, f, g, m.a, m.b, space.to_exponent, m.N, m.M};
    const SideArgs<T, MoveWeights<T>> side{m.N, m.M, m.D, m.x, m.y, weights};
    return with_copies(chip, layout.cut, m.B * m.N * m.D, m.dx, rest, stream,
                       [&](T* to) { return launch_side(chip, m.B, side, layout, to, stream); });
  });
}

template i64 moves_workspace<float>(int, i64, i64, i64, i64, i64);
template i64 moves_workspace<double>(int, i64, i64, i64, i64, i64);
template int moves<float>(const MoveArgs<float>&, int, void*, void*);
template int moves<double>(const MoveArgs<double>&, int, void*, void*);

}  // namespace otdd::cuda
