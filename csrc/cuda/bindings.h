// The CUDA kernels for Python: tensors of the device, its number, the address of the stream. The same
// functions bind the emulated kernels (tests/emulated), whose arguments must be announced.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>

#include "kernels.h"
#include "tensors.h"

namespace otdd::cuda::bindings {

namespace py = pybind11;
using Address = std::uintptr_t;

inline void* address(Address stream) { return reinterpret_cast<void*>(stream); }

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data);
}
template <class T>
Vectors<T> per_point(const Tensor& t, T all = T()) {
  return {data<const T>(t), t.batch_stride(1), t.stride(1), all};
}
template <class T>
Vectors<T> per_problem(const Tensor& t, T all = T()) {
  return {data<const T>(t), t.batch_stride(0), 0, all};
}
template <class T>
Matrices<T> matrices(const Tensor& t) {
  return {data<const T>(t), t.batch_stride(2), t.stride(2)};
}

inline Number number(const Tensor& t) {
  if (t.bits == 16) return t.type_code == kDLBfloat ? kBfloat16 : kFloat16;
  return t.bits == 64 ? kFloat64 : kFloat32;
}
inline Costs costs(const Tensor& t) {
  return {t.data, t.batch_stride(2), t.stride(2), number(t)};
}

#if defined(OTDD_EMULATED)

using emulator::memory;

// Reads of `rows` x `row` elements of each of B problems.
inline void announce(const void* p, i64 B, i64 batch, i64 count, i64 item, i64 row, i64 size) {
  if (p && B > 0) memory.input(p, ((B - 1) * batch + (count - 1) * item + row) * size);
}
template <class T>
void announce(const Vectors<T>& v, i64 B, i64 count) {
  announce(v.data, B, v.batch, count, v.item, 1, sizeof(T));
}
template <class T>
void announce(const Problems<T>& p) {
  announce(p.C.data, p.B, p.C.batch, p.N, p.C.row, p.M, size_of(p.C.type));
  announce(p.a, p.B, p.N), announce(p.b, p.B, p.M);
  announce(p.eps, p.B, 1), announce(p.rho_a, p.B, 1), announce(p.rho_b, p.B, 1);
}
template <class T>
void announce(const Matrices<T>& p, i64 B, i64 count, i64 D) {
  announce(p.data, B, p.batch, count, p.row, D, sizeof(T));
}
inline void result(void* p, i64 count, i64 size) { memory.output(p, count * size, size); }
template <class T>
void result(T* p, i64 count) {
  result(p, count, sizeof(T));
}
inline void workspace(void* p, i64 bytes) { memory.workspace(p, bytes); }
inline void workspace(const Tensor& space) { workspace(space.data, space.size(1)); }

// The status of a call; every result must have been written.
template <class Call>
int run(Call call) {
  int status = call();
  try {
    if (status == kOk) memory.all_written();
  } catch (const std::exception& error) {
    memory.clear();
    throw;
  }
  memory.clear();
  return status;
}

#else

template <class... Args>
void announce(const Args&...) {}
template <class... Args>
void result(const Args&...) {}
template <class... Args>
void workspace(const Args&...) {}

template <class Call>
int run(Call call) {
  py::gil_scoped_release release;
  return call();
}

#endif

// The problems: a and b may be missing (`each` is then a weight, 0 for 1 over their number), and the
// penalties too.
template <class T>
Problems<T> problems(const Tensor& C, const Tensor& a, const Tensor& b, double each,
                     const Tensor& eps, const Tensor& rho_a, const Tensor& rho_b) {
  const i64 N = C.size(2), M = C.size(1);
  return {C.batch(2), N, M, costs(C), per_point<T>(a, T(each ? each : 1.0 / double(N))),
          per_point<T>(b, T(each ? each : 1.0 / double(M))), per_problem<double>(eps, 1),
          per_problem<double>(rho_a, HUGE_VAL), per_problem<double>(rho_b, HUGE_VAL)};
}

template <class T>
int sinkhorn_(int device, Address stream, Tensor C, Tensor a, Tensor b, double each, Tensor eps,
              Tensor rho_a, Tensor rho_b, Tensor g0, i64 max_iter, double tol, Tensor f, Tensor g,
              Tensor value, Tensor cost, Tensor marginal_error, Tensor n_iter, Tensor history,
              Tensor space) {
  const SinkhornArgs<T> args{
      problems<T>(C, a, b, each, eps, rho_a, rho_b), per_point<T>(g0), max_iter, tol, data<T>(f),
      data<T>(g), data<T>(value), data<T>(cost), data<T>(marginal_error), data<i64>(n_iter),
      data<double>(history)};
  const auto [B, N, M] = std::tuple(args.B, args.N, args.M);
  announce(static_cast<const Problems<T>&>(args)), announce(args.g0, B, M);
  result(args.f, B * N), result(args.g, B * M), result(args.value, B), result(args.cost, B);
  result(args.marginal_error, B), result(args.n_iter, B);
  workspace(args.history, B * (max_iter + 1) * (N + M) * 8), workspace(space);
  return run([&] { return sinkhorn<T>(args, device, space.data, address(stream)); });
}

template <class T>
int plan_(int device, Address stream, Tensor C, Tensor f, Tensor g, Tensor a, Tensor b, double each,
          Tensor eps, Tensor scale, Tensor P) {
  check_costs(C, f, g);
  const PlanArgs<T> args{problems<T>(C, a, b, each, eps, {}, {}), per_point<T>(f), per_point<T>(g),
                         per_problem<T>(scale, T(1)), P.data, number(P)};
  const auto [B, N, M] = std::tuple(args.B, args.N, args.M);
  announce(static_cast<const Problems<T>&>(args)), announce(args.f, B, N), announce(args.g, B, M);
  announce(args.scale, B, 1), result(args.P, B * N * M, size_of(args.P_type));
  return run([&] { return plan<T>(args, device, address(stream)); });
}

template <class T>
int backward_(int device, Address stream, bool unrolled, double rtol, Tensor C, Tensor a, Tensor b,
              Tensor eps, Tensor rho_a, Tensor rho_b, Tensor f, Tensor g, Tensor history,
              Tensor n_iter, Tensor df, Tensor dg, Tensor dC, Tensor da, Tensor db, Tensor space) {
  check_costs(C, f, g);
  const i64 steps = history.data ? history.size(2) : 0;
  const BackwardArgs<T> args{problems<T>(C, a, b, 0, eps, rho_a, rho_b), steps, per_point<T>(f),
                             per_point<T>(g), data<double>(history), data<i64>(n_iter),
                             per_point<T>(df), per_point<T>(dg), data<T>(dC), data<T>(da),
                             data<T>(db), rtol};
  const auto [B, N, M] = std::tuple(args.B, args.N, args.M);
  announce(static_cast<const Problems<T>&>(args));
  announce(args.f, B, N), announce(args.g, B, M), announce(args.df, B, N), announce(args.dg, B, M);
  announce(args.history, 1, 0, B * steps, N + M, N + M, 8), announce(args.n_iter, 1, 0, 1, 0, B, 8);
  result(args.dC, B * N * M), result(args.da, B * N), result(args.db, B * M), workspace(space);
  return run([&] { return backward<T>(args, unrolled, device, space.data, address(stream)); });
}

template <class T>
int cost_(int device, Address stream, bool squared, Tensor x, Tensor y, Tensor C, Tensor space) {
  const i64 B = x.batch(2), N = x.size(2), M = y.size(2), D = x.size(1);
  const CostArgs<T> args{B, N, M, D, matrices<T>(x), matrices<T>(y), data<T>(C), squared};
  announce(args.x, B, N, D), announce(args.y, B, M, D), result(args.C, B * N * M), workspace(space);
  return run([&] { return cost<T>(args, device, space.data, address(stream)); });
}

// G with any strides; dx and dy may be missing.
template <class T>
int cost_backward_(int device, Address stream, Tensor x, Tensor y, Tensor G, Tensor dx, Tensor dy,
                   Tensor space) {
  const i64 B = x.batch(2), N = x.size(2), M = y.size(2), D = x.size(1);
  const CostBackwardArgs<T> args{B, N, M, D, matrices<T>(x), matrices<T>(y), data<T>(G),
                                 G.batch_stride(2), G.stride(2), G.stride(1), data<T>(dx), data<T>(dy)};
  announce(args.x, B, N, D), announce(args.y, B, M, D);
  announce(args.G, B, args.G_batch, N, args.G_row, (M - 1) * args.G_column + 1, sizeof(T));
  result(args.dx, B * N * D), result(args.dy, B * M * D), workspace(space);
  return run([&] { return cost_backward<T>(args, device, space.data, address(stream)); });
}

template <class T>
int logits_(int device, Address stream, Tensor student, Tensor teacher, double tau, double eps,
            double each, i64 max_iter, Tensor p, Tensor q, Tensor C, Tensor f, Tensor g, Tensor cost,
            Tensor space) {
  const i64 B = student.batch(2), N = student.size(2), D = student.size(1);
  const LogitArgs<T> args{B, N, D, costs(student), costs(teacher), 1 / tau, eps,
                          each ? each : 1.0 / double(N), max_iter, data<T>(p), data<T>(q), data<T>(C),
                          data<T>(f), data<T>(g), data<T>(cost)};
  for (const Costs& t : {args.student, args.teacher}) announce(t.data, B, t.batch, N, t.row, D, size_of(t.type));
  result(args.p, B * N * D), result(args.q, B * N * D), result(args.C, B * N * N);
  result(args.f, B * N), result(args.g, B * N), result(args.cost, B), workspace(space);
  return run([&] { return logits<T>(args, device, space.data, address(stream)); });
}

// p, q, C, f and g are contiguous.
template <class T>
int logits_backward_(int device, Address stream, Tensor p, Tensor q, Tensor C, Tensor f, Tensor g,
                     Tensor dcost, double tau, double eps, double each, Tensor dstudent, Tensor space) {
  const i64 B = dcost.batch(0), N = p.size(2), D = p.size(1);
  const LogitBackwardArgs<T> args{B, N, D, data<T>(p), data<T>(q), data<T>(C), data<T>(f), data<T>(g),
                                  per_problem<T>(dcost), 1 / tau, eps, each ? each : 1.0 / double(N),
                                  dstudent.data, number(dstudent)};
  for (const T* t : {args.p, args.q}) announce(t, B, N * D, N, D, D, sizeof(T));
  announce(args.C, B, N * N, N, N, N, sizeof(T));
  for (const T* t : {args.f, args.g}) announce(t, B, N, 1, 0, N, sizeof(T));
  announce(args.dcost, B, 1), result(args.dstudent, B * N * D, size_of(args.type)), workspace(space);
  return run([&] { return logits_backward<T>(args, device, space.data, address(stream)); });
}

// Costs are made of x and y with `in_one`, or C has them; `given`, contiguous as C, may be missing.
template <class T>
int moves_(int device, Address stream, Tensor x, Tensor y, bool in_one, bool squared, Tensor C,
           Tensor given, Tensor a, Tensor b, Tensor g0, double lambda, i64 max_iter, Tensor f, Tensor g,
           Tensor eps, Tensor dx, Tensor plan, bool relative, Tensor space) {
  const i64 B = x.batch(2), N = x.size(2), L = given.data ? given.size(2) : 0, M = y.size(2), D = x.size(1);
  const Tensor none;
  const MoveArgs<T> args{B, N, L, M, D, matrices<T>(in_one ? x : none), matrices<T>(in_one ? y : none),
                         squared, data<T>(C), data<T>(given), per_point<T>(a), per_point<T>(b),
                         per_point<T>(g0), lambda, max_iter, data<T>(f), data<T>(g), data<T>(eps),
                         data<T>(dx), data<T>(plan), relative};
  announce(args.x, B, N, D), announce(args.y, B, M, D), announce(args.given, B, L * M, L, M, M, sizeof(T));
  if (args.x.data) result(args.C, B * N * M);
  else announce(static_cast<const T*>(args.C), B, N * M, N, M, M, sizeof(T));
  announce(args.a, B, N + L), announce(args.b, B, M), announce(args.g0, B, M);
  result(args.f, B * (N + L)), result(args.g, B * M), result(args.eps, B);
  if (args.dx) result(args.dx, B * N * D);
  if (args.plan) result(args.plan, B * N * M);
  workspace(space);
  return run([&] { return moves<T>(args, device, space.data, address(stream)); });
}

template <class T>
void bind_kernels_of(py::module_& m, const std::string& suffix) {
  m.def(("cuda_sinkhorn_workspace_" + suffix).c_str(), &sinkhorn_workspace<T>);
  m.def(("cuda_sinkhorn_" + suffix).c_str(), &sinkhorn_<T>);
  m.def(("cuda_backward_workspace_" + suffix).c_str(), &backward_workspace<T>);
  m.def(("cuda_backward_" + suffix).c_str(), &backward_<T>);
  m.def(("cuda_plan_" + suffix).c_str(), &plan_<T>);
  m.def(("cuda_cost_workspace_" + suffix).c_str(), &cost_workspace<T>);
  m.def(("cuda_cost_" + suffix).c_str(), &cost_<T>);
  m.def(("cuda_cost_backward_workspace_" + suffix).c_str(), &cost_backward_workspace<T>);
  m.def(("cuda_cost_backward_" + suffix).c_str(), &cost_backward_<T>);
  m.def(("cuda_logits_workspace_" + suffix).c_str(), &logits_workspace<T>);
  m.def(("cuda_logits_" + suffix).c_str(), &logits_<T>);
  m.def(("cuda_logits_backward_workspace_" + suffix).c_str(), &logits_backward_workspace<T>);
  m.def(("cuda_logits_backward_" + suffix).c_str(), &logits_backward_<T>);
  m.def(("cuda_moves_workspace_" + suffix).c_str(), &moves_workspace<T>);
  m.def(("cuda_moves_" + suffix).c_str(), &moves_<T>);
}

inline void bind_kernels(py::module_& m) {
  bind_kernels_of<float>(m, "f32");
  bind_kernels_of<double>(m, "f64");
  m.def("cuda_last_error", &last_error, "What the last CUDA call that failed was told.");
}

}  // namespace otdd::cuda::bindings
