// Signed sums over the points of a cloud, the gradients of L1 costs: tiles of points by features.
#pragma once

#include "cost.h"

namespace otdd::cuda {

// sum += g sign(x - y). A float addition can be made to depend on a comparison; one of double not.
OTDD_DEVICE void add_signed(float& sum, float g, float x, float y) {
  if (x > y) sum += g;
  if (x < y) sum -= g;
}
OTDD_DEVICE void add_signed(double& sum, double g, double x, double y) {
  sum += x > y ? g : x < y ? -g : 0;
}

// Tiles of points by features. A thread keeps its numbers of x, and goes over the points of y: for each
// a chunk of features and, for its own points, G.
template <class T, int kChunks, class Weights>
OTDD_KERNEL OTDD_THREADS(kCostThreads, 2)
    cost_side(OTDD_ARGUMENT SideArgs<T, Weights> args, OTDD_ARGUMENT CostPlan<T> plan,
              OTDD_ARGUMENT SideLayout layout) {
  constexpr int L = kChunk<T>, kOwn = kChunks * L, kOwnBits = kOwn == 8 ? 3 : kOwn == 4 ? 2 : 1;
  const int width = 1 << layout.across_bits, height = kCostThreads >> layout.across_bits;
  const int depth = 1 << layout.depth_bits, rows = height * kOwn, pitch = height * kChunks + 1;
  Chunk<T>* ys = reinterpret_cast<Chunk<T>*>(chip::shared());
  Chunk<T>* gs = ys + depth * width;
  const int thread = chip::thread(), q = thread & (width - 1), p = thread >> layout.across_bits;
  const i64 down = (args.N + rows - 1) / rows, across = (args.D + width * L - 1) / (width * L);
  // G is read along its rows or its columns, whichever are nearer to each other in memory.
  const bool along_x = args.G.along_x();
  const int bits = along_x ? 8 - layout.across_bits + kOwnBits : layout.depth_bits;
  for (i64 k = chip::block(); k < layout.cut.tiles * plan.slices; k += chip::blocks()) {
    const i64 f = (k % across * width + q) * L, i0 = k / across % down * rows, own = i0 + p * L;
    const i64 slice = k / across / down % plan.slices, problem = k / across / down / plan.slices;
    const i64 begin = slice * plan.length, end = at_most(begin + plan.length, args.M);
    const T* x = args.x.data + problem * args.x.batch + f;
    const T* y = args.y.data + problem * args.y.batch + f;

    T sums[kChunks][L][L] = {};
    Chunk<T> xs[kChunks][L];
    OTDD_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      OTDD_UNROLL
      for (int k = 0; k < L; ++k)
        xs[c][k] = load_chunk(x + at_most(own + c * height * L + k, args.N - 1) * args.x.row, args.D - f,
                              plan.aligned);
    }
    i64 delivered = begin;
    const auto deliver_sums = [&](i64 done, bool last) {
      const i64 first = chip::fresh(own);
      OTDD_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        OTDD_UNROLL
        for (int k = 0; k < L; ++k) {
          const i64 i = first + c * height * L + k;
          OTDD_UNROLL
          for (int l = 0; l < L; ++l) {
            if (i < args.N && f + l < args.D)
              deliver(plan.at(problem, args.N * args.D, slice, i, f + l), sums[c][k][l],
                      delivered == begin, last);
            sums[c][k][l] = 0;
          }
        }
      }
      delivered = done;
    };

    for (i64 j0 = begin; j0 < end; j0 += depth) {
      const int count = int(at_most(end - j0, depth));
      if (j0 - delivered >= kRunLength) deliver_sums(j0, false);
      chip::sync();  // nobody needs the points before
      for (int j = p; j < count; j += height)
        ys[j * width + q] = load_chunk(y + (j0 + j) * args.y.row, args.D - f, plan.aligned);
      for (int g = thread; g < rows * depth; g += kCostThreads) {
        const int inner = g & ((1 << bits) - 1), outer = g >> bits;
        const int i = along_x ? inner : outer, j = along_x ? outer : inner;
        if (j < count)
          gs[j * pitch + i / L].v[i % L] = args.G.at(problem, at_most(i0 + i, args.N - 1), j0 + j);
      }
      chip::sync();
      const Chunk<T>*y_of_j = ys + q, *g_of_j = gs + p;
      for (int j = 0; j < count; ++j, y_of_j += width, g_of_j += pitch) {
        const Chunk<T> yj = *y_of_j;
        OTDD_UNROLL
        for (int c = 0; c < kChunks; ++c) {
          const Chunk<T> g = g_of_j[c * height];
          OTDD_UNROLL
          for (int k = 0; k < L; ++k) {
            OTDD_UNROLL
            for (int l = 0; l < L; ++l) add_signed(sums[c][k][l], g.v[k], xs[c][k].v[l], yj.v[l]);
          }
        }
      }
    }
    deliver_sums(end, true);
  }
}

// Into `out`, or its copies if the sums are cut.
template <class T, class Weights>
int launch_side(const Chip& chip, i64 B, const SideArgs<T, Weights>& args, const SideLayout& layout, T* out,
                void* stream) {
  const CostPlan<T> plan{out, args.D, 1, B * args.N * args.D, layout.cut.slices, layout.cut.length, 0,
                         aligned(args.x, B, args.N) && aligned(args.y, B, args.M)};
  const Shape shape{grid_of(chip, layout.cut.blocks()), kCostThreads, layout.shared()};
  return layout.chunks == 1 ? launch(cost_side<T, 1, Weights>, shape, stream, args, plan, layout)
                            : launch(cost_side<T, 2, Weights>, shape, stream, args, plan, layout);
}

// out = the sum of its copies, in their order.
template <class T>
OTDD_KERNEL OTDD_THREADS(256, 1) add_copies(const T* copies, i64 slices, i64 count, T* out) {
  const i64 step = i64(chip::blocks()) * chip::threads();
  for (i64 k = i64(chip::block()) * chip::threads() + chip::thread(); k < count; k += step) {
    T sum = chip::read(copies + k);
    for (i64 s = 1; s < slices; ++s) sum += chip::read(copies + s * count + k);
    chip::write(out + k, sum);
  }
}

// run(where the sums are to be left), then the copies, if there are several, become `out`.
template <class T, class Run>
int with_copies(const Chip& chip, const Cut& cut, i64 count, T* out, void* workspace, void* stream,
                Run run) {
  T* copies = static_cast<T*>(workspace);
  const int status = run(cut.slices > 1 ? copies : out);
  if (status != kOk || cut.slices == 1) return status;
  return launch(add_copies<T>, {grid_of(chip, ceil_div(count, 256)), 256}, stream, copies, cut.slices,
                count, out);
}

}  // namespace otdd::cuda
