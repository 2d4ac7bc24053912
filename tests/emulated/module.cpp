// Python module of the CUDA kernels run by the emulator: every .cu file but the one that asks the driver.
#include <utility>

#include "cuda/backward.cu"
#include "cuda/bindings.h"
#include "cuda/cost.cu"
#include "cuda/logits.cu"
#include "cuda/moves.cu"
#include "cuda/sinkhorn.cu"

namespace py = pybind11;
using namespace otdd::cuda;

PYBIND11_MODULE(otdd_emulated, m) {
  bindings::bind_kernels(m);
  m.def(
      "set_chip",
      [](int multiprocessors, i64 shared, int cluster, double barrier) {
        emulated_chip = {multiprocessors, shared, cluster, barrier};
      },
      py::arg(), py::arg(), py::arg(), py::arg("barrier") = emulated_chip.barrier);
  m.def("place", [] { return py::make_tuple(kEmulatedDevice, kEmulatedStream); });
  m.def("team", [](i64 B, i64 N, i64 M) {
    const Layout l = layout_of<float, Iterate<float>>(emulated_chip, B, N, M);
    const char* slabs[] = {"block", "cluster", "group"};
    const bool stream = l.kind == Layout::kStream;
    const char* name = l.kind == Layout::kWarp ? "warp" : stream ? "stream" : slabs[int(l.team)];
    return py::make_tuple(name, stream ? l.stream.down : 1, stream ? l.stream.across : l.slab.peers);
  });
  // How often the last call read its first argument, in elements: of a solve, the costs.
  m.def("reads", [] { return emulator::memory.reads_of_first; });
  // Kernels launched since this was last asked.
  m.def("launches", [] { return std::exchange(emulator::machine.launches, 0); });
  m.def("float_of_half", [](unsigned short bits) { return chip::float_of_half(bits); });
  m.def("half_of", [](float x) { return chip::half_of(x); });
  m.def("float_of_bfloat16", [](unsigned short bits) { return float_of_bfloat16(bits); });
  m.def("bfloat16_of", [](float x) { return bfloat16_of(x); });
  m.def("set_order", [](int order) { emulator::order = static_cast<emulator::Order>(order); });
}
