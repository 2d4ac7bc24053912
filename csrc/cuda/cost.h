// L1 and squared costs, and gradients of L1: how a problem is shared out among blocks, and what their kernels share.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "launch.h"

namespace otdd::cuda {

constexpr int kCostThreads = 256;
constexpr i64 kRunLength = 1024;  // terms to a sum before it joins the ones before: errors stay small

// What a thread reads at once, 16 bytes.
template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};
template <class T>
constexpr int kChunk = Chunk<T>::kSize;

// to[k] = the numbers from[k][d ..), of which there are `left`; zeros after them. `aligned`: all of them
// begin at multiples of 16 bytes.
template <int n, class T>
OTDD_DEVICE void load_chunks(Chunk<T>* to, const T* const* from, i64 d, i64 left, bool aligned) {
  if (aligned && left >= kChunk<T>) {
    OTDD_UNROLL
    for (int k = 0; k < n; ++k) to[k] = chip::read_16(reinterpret_cast<const Chunk<T>*>(from[k] + d));
  } else {
    OTDD_UNROLL
    for (int k = 0; k < n; ++k) {
      OTDD_UNROLL
      for (int l = 0; l < kChunk<T>; ++l) to[k].v[l] = l < left ? chip::read(from[k] + d + l) : T(0);
    }
  }
}
template <class T>
OTDD_DEVICE Chunk<T> load_chunk(const T* from, i64 left, bool aligned) {
  Chunk<T> c;
  load_chunks<1>(&c, &from, 0, left, aligned);
  return c;
}

// Threads beyond the last point work on that one, and leave nothing.
OTDD_DEVICE i64 at_most(i64 k, i64 last) { return k < last ? k : last; }

// A run of a sum's terms joins those before it.
template <class T>
OTDD_DEVICE void deliver(T* p, T sum, bool first, bool last) {
  if (!first) sum += chip::fetch(p);
  if (last) chip::write(p, sum);
  else chip::put(p, sum);
}

// Whether every point begins at a multiple of 16 bytes.
template <class T>
bool aligned(const Matrices<T>& p, i64 B, i64 count) {
  const auto whole = [](i64 stride) { return stride % kChunk<T> == 0; };
  return reinterpret_cast<std::uintptr_t>(p.data) % 16 == 0 && (B <= 1 || whole(p.batch)) &&
         (count <= 1 || whole(p.row));
}

// Where a kernel leaves entry (i, j) of a problem, and which shape its blocks have.
template <class T>
struct CostPlan {
  T* out;
  i64 row, column, copy;  // copy: from a slice's outputs to those of the next
  i64 slices, length;
  int parts;
  bool aligned;  // all points, to 16 bytes

  OTDD_DEVICE T* at(i64 problem, i64 size, i64 slice, i64 i, i64 j) const {
    return out + slice * copy + problem * size + i * row + j * column;
  }
};

// Tiles of outputs, whose sums may be cut into slices for want of tiles. Each slice has a copy of the
// outputs, and a second kernel adds these up.
struct Cut {
  i64 tiles = 0, slices = 1, length = 0;
  double time = HUGE_VAL;

  i64 blocks() const { return tiles * slices; }
};

// The fastest cut of sums of `terms` terms each, `outputs` of them to a tile. The unit of time is a term
// of one sum on one multiprocessor, and a term of all of a tile's sums takes `work`. A block that is
// alone on its multiprocessor does not fill it; a second kernel takes 2 us.
inline Cut cut_sums(const Chip& chip, i64 tiles, i64 outputs, double work, i64 terms, i64 step) {
  constexpr i64 kLeast = 128;
  Cut best;
  for (i64 wanted = 1; wanted <= 64; wanted *= 2) {
    Cut c;
    c.tiles = tiles, c.length = ceil_div(ceil_div(terms, wanted), step) * step;
    c.slices = terms > 0 ? ceil_div(terms, c.length) : 1;
    const i64 rounds = ceil_div(c.blocks(), chip.multiprocessors);
    c.time = (rounds == 1 ? 1.3 : double(rounds)) * work * double(c.length);
    if (c.slices > 1) c.time += double(rounds * outputs) * 64 + 2.5e5;
    if (c.time < best.time) best = c;
    if (c.length <= kLeast || c.blocks() >= 8 * chip.multiprocessors) break;
  }
  return best;
}

// The same for few tiles that are read from device memory: a slice for each of two blocks on every
// multiprocessor, as long as a slice takes more than the second kernel.
inline Cut cut_features(const Chip& chip, i64 tiles, i64 D, i64 step) {
  constexpr i64 kLeast = 4096;
  const i64 most = D / kLeast, wanted = tiles > 0 ? 2 * i64(chip.multiprocessors) / tiles : 1;
  const i64 slices = wanted > most ? most : wanted;
  Cut c;
  c.tiles = tiles, c.length = slices > 1 ? ceil_div(ceil_div(D, slices), step) * step : D;
  c.slices = ceil_div(D, c.length);
  return c;
}

// Blocks go round: as many as keep the chip busy, however many tiles there are.
inline int grid_of(const Chip& chip, i64 blocks) {
  const i64 most = 32 * i64(chip.multiprocessors);
  return int(blocks < most ? blocks : most);
}

// Threads of a tile have kTR x kTC sums each. Smaller ones read more of shared memory for a term.
template <int kRowsOfThread, int kColumnsOfThread>
struct CostTile {
  static constexpr int kTR = kRowsOfThread, kTC = kColumnsOfThread;
};

// call(tile, weight) with every tile there is.
template <class T, class Call>
void for_cost_tiles(Call call) {
  if constexpr (sizeof(T) == 4) call(CostTile<8, 8>(), 1.0);
  call(CostTile<4, 8>(), 1.1), call(CostTile<4, 4>(), 1.3), call(CostTile<2, 2>(), 2.0);
}

constexpr int kFewRows = 8, kBeside = 4;  // points of x at most, of y to a warp, where rows are streamed

struct CostLayout {
  bool swapped = false;  // the roles of x and y
  int parts = 0;         // of a row among the warps of a block, if rows are streamed; else 0
  int tile_rows = 0, tile_columns = 0;
  Cut cut;
};

template <class T>
CostLayout cost_layout(const Chip& chip, i64 B, i64 N, i64 M, i64 D) {
  CostLayout l;
  l.swapped = M < N && M <= 64;
  if (l.swapped) std::swap(N, M);
  if (N <= kFewRows && D >= 16 * kChunk<T>) {
    const auto tiles = [&] { return B * ceil_div(M, kCostThreads / 32 / l.parts * kBeside); };
    for (l.parts = 1; l.parts < kCostThreads / 32; l.parts *= 2)
      if (tiles() >= 4 * chip.multiprocessors || 32 * l.parts * kChunk<T> >= D) break;
    l.cut = cut_features(chip, tiles(), D, 32 * kChunk<T>);
    return l;
  }
  for_cost_tiles<T>([&](auto tile, double weight) {
    const i64 rows = 16 * tile.kTR, columns = 16 * tile.kTC;
    const i64 tiles = B * ceil_div(N, rows) * ceil_div(M, columns);
    const double work = weight * double(rows * columns);
    const Cut c = cut_sums(chip, tiles, rows * columns, work, D, 4 * kChunk<T>);
    if (c.time < l.cut.time) l.cut = c, l.tile_rows = tile.kTR, l.tile_columns = tile.kTC;
  });
  return l;
}

// Weights of the signed sums that are given, (N, M) with any strides.
template <class T>
struct GivenWeights {
  const T* data;
  i64 batch, row, column;

  OTDD_DEVICE bool along_x() const { return row < column; }
  OTDD_DEVICE T at(i64 problem, i64 i, i64 j) const {
    return chip::read(data + problem * batch + i * row + j * column);
  }
};

// One of the two gradients, out_id = sum_j G_ij sign(x_id - y_jd); of y it is with x and y exchanged.
template <class T, class Weights>
struct SideArgs {
  i64 N, M, D;
  Matrices<T> x, y;
  Weights G;
};

// A block's threads are in rows along the features, 2^across_bits to a row. A thread has `chunks` chunks
// of points by one chunk of features. 2^depth_bits points of y are in shared memory at a time.
struct SideLayout {
  int across_bits = 0, chunks = 1, depth_bits = 0;
  Cut cut;

  i64 across() const { return i64(1) << across_bits; }
  i64 down() const { return kCostThreads >> across_bits; }
  i64 shared() const { return (across() + down() * chunks + 1) * 16 << depth_bits; }
};

// A number that a block loads costs it as much as eight terms.
template <class T>
SideLayout side_layout(const Chip& chip, i64 B, i64 N, i64 M, i64 D) {
  SideLayout best;
  for (int bits = 0; bits <= 8 && (bits == 0 || (kChunk<T> << bits) < 2 * D); ++bits)
    for (int chunks = 1; chunks <= 2; ++chunks) {
      SideLayout l;
      l.across_bits = bits, l.chunks = chunks;
      while (l.depth_bits < 6 && 2 * l.shared() <= i64(48) << 10) ++l.depth_bits;
      const i64 rows = l.down() * chunks * kChunk<T>, columns = l.across() * kChunk<T>;
      const i64 tiles = B * ceil_div(N, rows) * ceil_div(D, columns);
      const double work = double(rows * columns) * (chunks == 1 ? 1.2 : 1) + 8 * double(rows + columns);
      l.cut = cut_sums(chip, tiles, rows * columns, work, M, 1);
      if (l.cut.time < best.cut.time) best = l;
    }
  return best;
}

}  // namespace otdd::cuda
