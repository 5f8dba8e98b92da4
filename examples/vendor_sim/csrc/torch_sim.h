// Declares what the files of the PyTorch plug-in share.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <functional>
#include <string>
#include <vector>

#include "driver.h"

namespace sim {

constexpr auto kSim = c10::DeviceType::PrivateUse1;

// Runs `f` and turns the driver's errors into torch's: torch.AcceleratorError (before torch 2.8 a
// RuntimeError) and torch.OutOfMemoryError.
template <class F>
auto translated(F f) {
  try {
    return f();
  } catch (const Lost& e) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
    throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 1, e.what());
#else
    TORCH_CHECK(false, "SIM error: ", e.what());  // as torch's own devices did before 2.8
#endif
  } catch (const OutOfMemory& e) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, e.what());
  }
}

// The tensor as the executor sees it: a CPU tensor on the storage behind the device address. Only
// kernels touch it.
at::Tensor resolved(const at::Tensor& tensor);

// Queues a kernel. `written`: what it writes, as `resolved`; the faults set for `name` are applied
// to it.
void launch(const std::string& name, std::vector<at::Tensor> written, std::function<void()> kernel);
void wait();  // for everything that was launched

// Returns a generator for one random kernel, seeded by the device generator's seed and offset. The
// offset advances now, when the kernel is queued, not when it runs.
at::Generator draw(const std::optional<at::Generator>& generator);
at::Generator& default_generator();

// Whether a fault of this kind (see faults.py) is due at this call of the op. Counts the call.
struct Fault {
  std::string kind, op;
  std::int64_t call;  // which call of the op, counted from 1 when set; 0: each
  double value;
  std::string dtype;
  std::int64_t seen = 0;
};
void set_fault(std::string kind, std::string op, std::int64_t call, double value,
               std::string dtype);
void clear_faults();
const Fault* due(const std::string& kind, const std::string& op);
bool lacks(at::ScalarType dtype);
std::function<void()> spoiled(const std::string& name, std::vector<at::Tensor> written,
                              std::function<void()> kernel);

}  // namespace sim
