// What grips of whole blocks have in common: four numbers at once, sums over a warp and over a block.
#pragma once

#include "solver.h"

namespace otdd::cuda {

template <class T>
struct alignas(16) Four {
  T x, y, z, w;

  OTDD_DEVICE void add(T u, const Four& k) { x += u * k.x, y += u * k.y, z += u * k.z, w += u * k.w; }
};

constexpr i64 kUniformBytes = 160;
constexpr int kMaxThreads = 512, kMostWarps = 32;

inline i64 fours(i64 n) { return (n + 3) / 4 * 4; }
OTDD_DEVICE i64 inside(i64 n, i64 most) { return n < 0 ? 0 : n < most ? n : most; }

// Teams of `peers` blocks in the grid. Computed anew for each problem, or what addresses of the next problem are made of
// would take registers from the solve.
OTDD_DEVICE int teams_of(i64 peers) { return int(chip::fresh(chip::blocks())) / int(peers); }

// Memory handed out in pieces that begin at multiples of 16 bytes.
struct Pieces {
  i64 bytes = 0;

  i64 take(i64 wanted) {
    const i64 begin = bytes;
    bytes += (wanted + 15) / 16 * 16;
    return begin;
  }
};

// x and what 16 lanes further have; op is any that does not care for the order.
template <class Op>
OTDD_DEVICE double over_warp(double x, Op op) {
  for (int mask = 16; mask > 0; mask /= 2) x = op(x, chip::shuffle_xor(x, mask));
  return x;
}

// The sum over the warp of s[lane / 8].
template <class T>
OTDD_DEVICE T fold4(T (&s)[4], int lane) {
  const bool upper = lane & 16, odd = lane & 8;
  OTDD_UNROLL
  for (int k = 0; k < 2; ++k) {
    const T given = upper ? s[k] : s[k + 2];
    s[k] = (upper ? s[k + 2] : s[k]) + chip::shuffle_xor(given, 16);
  }
  const T given = odd ? s[0] : s[1];
  T total = (odd ? s[1] : s[0]) + chip::shuffle_xor(given, 8);
  for (int mask = 4; mask > 0; mask /= 2) total += chip::shuffle_xor(total, mask);
  return total;
}

// Of all threads of the block, by way of `of_warps`, kMostWarps numbers that they share.
template <class Op>
OTDD_DEVICE double over_block(double x, Op op, double nothing, double* of_warps) {
  x = over_warp(x, op);
  if (chip::thread() % 32 == 0) of_warps[chip::thread() / 32] = x;
  chip::sync();
  double s = nothing;
  for (int w = 0; w < chip::threads() / 32; ++w) s = op(s, of_warps[w]);
  chip::sync();
  return s;
}

struct Add {
  OTDD_DEVICE double operator()(double s, double t) const { return s + t; }
};
struct Least {
  OTDD_DEVICE double operator()(double s, double t) const { return ::fmin(s, t); }
};
struct Most {
  OTDD_DEVICE double operator()(double s, double t) const { return ::fmax(s, t); }
};

}  // namespace otdd::cuda
