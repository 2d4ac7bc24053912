// Which threads work on a problem, from its size, the size of the batch and the chip.
#pragma once

#include <type_traits>

#include "launch.h"
#include "slab.h"
#include "stream.h"

namespace otdd::cuda {

constexpr int kWarps = 4;  // of a block, each with a problem of its own

// Where a team's own part of the workspace is, and how large.
struct TeamSpace {
  i64 rows = 0, columns = 0, bytes = 0;  // of the outer products, after what the barriers need
};

struct Layout {
  enum Kind { kWarp, kSlab, kStream } kind = kSlab;
  Team team = Team::kAlone;  // of a slab; a stream is a group
  i64 teams = 0;
  SlabPlan slab;
  StreamPlan stream;

  i64 workspace() const { return kind == kSlab ? slab.workspace : kind == kStream ? stream.workspace : 0; }
  Shape shape() const {
    if (kind == kWarp) return {int((teams + kWarps - 1) / kWarps), 32 * kWarps, kWarps * kUniformBytes};
    if (kind == kStream) return {int(teams * stream.peers()), stream.threads, stream.shared(), 1, true};
    return {int(teams * slab.peers), slab.threads, slab.shared, team == Team::kCluster ? slab.peers : 1,
            team == Team::kGroup};
  }
};

// Elements of K that a lane holds in registers: of 255, half of them for float and a quarter for double,
// whose every other number takes two as well.
template <class T>
constexpr int kTile = sizeof(T) == 4 ? 128 : 32;

inline int tile_rows(i64 N) { return N <= 16 ? 4 : N <= 32 ? 8 : 16; }
inline int tile_columns(i64 M) { return M <= 16 ? 2 : M <= 32 ? 4 : 8; }

template <class T>
inline bool fits_a_warp(i64 N, i64 M) {
  return N <= 64 && M <= 64 && tile_rows(N) * tile_columns(M) <= kTile<T>;
}

// A block's share is better not less than this, so that barriers don't outweigh it.
constexpr i64 kLeastRows = 8, kLeastElements = 4096;
// Nor, where they come from device memory, more: they are then all of the time anyway.
constexpr i64 kMostElements = 1 << 19;

template <class T, class State>
Layout layout_of(const Chip& chip, i64 B, i64 N, i64 M) {
  Layout l;
  if (fits_a_warp<T>(N, M)) {
    l.kind = Layout::kWarp, l.teams = B;
    return l;
  }
  const auto slab = [&](Team team, i64 peers) {
    const i64 share = (N + peers - 1) / peers * M;
    const int threads = share < 8192 ? 128 : share < 16384 ? 256 : kMaxThreads;
    l.team = team, l.slab = plan_slab<T, State>(N, M, team, int(peers), threads, chip.shared);
    return l.slab.shared <= chip.shared;
  };
  const auto worth_more = [&](i64 peers) {
    return B * 2 * peers <= chip.multiprocessors && N >= 2 * peers * kLeastRows &&
           N * M >= 2 * peers * kLeastElements;
  };
  l.teams = B;
  for (i64 peers = 1; peers <= chip.cluster; peers *= 2) {
    const Team team = peers == 1 ? Team::kAlone : Team::kCluster;
    const bool portable = peers * 2 <= 8 && peers * 2 <= chip.cluster;
    if (slab(team, peers) && !(portable && worth_more(peers))) return l;
  }
  // A group: as many blocks as there are processors for each problem, one block on each.
  const i64 all = chip.multiprocessors;
  i64 peers = B < all ? all / B : 1;
  const i64 by_rows = (N + kLeastRows - 1) / kLeastRows;
  peers = peers > by_rows ? by_rows : peers < 1 ? 1 : peers;
  while (peers < all && peers < by_rows && !slab(Team::kGroup, peers)) ++peers;
  if (!slab(Team::kGroup, peers)) {
    const i64 least = ceil_div(N * M, kMostElements), most = ceil_div(N * M, kLeastElements);
    peers = all / B > least ? all / B : least;
    if (2 * peers > all) peers = all;
    peers = peers > most ? most : peers;
    l.kind = Layout::kStream, l.stream = plan_stream<T, State>(N, M, peers, chip.barrier);
    peers = l.stream.peers();
  }
  const i64 together = all / peers;
  l.teams = B < together ? B : together;
  return l;
}

template <class T, int kRows, int kColumns, class Call>
void try_tile(i64 N, i64 M, Call& call, int& status) {
  if constexpr (kRows * kColumns <= kTile<T>)
    if (tile_rows(N) == kRows && tile_columns(M) == kColumns)
      status = call(std::integral_constant<int, kRows>(), std::integral_constant<int, kColumns>());
}
template <class T, int kRows, class Call>
void try_tiles(i64 N, i64 M, Call& call, int& status) {
  try_tile<T, kRows, 2>(N, M, call, status), try_tile<T, kRows, 4>(N, M, call, status);
  try_tile<T, kRows, 8>(N, M, call, status);
}
// call(rows, columns) with the tile of a lane.
template <class T, class Call>
int with_tile(i64 N, i64 M, Call call) {
  int status = kFailed;
  try_tiles<T, 4>(N, M, call, status), try_tiles<T, 8>(N, M, call, status);
  try_tiles<T, 16>(N, M, call, status);
  return status;
}

// of_warp(rows, columns) with a lane's tile, of_slab(team) or of_stream(), once the counters of the groups'
// barriers, at the begin of each team's `pitch` bytes of the workspace, are 0.
template <class T, class OfWarp, class OfSlab, class OfStream>
int with_layout(const Layout& l, i64 N, i64 M, void* workspace, i64 pitch, void* stream, OfWarp of_warp,
                OfSlab of_slab, OfStream of_stream) {
  if (l.kind == Layout::kWarp) return with_tile<T>(N, M, of_warp);
  if (l.team == Team::kAlone) return of_slab(std::integral_constant<Team, Team::kAlone>());
  if (l.team == Team::kCluster) return of_slab(std::integral_constant<Team, Team::kCluster>());
  const int status = clear(workspace, pitch, 128, l.teams, stream);
  if (status != kOk) return status;
  return l.kind == Layout::kStream ? of_stream() : of_slab(std::integral_constant<Team, Team::kGroup>());
}

}  // namespace otdd::cuda
