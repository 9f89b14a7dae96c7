// The simulator in Python: its schedule, and its own kernels. The kernels of csrc/cuda come as
// torch.ops.llmops_cuda_sim.*, registered by the bindings of csrc/bindings/cuda in this library.
#include <pybind11/pybind11.h>

#include "scheduler.h"
#include "selftest.h"

namespace py = pybind11;

namespace cuda_sim {
extern bool another_seed_each_time;  // scheduler.cpp
}
namespace llmops::cuda {
int64_t quotient(int64_t x, int64_t by);  // selftest.cu
}

PYBIND11_MODULE(llmops_cuda_sim, m) {
  py::register_exception<cuda_sim::Fault>(m, "Fault");
  m.def(
      "schedule",
      [](int order, uint32_t seed, bool another_each_time) {
        cuda_sim::schedule() = {order, seed};
        cuda_sim::another_seed_each_time = another_each_time;
      },
      "order 0: threads as numbered, 1: backwards, 2: drawn from the seed; another seed for each "
      "operator that is called, so that two calls must give the same bits under both",
      py::arg("order") = 2, py::arg("seed") = 1, py::arg("another_each_time") = false);
  // x and y by address; x_floats, y_floats: how much of them may be touched, 0: all.
  m.def("selftest", [](const std::string& name, uintptr_t x, uintptr_t y, int n, size_t x_floats,
                       size_t y_floats) {
    const cuda_sim::Session session;
    if (x_floats) cuda_sim::allow(reinterpret_cast<const void*>(x), x_floats * sizeof(float));
    if (y_floats) cuda_sim::allow(reinterpret_cast<const void*>(y), y_floats * sizeof(float));
    if (!llmops::cuda::selftest(name, reinterpret_cast<const float*>(x),
                                reinterpret_cast<float*>(y), n))
      throw py::key_error(name);
  });
  m.def("refuse", &cuda_sim::refuse,
        "the launch, or demand for shared memory, after `others` more is refused; -1: none is; "
        "whether one has been since the last call",
        py::arg("others"));
  m.def("quotient", &llmops::cuda::quotient);
  m.def("convert", [](uintptr_t x, uintptr_t y, uintptr_t back, int n, bool bf16) {
    llmops::cuda::convert(reinterpret_cast<const float*>(x), reinterpret_cast<uint16_t*>(y),
                          reinterpret_cast<float*>(back), n, bf16);
  });
}
