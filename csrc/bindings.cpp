// The only file that sees Python, with tensors.h, by which tensors arrive.
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "otdd_build.h"  // written by setup.py: what was built, and why
#include "tensors.h"

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

using otdd::Tensor;
using otdd::cpu::i64;

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

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data);
}

// ``(N, D)`` or ``(B, N, D)`` with contiguous rows.
template <class T>
otdd::cpu::Matrices<T> matrices(const Tensor& t) {
  return {data<const T>(t), t.batch_stride(2), t.stride(2)};
}
// ``(N)`` or ``(B, N)`` with any strides; without a tensor, one number for all.
template <class T>
otdd::cpu::Vectors<T> per_point(const Tensor& t, const T* all = nullptr) {
  return {t.data ? data<const T>(t) : all, t.batch_stride(1), t.stride(1)};
}
// ``()`` or ``(B)``, likewise.
template <class T>
otdd::cpu::Vectors<T> per_problem(const Tensor& t, const T* all = nullptr) {
  return {t.data ? data<const T>(t) : all, t.batch_stride(0), 0};
}

const double kHard = HUGE_VAL;  // the penalty of a marginal that is met

// a and b may be missing (`each` is then a weight, 0 for 1 over their number), rho_a, rho_b and g0 too.
template <class T>
int sinkhorn(Tensor C, Tensor a, Tensor b, double each, Tensor eps, Tensor rho_a, Tensor rho_b,
             Tensor g0, i64 max_iter, double tol, double schedule, bool accelerate, Tensor f,
             Tensor g, Tensor value, Tensor cost, Tensor marginal_error, Tensor n_iter,
             Tensor history, int threads) {
  const i64 N = C.size(2), M = C.size(1);
  const T each_a = T(each ? each : 1.0 / N), each_b = T(each ? each : 1.0 / M), zero = 0;
  const otdd::cpu::SinkhornArgs<T> args{
      C.batch(2), N, M, matrices<T>(C), per_point<T>(a, &each_a), per_point<T>(b, &each_b),
      per_problem<double>(eps), per_problem<double>(rho_a, &kHard),
      per_problem<double>(rho_b, &kHard), per_point<T>(g0, &zero), max_iter, tol, schedule,
      accelerate, data<T>(f), data<T>(g), data<T>(value), data<T>(cost), data<T>(marginal_error),
      data<i64>(n_iter), data<double>(history), threads};
  return released([&] { return otdd::cpu::kernels<T>().sinkhorn(args); });
}

template <class T>
int plan(Tensor C, Tensor f, Tensor g, Tensor a, Tensor b, double each, Tensor eps, Tensor scale,
         Tensor P, int threads) {
  check_costs(C, f, g);
  const i64 N = C.size(2), M = C.size(1);
  const T each_a = T(each ? each : 1.0 / N), each_b = T(each ? each : 1.0 / M), one = 1;
  const otdd::cpu::PlanArgs<T> args{
      C.batch(2), N, M, matrices<T>(C), per_point<T>(f), per_point<T>(g), per_point<T>(a, &each_a),
      per_point<T>(b, &each_b), per_problem<double>(eps), per_problem<T>(scale, &one), data<T>(P),
      threads};
  return released([&] { return otdd::cpu::kernels<T>().plan(args); });
}

template <class T>
int backward(bool unrolled, double rtol, Tensor C, Tensor a, Tensor b, Tensor eps, Tensor rho_a,
             Tensor rho_b, Tensor f, Tensor g, Tensor history, Tensor n_iter, Tensor df, Tensor dg,
             Tensor dC, Tensor da, Tensor db, int threads) {
  check_costs(C, f, g);
  const otdd::cpu::BackwardArgs<T> args{
      C.batch(2), C.size(2), C.size(1), history.data ? history.size(2) : 0, matrices<T>(C), per_point<T>(a),
      per_point<T>(b), per_problem<double>(eps), per_problem<double>(rho_a),
      per_problem<double>(rho_b), per_point<T>(f), per_point<T>(g), data<double>(history),
      data<i64>(n_iter), per_point<T>(df), per_point<T>(dg), data<T>(dC), data<T>(da), data<T>(db),
      rtol, threads};
  const auto kernels = otdd::cpu::kernels<T>();
  return released([&] { return unrolled ? kernels.unrolled(args) : kernels.implicit(args); });
}

template <class T>
int cost(Tensor x, Tensor y, int metric, Tensor C, int threads) {
  const otdd::cpu::CostArgs<T> args{
      x.batch(2), x.size(2), y.size(2), x.size(1), matrices<T>(x), matrices<T>(y), metric,
      data<T>(C), threads};
  return released([&] { return otdd::cpu::kernels<T>().cost(args); });
}

// dx and dy may be missing.
template <class T>
int cost_backward(Tensor x, Tensor y, int metric, Tensor G, Tensor dx, Tensor dy, int threads) {
  const otdd::cpu::CostBackwardArgs<T> args{
      x.batch(2), x.size(2), y.size(2), x.size(1), matrices<T>(x), matrices<T>(y), metric,
      data<T>(G), G.batch_stride(2), G.stride(2), 1, data<T>(dx), data<T>(dy), threads};
  return released([&] { return otdd::cpu::kernels<T>().cost_backward(args); });
}

// Labels of the rows, of the columns, and their costs; or none.
using LabelledCosts = std::tuple<Tensor, Tensor, Tensor>;

template <class T>
otdd::cpu::Labels<T> labels_of(const LabelledCosts& t) {
  const auto& [rows, columns, costs] = t;
  if (!costs.data) return {};
  return {per_point<i64>(rows), per_point<i64>(columns), matrices<T>(costs), costs.size(2),
          costs.size(1)};
}

template <class T>
int points(Tensor x, Tensor y, int metric, LabelledCosts labels, Tensor a, Tensor b, Tensor eps,
           Tensor rho_a, Tensor rho_b, Tensor g0, i64 max_iter, Tensor tol, Tensor f, Tensor g,
           Tensor value, Tensor cost, Tensor marginal_error, Tensor n_iter, int threads) {
  const otdd::cpu::PointsArgs<T> args{
      x.batch(2), x.size(2), y.size(2), x.size(1), matrices<T>(x), matrices<T>(y), metric,
      labels_of<T>(labels), per_point<T>(a), per_point<T>(b), per_problem<double>(eps),
      per_problem<double>(rho_a), per_problem<double>(rho_b), per_point<T>(g0), max_iter,
      per_problem<double>(tol), data<T>(f), data<T>(g), data<T>(value), data<T>(cost),
      data<T>(marginal_error), data<i64>(n_iter), threads};
  return released([&] { return otdd::cpu::kernels<T>().points(args); });
}

template <class T>
int plan_product(Tensor x, Tensor y, int metric, LabelledCosts labels, Tensor f, Tensor g, Tensor a,
                 Tensor b, Tensor eps, Tensor u, Tensor v, Tensor kappa, Tensor z, int mode,
                 bool over_distance, Tensor product, int threads) {
  const otdd::cpu::PlanProductArgs<T> args{
      x.batch(2), x.size(2), y.size(2), x.size(1), z.size(1), matrices<T>(x), matrices<T>(y),
      metric, labels_of<T>(labels), per_point<T>(f), per_point<T>(g), per_point<T>(a),
      per_point<T>(b), per_problem<double>(eps), per_point<T>(u), per_point<T>(v),
      per_problem<double>(kappa), matrices<T>(z), mode, over_distance, data<T>(product), threads};
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
