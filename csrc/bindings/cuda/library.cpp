// The Python module whose import registers the operators' device kernels.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.def("gpu_toolkit() -> str", [] { return std::string(GLM_TOOLKIT); });
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module{
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
