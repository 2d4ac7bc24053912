// L1 and squared costs from differences, and gradients of L1, tile by tile: no buffer of N x M x D, no atomics.
#include "cost_side.h"

namespace otdd::cuda {

// Two additions a feature, or one and a multiply-add; the sum's own chain is a fourth (float) as long.
template <bool kSquared, class T>
OTDD_DEVICE T distance(const Chunk<T>& x, const Chunk<T>& y) {
  if constexpr (kSquared) {
    T d[kChunk<T>];
    OTDD_UNROLL
    for (int l = 0; l < kChunk<T>; ++l) d[l] = x.v[l] - y.v[l];
    T sum = d[0] * d[0];
    OTDD_UNROLL
    for (int l = 1; l < kChunk<T>; ++l) sum += d[l] * d[l];
    return sum;
  } else {
    T sum = ::fabs(x.v[0] - y.v[0]) + ::fabs(x.v[1] - y.v[1]);
    if constexpr (kChunk<T> == 4) sum += ::fabs(x.v[2] - y.v[2]) + ::fabs(x.v[3] - y.v[3]);
    return sum;
  }
}

// Tiles of 16 kTR points of x against 16 kTC of y, four chunks of features at a time. While these are
// worked on in one half of shared memory, the next are on their way to the other. Points are an odd
// number of chunks apart, so that eight of them lie in different banks.
template <bool kSquared, class T, int kTR, int kTC>
OTDD_KERNEL OTDD_THREADS(kCostThreads, kTR* kTC * sizeof(T) > 128 ? 1 : 2)
    cost_tiles(OTDD_ARGUMENT CostArgs<T> args, OTDD_ARGUMENT CostPlan<T> plan) {
  constexpr int kRows = 16 * kTR, kPoints = kRows + 16 * kTC, kLoads = kPoints / 64, kPitch = 5;
  constexpr i64 kStep = 4 * kChunk<T>;
  Chunk<T>* shared = reinterpret_cast<Chunk<T>*>(chip::shared());
  const int thread = chip::thread(), lane = thread % 32, warp = thread / 32;
  const int p = warp / 2 * 4 + lane / 8, q = warp % 2 * 8 + lane % 8;  // a warp: 4 rows of 8
  const int point = thread / 4, chunk = thread % 4;                    // what the thread loads
  const i64 down = (args.N + kRows - 1) / kRows, across = (args.M + 16 * kTC - 1) / (16 * kTC);
  for (i64 k = chip::block(); k < args.B * plan.slices * down * across; k += chip::blocks()) {
    const i64 i0 = k / across % down * kRows, j0 = k % across * (16 * kTC);
    const i64 slice = k / across / down % plan.slices, problem = k / across / down / plan.slices;
    const i64 begin = slice * plan.length, length = at_most(args.D - begin, plan.length);

    const T* from[kLoads];
    Chunk<T> next[kLoads];
    OTDD_UNROLL
    for (int l = 0; l < kLoads; ++l) {
      const int row = 64 * l + point;
      const T* x = args.x.data + problem * args.x.batch + at_most(i0 + row, args.N - 1) * args.x.row;
      const T* y = args.y.data + problem * args.y.batch +
                   at_most(j0 + row - kRows, args.M - 1) * args.y.row;
      from[l] = (row < kRows ? x : y) + begin + chunk * kChunk<T>;
    }
    const auto load = [&](i64 d) {
      load_chunks<kLoads>(next, from, d, length - d - chunk * kChunk<T>, plan.aligned);
    };
    const auto store = [&](int half) {
      OTDD_UNROLL
      for (int l = 0; l < kLoads; ++l)
        shared[(half * kPoints + 64 * l + point) * kPitch + chunk] = next[l];
    };

    T sums[kTR][kTC] = {};
    i64 delivered = 0;  // features
    const auto deliver_sums = [&](i64 done, bool last) {
      const i64 first_i = chip::fresh(i0 + p), first_j = chip::fresh(j0 + q);
      OTDD_UNROLL
      for (int t = 0; t < kTR; ++t) {
        OTDD_UNROLL
        for (int c = 0; c < kTC; ++c) {
          const i64 i = first_i + 16 * t, j = first_j + 16 * c;
          if (i < args.N && j < args.M)
            deliver(plan.at(problem, args.N * args.M, slice, i, j), sums[t][c], delivered == 0, last);
          sums[t][c] = 0;
        }
      }
      delivered = done;
    };

    load(0), store(0);
    chip::sync();
    int half = 0;
    for (i64 d = 0; d < length; d += kStep, half ^= 1) {
      const bool more = d + kStep < length;
      if (more) load(d + kStep);
      const Chunk<T>* x = shared + (half * kPoints + p) * kPitch;
      const Chunk<T>* y = shared + (half * kPoints + kRows + q) * kPitch;
      OTDD_UNROLL
      for (int c = 0; c < 4; ++c) {
        Chunk<T> xs[kTR];
        OTDD_UNROLL
        for (int t = 0; t < kTR; ++t) xs[t] = x[16 * t * kPitch + c];
        OTDD_UNROLL
        for (int s = 0; s < kTC; ++s) {
          const Chunk<T> ys = y[16 * s * kPitch + c];
          OTDD_UNROLL
          for (int t = 0; t < kTR; ++t) sums[t][s] += distance<kSquared>(xs[t], ys);
        }
      }
      if (more && d + kStep - delivered >= kRunLength) deliver_sums(d + kStep, false);
      if (more) store(half ^ 1);
      chip::sync();
    }
    deliver_sums(length, true);
  }
}

// Sums s[0 .. n) of all lanes added up: s[0] is then that of number lane / (32 / n), for n up to 32.
template <int n, int mask, class T>
OTDD_DEVICE void add_lanes(T* s, int lane) {
  if constexpr (n > 1) {
    const bool upper = lane & mask;
    OTDD_UNROLL
    for (int k = 0; k < n / 2; ++k) {
      const T given = upper ? s[k] : s[k + n / 2];
      s[k] = (upper ? s[k + n / 2] : s[k]) + chip::shuffle_xor(given, mask);
    }
  } else {
    s[0] += chip::shuffle_xor(s[0], mask);
  }
  if constexpr (mask > 1) add_lanes<(n > 1 ? n / 2 : 1), mask / 2>(s, lane);
}

constexpr int kFewBytes = 32 << 10;  // of x in shared memory

// Few points of x, up to kN: y is read once, from device memory. A warp takes kBeside points of y, or one
// of plan.parts parts of their features, against all of x, whose features come a section at a time. Where that
// leaves multiprocessors idle a block has a slice of the features.
template <bool kSquared, class T, int kN>
OTDD_KERNEL OTDD_THREADS(kCostThreads, kN * sizeof(T) > 32 ? 1 : 2)
    cost_few_rows(OTDD_ARGUMENT CostArgs<T> args, OTDD_ARGUMENT CostPlan<T> plan) {
  constexpr int kSection = kFewBytes / 16 / kN, kSums = kN * kBeside;
  Chunk<T>* xs = reinterpret_cast<Chunk<T>*>(chip::shared());
  T* of_warps = reinterpret_cast<T*>(chip::shared() + kFewBytes);
  const int thread = chip::thread(), lane = thread % 32, warp = thread / 32;
  const int groups = kCostThreads / 32 / plan.parts, group = warp % groups, part = warp / groups;
  const i64 across = (args.M + groups * kBeside - 1) / (groups * kBeside);
  for (i64 k = chip::block(); k < args.B * plan.slices * across; k += chip::blocks()) {
    const i64 problem = k / across / plan.slices, j0 = k % across * groups * kBeside;
    const i64 slice = k / across % plan.slices, begin = slice * plan.length;
    const i64 end = at_most(begin + plan.length, args.D);
    const T* x = args.x.data + problem * args.x.batch;
    const T* y[kBeside];
    OTDD_UNROLL
    for (int s = 0; s < kBeside; ++s)
      y[s] = args.y.data + problem * args.y.batch +
             at_most(j0 + group * kBeside + s, args.M - 1) * args.y.row;
    T sums[kSums] = {};
    for (i64 d = begin; d < end; d += kSection * kChunk<T>) {
      const int chunks = int(at_most((end - d + kChunk<T> - 1) / kChunk<T>, kSection));
      chip::sync();  // nobody needs the section before
      for (int k = thread; k < kN * kSection; k += kCostThreads) {
        const i64 i = at_most(k / kSection, args.N - 1), at = d + k % kSection * kChunk<T>;
        if (k % kSection < chunks)
          xs[k] = load_chunk(x + i * args.x.row + at, end - at, plan.aligned);
      }
      chip::sync();
      for (int c = part * 32 + lane; c < chunks; c += plan.parts * 32) {
        const i64 at = d + c * kChunk<T>;
        Chunk<T> ys[kBeside];
        load_chunks<kBeside>(ys, y, at, end - at, plan.aligned);
        OTDD_UNROLL
        for (int i = 0; i < kN; ++i) {
          const Chunk<T> xi = xs[i * kSection + c];
          OTDD_UNROLL
          for (int s = 0; s < kBeside; ++s) sums[i * kBeside + s] += distance<kSquared>(xi, ys[s]);
        }
      }
    }
    add_lanes<kSums, 16>(sums, lane);
    if (lane % (32 / kSums) == 0) of_warps[warp * kSums + lane / (32 / kSums)] = sums[0];
    chip::sync();
    if (thread < groups * kSums) {
      T total = 0;
      for (int w = 0; w < plan.parts; ++w) total += of_warps[w * groups * kSums + thread];
      const i64 i = thread % kSums / kBeside, j = j0 + thread / kSums * kBeside + thread % kBeside;
      if (i < args.N && j < args.M) chip::write(plan.at(problem, args.N * args.M, slice, i, j), total);
    }
  }
}

template <class T>
i64 cost_workspace(int device, i64 B, i64 N, i64 M, i64 D) {
  i64 bytes = -2;
  on_device(device, [&](const Chip& chip) {
    const i64 slices = cost_layout<T>(chip, B, N, M, D).cut.slices;
    bytes = slices > 1 ? slices * B * N * M * i64(sizeof(T)) : 0;
    return int(kOk);
  });
  return bytes;
}

template <bool kSquared, class T>
int cost_of(const CostArgs<T>& given, int device, void* workspace, void* stream) {
  const i64 count = given.B * given.N * given.M;
  if (count == 0) return kOk;
  return on_device(device, [&](const Chip& chip) {
    const CostLayout layout = cost_layout<T>(chip, given.B, given.N, given.M, given.D);
    CostArgs<T> args = given;
    if (layout.swapped) std::swap(args.N, args.M), std::swap(args.x, args.y);
    CostPlan<T> plan{nullptr, layout.swapped ? 1 : args.M, layout.swapped ? args.N : 1, count,
                     layout.cut.slices, layout.cut.length, layout.parts,
                     aligned(args.x, args.B, args.N) && aligned(args.y, args.B, args.M)};
    const int grid = grid_of(chip, layout.cut.blocks());
    return with_copies(chip, layout.cut, count, given.C, workspace, stream, [&](T* out) {
      plan.out = out;
      int status = kFailed;
      const auto few = [&](auto rows) {
        constexpr int kN = decltype(rows)::value;
        const i64 shared = kFewBytes + kCostThreads / 32 * kN * kBeside * sizeof(T);
        return launch(cost_few_rows<kSquared, T, kN>, {grid, kCostThreads, shared}, stream, args, plan);
      };
      if (layout.parts)
        return args.N > 4   ? few(std::integral_constant<int, 8>())
               : args.N > 2 ? few(std::integral_constant<int, 4>())
               : args.N > 1 ? few(std::integral_constant<int, 2>())
                            : few(std::integral_constant<int, 1>());
      for_cost_tiles<T>([&](auto tile, double) {
        constexpr int kTR = decltype(tile)::kTR, kTC = decltype(tile)::kTC;
        if (kTR != layout.tile_rows || kTC != layout.tile_columns) return;
        const i64 shared = 2 * 16 * (kTR + kTC) * 5 * 16;
        status = launch(cost_tiles<kSquared, T, kTR, kTC>, {grid, kCostThreads, shared}, stream, args, plan);
      });
      return status;
    });
  });
}

template <class T>
int cost(const CostArgs<T>& args, int device, void* workspace, void* stream) {
  return args.squared ? cost_of<true>(args, device, workspace, stream)
                      : cost_of<false>(args, device, workspace, stream);
}

template <class T>
i64 cost_backward_workspace(int device, i64 B, i64 N, i64 M, i64 D) {
  i64 bytes = -2;
  on_device(device, [&](const Chip& chip) {
    const i64 dx = side_layout<T>(chip, B, N, M, D).cut.slices;
    const i64 dy = side_layout<T>(chip, B, M, N, D).cut.slices;
    const i64 of_dx = dx > 1 ? dx * N : 0, of_dy = dy > 1 ? dy * M : 0;
    bytes = (of_dx > of_dy ? of_dx : of_dy) * B * D * i64(sizeof(T));
    return int(kOk);
  });
  return bytes;
}

// One side; the other one's workspace may be used again, for the stream keeps the order.
template <class T>
int cost_side_of(const Chip& chip, i64 B, const SideArgs<T, GivenWeights<T>>& args, T* out, void* workspace,
                 void* stream) {
  const i64 count = B * args.N * args.D;
  if (!out || count == 0) return kOk;
  const SideLayout layout = side_layout<T>(chip, B, args.N, args.M, args.D);
  return with_copies(chip, layout.cut, count, out, workspace, stream,
                     [&](T* to) { return launch_side(chip, B, args, layout, to, stream); });
}

template <class T>
int cost_backward(const CostBackwardArgs<T>& a, int device, void* workspace, void* stream) {
  return on_device(device, [&](const Chip& chip) {
    using Side = SideArgs<T, GivenWeights<T>>;
    const Side x{a.N, a.M, a.D, a.x, a.y, {a.G, a.G_batch, a.G_row, a.G_column}};
    const Side y{a.M, a.N, a.D, a.y, a.x, {a.G, a.G_batch, a.G_column, a.G_row}};
    const int status = cost_side_of(chip, a.B, x, a.dx, workspace, stream);
    return status == kOk ? cost_side_of(chip, a.B, y, a.dy, workspace, stream) : status;
  });
}

template i64 cost_workspace<float>(int, i64, i64, i64, i64);
template i64 cost_workspace<double>(int, i64, i64, i64, i64);
template int cost<float>(const CostArgs<float>&, int, void*, void*);
template int cost<double>(const CostArgs<double>&, int, void*, void*);
template i64 cost_backward_workspace<float>(int, i64, i64, i64, i64);
template i64 cost_backward_workspace<double>(int, i64, i64, i64, i64);
template int cost_backward<float>(const CostBackwardArgs<float>&, int, void*, void*);
template int cost_backward<double>(const CostBackwardArgs<double>&, int, void*, void*);

}  // namespace otdd::cuda
