// The only file that sees Python. Tensors arrive as raw addresses with sizes and strides.
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"
#include "otdd_build.h"  // written by setup.py: what was built, and why

#ifdef OTDD_CUDA
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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of otdd; use them through otdd.ops.";
  m.def("build_info", &build_info, "What this module was built with, as a dict of strings.");
  m.def("cpu_isa", &otdd::cpu::isa, "Instruction set the CPU kernels run with on this machine.");
#ifdef OTDD_CUDA
  m.def("cuda_devices", &cuda_devices, "CUDA devices of this machine, and versions.");
#endif
}
