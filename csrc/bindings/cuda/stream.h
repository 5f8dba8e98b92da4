// The stream on which torch's operators queue work.
#pragma once

#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <string>

namespace glm::gpu {

// Returns the current stream of a GPU as torch's Python says it. It takes Python's lock.
inline void* stream_by_python(int device) {
  const PyGILState_STATE lock = PyGILState_Ensure();
  PyObject* torch = PyImport_ImportModule("torch._C");
  PyObject* found =
      !torch ? nullptr : PyObject_CallMethod(torch, "_cuda_getCurrentRawStream", "i", device);
  void* stream = found ? PyLong_AsVoidPtr(found) : nullptr;
  const bool failed = PyErr_Occurred();
  if (failed) PyErr_Print();
  Py_XDECREF(found);
  Py_XDECREF(torch);
  PyGILState_Release(lock);
  TORCH_CHECK(!failed, "glm_core: torch does not tell the stream of GPU ", device);
  return stream;
}

template <class S>
auto handle(const S& stream, int) -> decltype(stream.native_handle()) {
  return stream.native_handle();
}

// torch 2.7 and 2.9 have no native_handle; 2.11 has it, 2.10 was not tried.
template <class S>
void* handle(const S& stream, long) {
  return stream_by_python(stream.device_index());
}

// Returns the cudaStream_t or hipStream_t that is current on this device; a CPU has none.
inline void* current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr;
  return handle(c10::impl::VirtualGuardImpl(device.type()).getStream(device), 0);
}

}  // namespace glm::gpu
