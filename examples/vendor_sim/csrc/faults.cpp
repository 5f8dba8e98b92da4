// Plants defects: how a broken device, driver or kernel library looks to the layers above.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <sstream>

#include "torch_sim.h"

namespace sim {
namespace {

std::mutex mutex;
std::deque<Fault> faults;  // a deque: `due` hands out pointers

std::map<std::string, std::vector<at::Tensor>>& last_results() {  // used only by the executor
  static auto* table = new std::map<std::string, std::vector<at::Tensor>>;
  return *table;
}

void flip(const at::Tensor& tensor, std::int64_t bit) {  // of the first element, modulo its width
  bit %= 8 * std::int64_t(tensor.element_size());
  if (tensor.numel() > 0)
    static_cast<unsigned char*>(tensor.data_ptr())[bit / 8] ^= 1u << (bit % 8);
}

void deliver_stale(const std::string& name, const std::vector<at::Tensor>& written) {
  std::ostringstream key;
  key << name;
  std::vector<at::Tensor> results;
  for (const auto& tensor : written) {
    key << tensor.sizes() << tensor.dtype();
    results.push_back(tensor.clone());
  }
  auto& before = last_results()[key.str()];
  for (std::size_t i = 0; i < before.size(); ++i) written[i].copy_(before[i]);
  before = results;
}

}  // namespace

void set_fault(std::string kind, std::string op, std::int64_t call, double value,
               std::string dtype) {
  std::lock_guard lock(mutex);
  faults.push_back({std::move(kind), std::move(op), call, value, std::move(dtype)});
}

void clear_faults() {
  {
    std::lock_guard lock(mutex);
    faults.clear();
  }
  sim::reset();
  sim::enqueue("clear_faults", [] { last_results().clear(); });
}

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
    if (fault.kind == "missing_dtype" && c10::getStringToDtypeMap().at(fault.dtype) == dtype)
      return true;
  }
  return false;
}

std::function<void()> spoiled(const std::string& name, std::vector<at::Tensor> written,
                              std::function<void()> kernel) {
  if (due("hang", name)) {
    return [kernel, since = sim::resets()] {
      sim::block_until_reset(since);
      kernel();
    };
  }
  if (due("device_lost", name))
    return [name] { throw Lost("sim: device lost while it ran " + name + "; reset it"); };
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
    return [kernel, written, name] {
      kernel();
      deliver_stale(name, written);
    };
  }
  return kernel;
}

}  // namespace sim
