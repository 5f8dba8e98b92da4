// The Python module whose import registers the operators' device kernels.
#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.def("gpu_built_for() -> str", [] { return std::string(TORCH_VERSION " " GLM_TOOLKIT); });
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module{
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
