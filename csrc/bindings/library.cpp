// The Python module whose import registers the operators. Every public op is a composite: it calls
// `*_forward`, and where gradients are needed it does so in an autograd function whose backward
// calls `*_backward`. Only these two have kernels and fakes.
#include <ATen/Parallel.h>
#include <Python.h>
#include <torch/library.h>

#include <set>
#include <thread>

#include "kernels.h"

namespace {

using glm::Isa;

std::string isa() { return glm::isa_names[int(glm::active_isa())]; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < glm::num_isas; ++i)
    if (glm::available(Isa(i))) names.push_back(glm::isa_names[i]);
  return names;
}

void set_isa(std::string name) {
  for (int i = 0; i < glm::num_isas; ++i)
    if (name == glm::isa_names[i] && glm::available(Isa(i))) return glm::activate(Isa(i));
  TORCH_CHECK_VALUE(false, "instruction set '", name, "': this CPU has ", c10::Join(", ", isas()));
}

bool exact() { return glm::exact(); }

void set_exact(bool on) { glm::set_exact(on); }

// Returns how many threads ran a parallel loop over `size` indices. A build without OpenMP runs
// every loop on one thread, and its results are right all the same.
int64_t threads_used(int64_t size) {
  std::vector<std::thread::id> ran(static_cast<size_t>(size));
  at::parallel_for(0, size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ran[size_t(i)] = std::this_thread::get_id();
  });
  return int64_t(std::set<std::thread::id>(ran.begin(), ran.end()).size());
}

}  // namespace

TORCH_LIBRARY(glm_core, m) {
  m.def("isa() -> str", isa);
  m.def("isas() -> str[]", isas);
  m.def("set_isa(str name) -> ()", set_isa);
  m.def("exact() -> bool", exact);
  m.def("set_exact(bool on) -> ()", set_exact);
  m.def("threads_used(int size) -> int", threads_used);
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module{
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
