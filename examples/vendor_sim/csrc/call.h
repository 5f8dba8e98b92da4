// One boxed call of an aten op as the dispatcher passes it: what it writes and what it aliases.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "torch_sim.h"

namespace sim {

using c10::IValue;
using Stack = torch::jit::Stack;
using Replace = at::Tensor (*)(const at::Tensor&);

inline bool on_sim(const at::Tensor& tensor) { return tensor.device().type() == kSim; }

inline bool holds_tensors(const IValue& value) {
  return value.isList() &&
         value.toList().elementType()->isSubtypeOf(*c10::OptionalType::ofTensor());
}

// Returns the value with every defined tensor, alone or in a list, replaced.
inline IValue mapped(const IValue& value, Replace replace) {
  if (value.isTensor())
    return value.toTensor().defined() ? IValue(replace(value.toTensor())) : value;
  if (!holds_tensors(value)) return value;
  c10::impl::GenericList list(value.toList().elementType());
  for (const IValue& item : value.toListRef()) list.push_back(mapped(item, replace));
  return list;
}

inline std::vector<at::Tensor> tensors(const IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  std::vector<at::Tensor> found;
  if (!holds_tensors(value)) return found;
  for (const IValue& item : value.toListRef())
    found.push_back(item.isTensor() ? item.toTensor() : at::Tensor());
  return found;
}

inline void copy_all(const IValue& to, const IValue& from) {
  const auto target = tensors(to), source = tensors(from);
  for (std::size_t i = 0; i < target.size(); ++i) {
    if (!target[i].defined()) continue;
    if (target[i].sizes() != source[i].sizes()) target[i].resize_(source[i].sizes());
    target[i].copy_(source[i]);
  }
}

struct Call {
  const c10::OperatorHandle& op;
  const Stack arguments;
  const std::string name = op.schema().name();

  const c10::Argument& declared(std::size_t i) const { return op.schema().arguments()[i]; }
  bool writes(std::size_t i) const {
    return declared(i).alias_info() && declared(i).alias_info()->isWrite();
  }

  // Returns the argument that result i aliases, or -1.
  int source(std::size_t i) const {
    const auto* alias = op.schema().returns()[i].alias_info();
    for (std::size_t k = 0; alias && k < arguments.size(); ++k) {
      if (const auto* own = declared(k).alias_info();
          own && own->beforeSets() == alias->beforeSets())
        return int(k);
    }
    return -1;
  }
  bool is_random() const { return op.hasTag(at::Tag::nondeterministic_seeded); }
  bool takes_generator() const {
    const auto& all = op.schema().arguments();
    return std::any_of(all.begin(), all.end(), is_generator);
  }
  static bool is_generator(const c10::Argument& argument) {
    return c10::GeneratorType::get()->isSubtypeOf(*argument.type());
  }
  bool is_view() const {
    return !op.schema().returns().empty() && source(0) >= 0 && !writes(source(0));
  }

  void require_device() const {
    for (const auto& argument : arguments) {
      for (const auto& tensor : tensors(argument)) {
        if (!tensor.defined()) continue;
        TORCH_CHECK(on_sim(tensor) || tensor.dim() == 0, name, ": one tensor is on ",
                    tensor.device(), ", another on sim; copy it first: .to('sim')");
      }
    }
  }

  // Returns the arguments for another device's kernel of this op; random numbers come from
  // `generator`.
  Stack translate(c10::DeviceType device, Replace replace,
                  at::Generator (*generator)(const IValue&)) const {
    Stack result;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].isDevice())
        result.emplace_back(c10::Device(device));
      else if (is_generator(declared(i)))
        result.emplace_back(generator ? IValue(generator(arguments[i])) : IValue());
      else
        result.push_back(mapped(arguments[i], replace));
    }
    return result;
  }
  // Returns those of these arguments that the op writes.
  std::vector<at::Tensor> written(const Stack& stack) const {
    std::vector<at::Tensor> found;
    for (std::size_t i = 0; i < stack.size(); ++i) {
      if (writes(i))
        for (auto& tensor : tensors(stack[i])) found.push_back(tensor);
    }
    return found;
  }

  // Whether every result is a written argument that has its shape already; torch calls most ops so.
  bool is_shaped() const {
    for (std::size_t i = 0; i < op.schema().returns().size(); ++i) {
      if (source(i) < 0 || !writes(source(i))) return false;
    }
    const auto targets = written(arguments);
    return !targets.empty() &&
           std::all_of(targets.begin(), targets.end(), [](auto& t) { return t.numel() > 0; });
  }

  // Returns the call's results: written arguments as they are, others from the kernel's results.
  Stack results(const Stack& kernel, Replace make) const {
    Stack made;
    for (std::size_t i = 0; i < kernel.size(); ++i) {
      made.push_back(source(i) >= 0 ? arguments[source(i)] : mapped(kernel[i], make));
    }
    return made;
  }
};

}  // namespace sim
