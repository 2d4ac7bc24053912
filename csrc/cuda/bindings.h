// The CUDA kernels for Python: raw device addresses with sizes and strides, the stream, the device.
// The same functions bind the emulated kernels (tests/emulated), whose arguments must be announced.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>

#include "kernels.h"

namespace otdd::cuda::bindings {

namespace py = pybind11;
using Address = std::uintptr_t;
// (address, batch stride, row or item stride), in elements; without an address there is nothing.
using Strided = std::tuple<Address, i64, i64>;

// (address, batch stride, row stride, type) of costs.
using GivenCosts = std::tuple<Address, i64, i64, int>;

template <class T>
T* address(Address a) {
  return reinterpret_cast<T*>(a);
}
template <class T>
Vectors<T> vectors(const Strided& t, T all = T()) {
  return {address<const T>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), all};
}
template <class T>
Matrices<T> matrices(const Strided& t) {
  return {address<const T>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

inline Costs costs(const GivenCosts& t) {
  return {address<const void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), Number(std::get<3>(t))};
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
inline void workspace(void*, i64) {}

template <class Call>
int run(Call call) {
  py::gil_scoped_release release;
  return call();
}

#endif

// The problems: a and b may be missing (`each` is then a weight, 0 for 1 over their number), and the
// penalties too.
template <class T>
Problems<T> problems(i64 B, i64 N, i64 M, const GivenCosts& C, const Strided& a,
                     const Strided& b, double each, const Strided& eps, const Strided& rho_a,
                     const Strided& rho_b) {
  return {B, N, M, costs(C), vectors<T>(a, T(each ? each : 1.0 / double(N))),
          vectors<T>(b, T(each ? each : 1.0 / double(M))), vectors<double>(eps, 1),
          vectors<double>(rho_a, HUGE_VAL), vectors<double>(rho_b, HUGE_VAL)};
}

template <class T>
int sinkhorn_(int device, Address stream, i64 B, i64 N, i64 M, GivenCosts C, Strided a,
              Strided b, double each, Strided eps, Strided rho_a, Strided rho_b, Strided g0,
              i64 max_iter, double tol, Address f, Address g, Address value, Address cost,
              Address marginal_error, Address n_iter, Address history, Address space, i64 bytes) {
  const SinkhornArgs<T> args{
      problems<T>(B, N, M, C, a, b, each, eps, rho_a, rho_b), vectors<T>(g0), max_iter, tol,
      address<T>(f), address<T>(g), address<T>(value), address<T>(cost), address<T>(marginal_error),
      address<i64>(n_iter), address<double>(history)};
  announce(static_cast<const Problems<T>&>(args)), announce(args.g0, B, M);
  result(args.f, B * N), result(args.g, B * M), result(args.value, B), result(args.cost, B);
  result(args.marginal_error, B), result(args.n_iter, B);
  workspace(args.history, B * (max_iter + 1) * (N + M) * 8), workspace(address<void>(space), bytes);
  return run([&] { return sinkhorn<T>(args, device, address<void>(space), address<void>(stream)); });
}

template <class T>
int plan_(int device, Address stream, i64 B, i64 N, i64 M, GivenCosts C, Strided f, Strided g,
          Strided a, Strided b, double each, Strided eps, Strided scale, Address P, int P_type) {
  const Strided none(0, 0, 0);
  const PlanArgs<T> args{problems<T>(B, N, M, C, a, b, each, eps, none, none), vectors<T>(f),
                         vectors<T>(g), vectors<T>(scale, T(1)), address<void>(P), Number(P_type)};
  announce(static_cast<const Problems<T>&>(args)), announce(args.f, B, N), announce(args.g, B, M);
  announce(args.scale, B, 1), result(args.P, B * N * M, size_of(args.P_type));
  return run([&] { return plan<T>(args, device, address<void>(stream)); });
}

template <class T>
int backward_(int device, Address stream, bool unrolled, double rtol, i64 B, i64 N, i64 M, i64 steps,
              GivenCosts C, Strided a, Strided b, Strided eps, Strided rho_a, Strided rho_b,
              Strided f, Strided g, Address history, Address n_iter, Strided df, Strided dg, Address dC,
              Address da, Address db, Address space, i64 bytes) {
  const BackwardArgs<T> args{problems<T>(B, N, M, C, a, b, 0, eps, rho_a, rho_b), steps,
                             vectors<T>(f), vectors<T>(g), address<double>(history), address<i64>(n_iter),
                             vectors<T>(df), vectors<T>(dg), address<T>(dC), address<T>(da),
                             address<T>(db), rtol};
  announce(static_cast<const Problems<T>&>(args));
  announce(args.f, B, N), announce(args.g, B, M), announce(args.df, B, N), announce(args.dg, B, M);
  announce(args.history, 1, 0, B * steps, N + M, N + M, 8), announce(args.n_iter, 1, 0, 1, 0, B, 8);
  result(args.dC, B * N * M), result(args.da, B * N), result(args.db, B * M);
  workspace(address<void>(space), bytes);
  return run([&] {
    return backward<T>(args, unrolled, device, address<void>(space), address<void>(stream));
  });
}

template <class T>
int cost_(int device, Address stream, i64 B, i64 N, i64 M, i64 D, bool squared, Strided x, Strided y,
          Address C, Address space, i64 bytes) {
  const CostArgs<T> args{B, N, M, D, matrices<T>(x), matrices<T>(y), address<T>(C), squared};
  announce(args.x, B, N, D), announce(args.y, B, M, D), result(args.C, B * N * M);
  workspace(address<void>(space), bytes);
  return run([&] { return cost<T>(args, device, address<void>(space), address<void>(stream)); });
}

// G: (address, batch stride, row stride, column stride).
template <class T>
int cost_backward_(int device, Address stream, i64 B, i64 N, i64 M, i64 D, Strided x, Strided y,
                   std::tuple<Address, i64, i64, i64> G, Address dx, Address dy, Address space,
                   i64 bytes) {
  const auto [data, batch, row, column] = G;
  const CostBackwardArgs<T> args{B, N, M, D, matrices<T>(x), matrices<T>(y), address<const T>(data),
                                 batch, row, column, address<T>(dx), address<T>(dy)};
  announce(args.x, B, N, D), announce(args.y, B, M, D);
  announce(args.G, B, batch, N, row, (M - 1) * column + 1, sizeof(T));
  result(args.dx, B * N * D), result(args.dy, B * M * D), workspace(address<void>(space), bytes);
  return run([&] { return cost_backward<T>(args, device, address<void>(space), address<void>(stream)); });
}

template <class T>
int logits_(int device, Address stream, i64 B, i64 N, i64 D, GivenCosts student, GivenCosts teacher, double tau,
            double eps, double each, i64 max_iter, Address p, Address q, Address C, Address f, Address g, Address cost,
            Address space, i64 bytes) {
  const LogitArgs<T> args{B, N, D, costs(student), costs(teacher), 1 / tau, eps, each ? each : 1.0 / double(N),
                          max_iter, address<T>(p), address<T>(q), address<T>(C), address<T>(f), address<T>(g),
                          address<T>(cost)};
  for (const Costs& t : {args.student, args.teacher}) announce(t.data, B, t.batch, N, t.row, D, size_of(t.type));
  result(args.p, B * N * D), result(args.q, B * N * D), result(args.C, B * N * N);
  result(args.f, B * N), result(args.g, B * N), result(args.cost, B), workspace(address<void>(space), bytes);
  return run([&] { return logits<T>(args, device, address<void>(space), address<void>(stream)); });
}

template <class T>
int logits_backward_(int device, Address stream, i64 B, i64 N, i64 D, Address p, Address q, Address C, Address f,
                     Address g, Strided dcost, double tau, double eps, double each, Address dstudent, int type,
                     Address space, i64 bytes) {
  const LogitBackwardArgs<T> args{B, N, D, address<const T>(p), address<const T>(q), address<const T>(C),
                                  address<const T>(f), address<const T>(g), vectors<T>(dcost), 1 / tau, eps,
                                  each ? each : 1.0 / double(N), address<void>(dstudent), Number(type)};
  for (const T* t : {args.p, args.q}) announce(t, B, N * D, N, D, D, sizeof(T));
  announce(args.C, B, N * N, N, N, N, sizeof(T));
  for (const T* t : {args.f, args.g}) announce(t, B, N, 1, 0, N, sizeof(T));
  announce(args.dcost, B, 1), result(args.dstudent, B * N * D, size_of(args.type));
  workspace(address<void>(space), bytes);
  return run([&] { return logits_backward<T>(args, device, address<void>(space), address<void>(stream)); });
}

template <class T>
int moves_(int device, Address stream, i64 B, i64 N, i64 L, i64 M, i64 D, Strided x, Strided y, bool squared,
           Address C, Address given, Strided a, Strided b, Strided g0, double lambda, i64 max_iter, Address f, Address g,
           Address eps, Address dx, Address plan, bool relative, Address space, i64 bytes) {
  const MoveArgs<T> args{B, N, L, M, D, matrices<T>(x), matrices<T>(y), squared, address<T>(C),
                         address<const T>(given), vectors<T>(a), vectors<T>(b), vectors<T>(g0), lambda, max_iter,
                         address<T>(f), address<T>(g), address<T>(eps), address<T>(dx), address<T>(plan), relative};
  announce(args.x, B, N, D), announce(args.y, B, M, D), announce(args.given, B, L * M, L, M, M, sizeof(T));
  if (args.x.data) result(args.C, B * N * M);
  else announce(static_cast<const T*>(args.C), B, N * M, N, M, M, sizeof(T));
  announce(args.a, B, N + L), announce(args.b, B, M), announce(args.g0, B, M);
  result(args.f, B * (N + L)), result(args.g, B * M), result(args.eps, B);
  if (args.dx) result(args.dx, B * N * D);
  if (args.plan) result(args.plan, B * N * M);
  workspace(address<void>(space), bytes);
  return run([&] { return moves<T>(args, device, address<void>(space), address<void>(stream)); });
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
