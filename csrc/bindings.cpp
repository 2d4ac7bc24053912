// The only file that sees Python. Tensors arrive as raw addresses with sizes and strides.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "otdd_build.h"  // written by setup.py: what was built, and why

#ifdef OTDD_CUDA
#include "cuda/bindings.h"
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = OTDD_BUILD_VERSION;
  info["compiler"] = OTDD_BUILD_COMPILER;
  info["isas"] = OTDD_BUILD_ISAS;
  info["openmp"] = OTDD_BUILD_OPENMP;
  info["cuda"] = OTDD_BUILD_CUDA;
  info["cuda_archs"] = OTDD_BUILD_CUDA_ARCHS;
  info["cuda_reason"] = OTDD_BUILD_CUDA_REASON;
  return info;
}

#ifdef OTDD_CUDA
py::dict cuda_devices() {
  const otdd::cuda::DeviceQuery query = otdd::cuda::query_devices();
  py::list devices;
  for (const otdd::cuda::Device& device : query.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory"] = device.memory;
    devices.append(entry);
  }
  py::dict result;
  result["runtime"] = query.runtime;
  result["driver"] = query.driver;
  result["devices"] = devices;
  result["error"] = query.error;
  return result;
}
#endif

using Address = std::uintptr_t;
using otdd::cpu::i64;

template <class T>
const T* in(Address address) {
  return reinterpret_cast<const T*>(address);
}
template <class T>
T* out(Address address) {
  return reinterpret_cast<T*>(address);
}

// The time for signals, asked for by a call that runs without the GIL.
bool signal_raised() {
  py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

// The status of a call made without the GIL; what a signal's handler raised goes on from here.
template <class Call>
int released(Call call) {
  int status;
  {
    py::gil_scoped_release release;
    status = call();
  }
  if (status == otdd::cpu::kInterrupted) throw py::error_already_set();
  return status;
}

// (address, batch stride, row stride) and (address, batch stride, item stride), in elements.
using Strided = std::tuple<Address, i64, i64>;

template <class T>
otdd::cpu::Matrices<T> matrices(const Strided& t) {
  return {in<T>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}
template <class T>
otdd::cpu::Vectors<T> vectors(const Strided& t) {
  return {in<T>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)};
}

// The same, and one number for all where there is nothing.
template <class T>
otdd::cpu::Vectors<T> vectors_or(const Strided& t, const T& all) {
  return std::get<0>(t) ? vectors<T>(t) : otdd::cpu::Vectors<T>{&all, 0, 0};
}

const double kHard = HUGE_VAL;  // the penalty of a marginal that is met

// a and b may be missing (`each` is then a weight, 0 for 1 over their number), rho_a, rho_b and g0 too.
template <class T>
int sinkhorn(i64 B, i64 N, i64 M, Strided C, Strided a, Strided b, double each, Strided eps,
             Strided rho_a, Strided rho_b, Strided g0, i64 max_iter, double tol, double schedule,
             bool accelerate, Address f, Address g, Address value, Address cost,
             Address marginal_error, Address n_iter, Address history, int threads) {
  const T each_a = T(each ? each : 1.0 / N), each_b = T(each ? each : 1.0 / M), zero = 0;
  const otdd::cpu::SinkhornArgs<T> args{
      B, N, M, matrices<T>(C), vectors_or<T>(a, each_a), vectors_or<T>(b, each_b),
      vectors<double>(eps), vectors_or<double>(rho_a, kHard), vectors_or<double>(rho_b, kHard),
      vectors_or<T>(g0, zero), max_iter, tol, schedule, accelerate, out<T>(f), out<T>(g),
      out<T>(value), out<T>(cost), out<T>(marginal_error), out<i64>(n_iter), out<double>(history),
      threads};
  return released([&] { return otdd::cpu::kernels<T>().sinkhorn(args); });
}

template <class T>
int plan(i64 B, i64 N, i64 M, Strided C, Strided f, Strided g, Strided a, Strided b, double each,
         Strided eps, Strided scale, Address P, int threads) {
  const T each_a = T(each ? each : 1.0 / N), each_b = T(each ? each : 1.0 / M), one = 1;
  const otdd::cpu::PlanArgs<T> args{
      B, N, M, matrices<T>(C), vectors<T>(f), vectors<T>(g), vectors_or<T>(a, each_a),
      vectors_or<T>(b, each_b), vectors<double>(eps), vectors_or<T>(scale, one), out<T>(P), threads};
  return released([&] { return otdd::cpu::kernels<T>().plan(args); });
}

template <class T>
int backward(bool unrolled, double rtol, i64 B, i64 N, i64 M, i64 steps, Strided C, Strided a,
             Strided b, Strided eps, Strided rho_a, Strided rho_b, Strided f, Strided g,
             Address history, Address n_iter, Strided df, Strided dg, Address dC, Address da,
             Address db, int threads) {
  const otdd::cpu::BackwardArgs<T> args{
      B, N, M, steps, matrices<T>(C), vectors<T>(a), vectors<T>(b), vectors<double>(eps),
      vectors<double>(rho_a), vectors<double>(rho_b), vectors<T>(f), vectors<T>(g),
      in<double>(history), in<i64>(n_iter), vectors<T>(df), vectors<T>(dg), out<T>(dC), out<T>(da),
      out<T>(db), rtol, threads};
  const auto kernels = otdd::cpu::kernels<T>();
  return released([&] { return unrolled ? kernels.unrolled(args) : kernels.implicit(args); });
}

template <class T>
int cost(i64 B, i64 N, i64 M, i64 D, Strided x, Strided y, int metric, Address C, int threads) {
  const otdd::cpu::CostArgs<T> args{B,      N,         M, D, matrices<T>(x), matrices<T>(y),
                                    metric, out<T>(C), threads};
  return released([&] { return otdd::cpu::kernels<T>().cost(args); });
}

template <class T>
int cost_backward(i64 B, i64 N, i64 M, i64 D, Strided x, Strided y, int metric, Strided G,
                  Address dx, Address dy, int threads) {
  const otdd::cpu::CostBackwardArgs<T> args{
      B, N, M, D, matrices<T>(x), matrices<T>(y), metric, in<T>(std::get<0>(G)), std::get<1>(G),
      std::get<2>(G), 1, out<T>(dx), out<T>(dy), threads};
  return released([&] { return otdd::cpu::kernels<T>().cost_backward(args); });
}

// Labels of the rows, of the columns, and (address, batch stride, row stride, K, L) of their costs.
using LabelStrides = std::tuple<Strided, Strided, Strided, i64, i64>;

template <class T>
otdd::cpu::Labels<T> labels_of(const LabelStrides& t) {
  return {vectors<i64>(std::get<0>(t)), vectors<i64>(std::get<1>(t)), matrices<T>(std::get<2>(t)),
          std::get<3>(t), std::get<4>(t)};
}

template <class T>
int points(i64 B, i64 N, i64 M, i64 D, Strided x, Strided y, int metric, LabelStrides labels,
           Strided a, Strided b, Strided eps, Strided rho_a, Strided rho_b, Strided g0, i64 max_iter, Strided tol, Address f,
           Address g, Address value, Address cost, Address marginal_error, Address n_iter,
           int threads) {
  const otdd::cpu::PointsArgs<T> args{
      B, N, M, D, matrices<T>(x), matrices<T>(y), metric, labels_of<T>(labels), vectors<T>(a),
      vectors<T>(b), vectors<double>(eps), vectors<double>(rho_a), vectors<double>(rho_b),
      vectors<T>(g0), max_iter, vectors<double>(tol), out<T>(f), out<T>(g), out<T>(value), out<T>(cost),
      out<T>(marginal_error), out<i64>(n_iter), threads};
  return released([&] { return otdd::cpu::kernels<T>().points(args); });
}

template <class T>
int plan_product(i64 B, i64 N, i64 M, i64 D, i64 K, Strided x, Strided y, int metric,
                 LabelStrides labels, Strided f, Strided g, Strided a, Strided b, Strided eps,
                 Strided u, Strided v, Strided kappa, Strided z, int mode, bool over_distance,
                 Address product, int threads) {
  const otdd::cpu::PlanProductArgs<T> args{
      B, N, M, D, K, matrices<T>(x), matrices<T>(y), metric, labels_of<T>(labels), vectors<T>(f),
      vectors<T>(g), vectors<T>(a), vectors<T>(b), vectors<double>(eps), vectors<T>(u), vectors<T>(v),
      vectors<double>(kappa), matrices<T>(z), mode, over_distance, out<T>(product), threads};
  return released([&] { return otdd::cpu::kernels<T>().plan_product(args); });
}

// Kernels of one number type, with a suffix; each returns a status (0: done).
template <class T>
void bind_kernels(py::module_& m, const std::string& suffix) {
  m.def(("sinkhorn_" + suffix).c_str(), &sinkhorn<T>);
  m.def(("plan_" + suffix).c_str(), &plan<T>);
  m.def(("backward_" + suffix).c_str(), &backward<T>);
  m.def(("cost_" + suffix).c_str(), &cost<T>);
  m.def(("cost_backward_" + suffix).c_str(), &cost_backward<T>);
  m.def(("points_" + suffix).c_str(), &points<T>);
  m.def(("plan_product_" + suffix).c_str(), &plan_product<T>);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  otdd::cpu::interrupted = &signal_raised;
  m.doc() = "Native kernels of otdd; use them through otdd.ops.";
  m.def("build_info", &build_info, "What this module was built with, as a dict of strings.");
  m.def("cpu_isa", &otdd::cpu::isa, "Instruction set the CPU kernels run with on this machine.");
  bind_kernels<float>(m, "f32");
  bind_kernels<double>(m, "f64");
#ifdef OTDD_CUDA
  m.def("cuda_devices", &cuda_devices, "CUDA devices of this machine, and versions.");
  otdd::cuda::bindings::bind_kernels(m);
#endif
}
