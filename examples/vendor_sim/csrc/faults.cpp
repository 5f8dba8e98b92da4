// Planted defects: what a broken device, driver or kernel library looks like from above.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>

#include "torch_sim.h"

namespace sim {
namespace {

std::mutex mutex;
std::deque<Fault> faults;  // a deque: `due` hands out pointers

void set_fault(std::string kind, std::string op, std::int64_t call, double value, std::string dtype) {
  std::lock_guard lock(mutex);
  faults.push_back({std::move(kind), std::move(op), call, value, std::move(dtype)});
}

void clear_faults() {
  {
    std::lock_guard lock(mutex);
    faults.clear();
  }
  sim::reset();
}

void flip(const at::Tensor& tensor, std::int64_t bit) {  // of the first element
  if (tensor.numel() > 0) static_cast<unsigned char*>(tensor.data_ptr())[bit / 8] ^= 1u << (bit % 8);
}

bool same_shapes(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const auto& x, const auto& y) { return x.sizes() == y.sizes() && x.dtype() == y.dtype(); });
}

}  // namespace

const Fault* due(const std::string& kind, const std::string& op) {
  std::lock_guard lock(mutex);
  for (auto& fault : faults) {
    if (fault.kind != kind || (!fault.op.empty() && fault.op != op)) continue;
    ++fault.seen;
    if (fault.call == 0 || fault.call == fault.seen) return &fault;
  }
  return nullptr;
}

bool lacks(at::ScalarType dtype) {
  std::lock_guard lock(mutex);
  for (const auto& fault : faults) {
    if (fault.kind == "missing_dtype" && c10::getStringToDtypeMap().at(fault.dtype) == dtype) return true;
  }
  return false;
}

std::function<void()> spoiled(const std::string& name, std::vector<at::Tensor> written, std::function<void()> kernel) {
  if (due("hang", name)) {
    return [kernel, since = sim::resets()] {
      sim::block_until_reset(since);
      kernel();
    };
  }
  if (due("device_lost", name)) return [name] { throw Lost("sim: device lost while it ran " + name + "; reset it"); };
  if (const auto* fault = due("wrong_op", name)) {
    return [kernel, written, factor = fault->value] {
      kernel();
      for (auto& tensor : written) {
        if (tensor.is_floating_point()) tensor.mul_(factor);
      }
    };
  }
  if (const auto* fault = due("bit_flip", name)) {
    return [kernel, first = written.at(0), bit = std::int64_t(fault->value)] {
      kernel();
      flip(first, bit);
    };
  }
  if (due("stale_buffer", name)) {
    static auto* last = new std::map<std::string, std::vector<at::Tensor>>;  // touched by the executor only
    return [kernel, written, name] {
      kernel();
      std::vector<at::Tensor> results;
      for (const auto& tensor : written) results.push_back(tensor.clone());
      auto& before = (*last)[name];
      if (same_shapes(before, written)) {
        for (std::size_t i = 0; i < written.size(); ++i) written[i].copy_(before[i]);
      }
      before = results;
    };
  }
  return kernel;
}

TORCH_LIBRARY_FRAGMENT(sim, m) {
  m.def("fault(str kind, str op, int call, float value, str dtype) -> ()", set_fault);
  m.def("clear_faults() -> ()", clear_faults);
  m.def("lacks(ScalarType dtype) -> bool", lacks);
}

}  // namespace sim
