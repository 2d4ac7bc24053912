// From logits to the transport between their softmaxes, and back, in few launches of one call.
//
// Forward: both softmaxes, the L1 costs, the solve. Backward: sums of signs weighted by the plan, which is made from the
// potentials where it is needed, then the derivative of the softmax.
#include "block.h"
#include "cost_side.h"

namespace otdd::cuda {

constexpr int kRowThreads = 256;

// A block has a row of classes at a time.
inline Shape shape_of_rows(const Chip& chip, i64 rows, i64 D) {
  int threads = 32;
  while (threads < kRowThreads && threads * 4 < D) threads *= 2;
  return {grid_of(chip, rows), threads, kMostWarps * i64(sizeof(double))};
}

// Rows of p, then rows of q; sums in double.
template <class T>
OTDD_KERNEL OTDD_THREADS(kRowThreads, 1) softmax_rows(OTDD_ARGUMENT LogitArgs<T> args) {
  double* of_warps = reinterpret_cast<double*>(chip::shared());
  const i64 count = args.B * args.N;
  const T scale = T(args.inv_tau * kLog2e);
  for (i64 k = chip::block(); k < 2 * count; k += chip::blocks()) {
    const bool of_teacher = k >= count;
    const Costs& logits = of_teacher ? args.teacher : args.student;
    const i64 row = of_teacher ? k - count : k;
    const i64 first = row / args.N * logits.batch + row % args.N * logits.row;
    T* out = (of_teacher ? args.q : args.p) + row * args.D;
    with_number<T>(logits.type, [&](auto number) {
      const auto logit = [&](i64 d) { return T(number.read(logits.data, first + d)); };
      double top = -INFINITY, sum = 0;
      for (i64 d = chip::thread(); d < args.D; d += chip::threads()) top = ::fmax(top, double(logit(d)));
      const T highest = T(over_block(top, Most(), -INFINITY, of_warps));
      const auto power = [&](i64 d) { return chip::exp2_fast((logit(d) - highest) * scale); };
      for (i64 d = chip::thread(); d < args.D; d += chip::threads()) sum += double(power(d));
      const T over_sum = T(1 / over_block(sum, Add(), 0, of_warps));
      for (i64 d = chip::thread(); d < args.D; d += chip::threads()) chip::write(out + d, power(d) * over_sum);
    });
  }
}

// A plan between equal weights, from its potentials.
template <class T>
struct PlanWeights {
  const T *C, *f, *g;
  i64 N;
  double to_exponent, log2_weights;  // of a_i b_j

  OTDD_DEVICE bool along_x() const { return false; }
  OTDD_DEVICE T at(i64 problem, i64 i, i64 j) const {
    const i64 row = problem * N + i;
    const double potentials = double(chip::read(f + row)) + double(chip::read(g + problem * N + j));
    const double exponent = (potentials - double(chip::read(C + row * N + j))) * to_exponent;
    return chip::exp2_fast(T(exponent + log2_weights));
  }
};

// d student = dcost / tau p (s - <p, s>), for s the sum of its copies, in their order.
template <class T>
OTDD_KERNEL OTDD_THREADS(kRowThreads, 1)
    softmax_backward(OTDD_ARGUMENT LogitBackwardArgs<T> args, const T* copies, i64 slices) {
  double* of_warps = reinterpret_cast<double*>(chip::shared());
  const i64 size = args.B * args.N * args.D;
  for (i64 row = chip::block(); row < args.B * args.N; row += chip::blocks()) {
    const T* p = args.p + row * args.D;
    const auto signed_sum = [&](i64 d) {
      T sum = chip::read(copies + row * args.D + d);
      for (i64 s = 1; s < slices; ++s) sum += chip::read(copies + s * size + row * args.D + d);
      return sum;
    };
    double along = 0;
    for (i64 d = chip::thread(); d < args.D; d += chip::threads())
      along += double(chip::read(p + d)) * double(signed_sum(d));
    const T mean = T(over_block(along, Add(), 0, of_warps));
    const T scale = T(double(args.dcost.at(row / args.N, 0)) * args.inv_tau);
    for (i64 d = chip::thread(); d < args.D; d += chip::threads())
      write_number<T>(args.dstudent, args.type, row * args.D + d,
                      scale * chip::read(p + d) * (signed_sum(d) - mean));
  }
}

// Where in the workspace is what the solve writes and nobody asks for; after it, that of the costs and then of the solve.
template <class T>
struct Unasked {
  i64 value, error, n_iter, bytes;

  explicit Unasked(i64 B) {
    Pieces m;
    value = m.take(B * i64(sizeof(T))), error = m.take(B * i64(sizeof(T))), n_iter = m.take(B * 8);
    bytes = (m.bytes + 127) / 128 * 128;
  }
};

template <class T>
i64 logits_workspace(int device, i64 B, i64 N, i64 D) {
  const i64 costs = cost_workspace<T>(device, B, N, N, D), solve = sinkhorn_workspace<T>(device, B, N, N);
  if (costs < 0 || solve < 0) return -2;
  return Unasked<T>(B).bytes + (costs > solve ? costs : solve);
}

template <class T>
int logits(const LogitArgs<T>& a, int device, void* workspace, void* stream) {
  if (a.B == 0) return kOk;
  int status = on_device(device, [&](const Chip& chip) {
    return launch(softmax_rows<T>, shape_of_rows(chip, 2 * a.B * a.N, a.D), stream, a);
  });
  if (status != kOk) return status;
  const Unasked<T> at(a.B);
  char *own = static_cast<char*>(workspace), *rest = own + at.bytes;
  const Matrices<T> p{a.p, a.N * a.D, a.D}, q{a.q, a.N * a.D, a.D};
  status = cost<T>({a.B, a.N, a.N, a.D, p, q, a.C}, device, rest, stream);
  if (status != kOk) return status;
  SinkhornArgs<T> s{};
  s.B = a.B, s.N = s.M = a.N, s.C = {a.C, a.N * a.N, a.N, sizeof(T) == 8 ? kFloat64 : kFloat32};
  s.a = s.b = {nullptr, 0, 0, T(a.each)}, s.eps = {nullptr, 0, 0, a.eps};
  s.rho_a = s.rho_b = {nullptr, 0, 0, HUGE_VAL};
  s.max_iter = a.max_iter, s.f = a.f, s.g = a.g, s.cost = a.cost;
  s.value = reinterpret_cast<T*>(own + at.value), s.marginal_error = reinterpret_cast<T*>(own + at.error);
  s.n_iter = reinterpret_cast<i64*>(own + at.n_iter);
  return sinkhorn<T>(s, device, rest, stream);
}

template <class T>
i64 logits_backward_workspace(int device, i64 B, i64 N, i64 D) {
  i64 bytes = -2;
  on_device(device, [&](const Chip& chip) {
    bytes = side_layout<T>(chip, B, N, N, D).cut.slices * B * N * D * i64(sizeof(T));
    return int(kOk);
  });
  return bytes;
}

template <class T>
int logits_backward(const LogitBackwardArgs<T>& a, int device, void* workspace, void* stream) {
  if (a.B == 0) return kOk;
  T* copies = static_cast<T*>(workspace);
  return on_device(device, [&](const Chip& chip) {
    const SideLayout layout = side_layout<T>(chip, a.B, a.N, a.N, a.D);
    const PlanWeights<T> plan{a.C, a.f, a.g, a.N, kLog2e / a.eps, 2 * ::log2(a.each)};
    const SideArgs<T, PlanWeights<T>> side{a.N, a.N, a.D, {a.p, a.N * a.D, a.D}, {a.q, a.N * a.D, a.D}, plan};
    const int status = launch_side(chip, a.B, side, layout, copies, stream);
    if (status != kOk) return status;
    return launch(softmax_backward<T>, shape_of_rows(chip, a.B * a.N, a.D), stream, a,
                  static_cast<const T*>(copies), layout.cut.slices);
  });
}

template i64 logits_workspace<float>(int, i64, i64, i64);
template i64 logits_workspace<double>(int, i64, i64, i64);
template i64 logits_backward_workspace<float>(int, i64, i64, i64);
template i64 logits_backward_workspace<double>(int, i64, i64, i64);
template int logits<float>(const LogitArgs<float>&, int, void*, void*);
template int logits<double>(const LogitArgs<double>&, int, void*, void*);
template int logits_backward<float>(const LogitBackwardArgs<float>&, int, void*, void*);
template int logits_backward<double>(const LogitBackwardArgs<double>&, int, void*, void*);

}  // namespace otdd::cuda
