// The test hooks: what tests need and no op can express. The module also holds the op library
// itself, registered under the namespace fastadapters_hooks; the functions here act on that copy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

#include "cpu/isa.h"
#include "philox.h"

namespace py = pybind11;

namespace {

py::list cpu_isas() {
  py::object names = py::str(fastadapters_cpu_isas());
  return names.attr("split")(",");
}

void set_cpu_isa(const std::string& name) {
  if (!fastadapters_set_cpu_isa(name.c_str())) {
    throw py::value_error("name: expected one of " + std::string(fastadapters_cpu_isas()) +
                          ", got " + name);
  }
}

py::array_t<uint32_t> philox(uint64_t key, uint64_t offset, uint64_t counter, int64_t blocks) {
  py::array_t<uint32_t> out({blocks, int64_t{4}});
  uint32_t* data = out.mutable_data();
  for (int64_t i = 0; i < blocks; ++i) {
    fastadapters::PhiloxBlock block = fastadapters::philox4x32(key, counter + uint64_t(i), offset);
    std::memcpy(data + 4 * i, block.lane, sizeof block.lane);
  }
  return out;
}

py::tuple choose_bfloat16(double avx512_bf16, double avx512) {
  auto choice = fastadapters::cpu::choose_bfloat16(avx512_bf16, avx512);
  return py::make_tuple(fastadapters::cpu::name(choice.isa), choice.reason);
}

py::dict build() {
  using namespace py::literals;
  return py::dict("compiler"_a = __VERSION__, "standard"_a = int64_t{__cplusplus},
                  "pybind11"_a = PYBIND11_VERSION_HEX);
}

}  // namespace

PYBIND11_MODULE(_hooks, m) {
  m.doc() = "Test hooks of fastadapters";
  m.def("cpu_isas", &cpu_isas, "Instruction sets that run here, best first");
  m.attr("emulated") = py::str(FASTADAPTERS_EMULATED).attr("split")();
  m.def("cpu_isa", &fastadapters_cpu_isa, "The instruction set in use");
  m.def("cpu_isa_for", &fastadapters_cpu_isa_for, "The one whose kernels run for a dtype, and why",
        py::arg("dtype"));
  m.def("choose_bfloat16", &choose_bfloat16,
        "What runs bf16, and why, by the multiply-adds per second of two instruction sets",
        py::arg("avx512_bf16"), py::arg("avx512"));
  m.def("set_cpu_isa", &set_cpu_isa, "Use this instruction set from now on", py::arg("name"));
  m.def("philox", &philox, "Blocks [blocks, 4] of the Philox stream, from block `counter` on",
        py::arg("key"), py::arg("offset"), py::arg("counter"), py::arg("blocks"));
  m.def("build", &build, "How the hooks were built");
}
