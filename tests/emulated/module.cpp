// Python module of the CUDA kernels run by the emulator: every .cu file but the one that asks the driver.
#include "cuda/backward.cu"
#include "cuda/bindings.h"
#include "cuda/cost.cu"
#include "cuda/sinkhorn.cu"

namespace py = pybind11;
using namespace otdd::cuda;

PYBIND11_MODULE(otdd_emulated, m) {
  bindings::bind_kernels(m);
  m.def("set_chip", [](int multiprocessors, i64 shared, int cluster) {
    emulated_chip = {multiprocessors, shared, cluster};
  });
  m.def("set_order", [](int order) { emulator::order = static_cast<emulator::Order>(order); });
}
