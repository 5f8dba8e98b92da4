// Every aten op on the device. Shapes come from the op's meta kernel on the host, then the op is queued: the executor
// runs it on the storage behind the device addresses. An op whose result's shape depends on values waits instead.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <torch/library.h>

#include <chrono>
#include <map>
#include <mutex>

#include "torch_sim.h"

namespace sim {

at::Tensor resolved(const at::Tensor& tensor) {
  const auto options = tensor.options().device(c10::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  const auto bytes = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size());
  return at::from_blob(sim::resolve(tensor.data_ptr(), bytes), tensor.sizes(), tensor.strides(), options);
}

void launch(const std::string& name, std::vector<at::Tensor> written, std::function<void()> kernel) {
  auto work = spoiled(name, std::move(written), std::move(kernel));
  translated([&] {
    sim::enqueue(name, [work = std::move(work)] {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      work();
    });
  });
}

namespace {

using c10::IValue;
using Stack = torch::jit::Stack;
using Replace = at::Tensor (*)(const at::Tensor&);

bool on_sim(const at::Tensor& tensor) { return tensor.device().type() == kSim; }

at::Tensor shape_of(const at::Tensor& tensor) {
  return on_sim(tensor) ? at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kMeta))
                        : tensor;
}
at::Tensor empty_like(const at::Tensor& shape) {
  return at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(kSim));
}
at::Tensor operand(const at::Tensor& tensor) {  // a host scalar may change before the kernel runs: copied
  if (on_sim(tensor)) return resolved(tensor);
  return tensor.unsafeGetTensorImpl()->is_wrapped_number() ? tensor : tensor.clone();
}
at::Tensor to_host(const at::Tensor& tensor) { return tensor.cpu(); }
at::Tensor to_sim(const at::Tensor& tensor) { return tensor.to(kSim); }

bool holds_tensors(const IValue& value) {
  return value.isList() && value.toList().elementType()->isSubtypeOf(*c10::OptionalType::ofTensor());
}

// The value with every defined tensor, alone or in a list, replaced.
IValue mapped(const IValue& value, Replace replace) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(replace(value.toTensor())) : value;
  if (!holds_tensors(value)) return value;
  c10::impl::GenericList list(value.toList().elementType());
  for (const IValue& item : value.toListRef()) list.push_back(mapped(item, replace));
  return list;
}

std::vector<at::Tensor> tensors(const IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  std::vector<at::Tensor> found;
  if (!holds_tensors(value)) return found;
  for (const IValue& item : value.toListRef()) found.push_back(item.isTensor() ? item.toTensor() : at::Tensor());
  return found;
}

void copy_all(const IValue& to, const IValue& from) {
  const auto target = tensors(to), source = tensors(from);
  for (std::size_t i = 0; i < target.size(); ++i) {
    if (!target[i].defined()) continue;
    if (target[i].sizes() != source[i].sizes()) target[i].resize_(source[i].sizes());
    target[i].copy_(source[i]);
  }
}

void require_dtype(const std::string& name, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!lacks(tensor.scalar_type()), name, ": dtype ", tensor.scalar_type(),
                              " is not supported by this device");
}

struct Call {
  const c10::OperatorHandle& op;
  const Stack arguments;
  const std::string name = op.schema().name();

  const c10::Argument& declared(std::size_t i) const { return op.schema().arguments()[i]; }
  bool writes(std::size_t i) const { return declared(i).alias_info() && declared(i).alias_info()->isWrite(); }

  // The argument that result i aliases, or -1.
  int source(std::size_t i) const {
    const auto* alias = op.schema().returns()[i].alias_info();
    for (std::size_t k = 0; alias && k < arguments.size(); ++k) {
      if (const auto* own = declared(k).alias_info(); own && own->beforeSets() == alias->beforeSets()) return int(k);
    }
    return -1;
  }
  bool is_view() const { return !op.schema().returns().empty() && source(0) >= 0 && !writes(source(0)); }

  void require_usable() const {
    for (const auto& argument : arguments) {
      for (const auto& tensor : tensors(argument)) {
        if (!tensor.defined()) continue;
        TORCH_CHECK(on_sim(tensor) || tensor.dim() == 0, name, ": one tensor is on ", tensor.device(),
                    ", another on sim; copy it first: .to('sim')");
        require_dtype(name, tensor);
      }
    }
  }

  // Arguments for another device's kernel of the same op; its random numbers come from `generator`.
  Stack translate(c10::DeviceType device, Replace replace, at::Generator (*generator)(const IValue&)) const {
    Stack result;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      const bool random = c10::GeneratorType::get()->isSubtypeOf(*declared(i).type());
      if (arguments[i].isDevice()) result.emplace_back(c10::Device(device));
      else if (random) result.emplace_back(generator ? IValue(generator(arguments[i])) : IValue());
      else result.push_back(mapped(arguments[i], replace));
    }
    return result;
  }
  Stack operands() const {
    return translate(c10::kCPU, operand, [](const IValue& g) { return draw(g.toOptional<at::Generator>()); });
  }

  // What it writes, of these arguments.
  std::vector<at::Tensor> written(const Stack& stack) const {
    std::vector<at::Tensor> found;
    for (std::size_t i = 0; i < stack.size(); ++i) {
      if (writes(i)) for (auto& tensor : tensors(stack[i])) found.push_back(tensor);
    }
    return found;
  }

  // The call's results: written arguments themselves, others made from the kernel's.
  Stack results(const Stack& kernel, Replace make) const {
    Stack made;
    for (std::size_t i = 0; i < kernel.size(); ++i) {
      made.push_back(source(i) >= 0 ? arguments[source(i)] : mapped(kernel[i], make));
    }
    return made;
  }
};

// Runs the meta kernel: shapes of the results, and of written arguments in `arguments`. False where there is none, or
// where it cannot know; should the call itself be wrong, the kernel that runs instead will say so.
bool infer(const Call& call, Stack& arguments, Stack& results) {
  arguments = results = call.translate(c10::kMeta, shape_of, nullptr);
  try {
    call.op.callBoxed(results);
  } catch (const std::exception&) {
    return false;
  }
  return std::all_of(results.begin(), results.end(), [](auto& v) { return v.isTensor() || holds_tensors(v); });
}

Stack as_view(const Call& call, const Stack& shapes) {
  const auto& base = call.arguments[call.source(0)].toTensor();
  const auto& shape = shapes.at(0).toTensor();
  return {base.as_strided(shape.sizes(), shape.strides(), base.storage_offset() + shape.storage_offset())};
}

Stack queued(const Call& call, const Stack& written_shapes, const Stack& shapes) {
  for (std::size_t i = 0; i < call.arguments.size(); ++i) {
    if (!call.writes(i) || !call.arguments[i].isTensor()) continue;
    const auto &own = call.arguments[i].toTensor(), &shape = written_shapes[i].toTensor();
    if (own.sizes() != shape.sizes()) own.resize_(shape.sizes());
  }
  const auto results = call.results(shapes, empty_like);
  const auto operands = call.operands();
  auto written = call.written(operands);
  Stack fresh(results.size());  // None where a result is an argument
  for (std::size_t i = 0; i < results.size(); ++i) {
    if (call.source(i) >= 0) continue;
    fresh[i] = mapped(results[i], resolved);
    for (auto& tensor : tensors(fresh[i])) if (tensor.defined()) written.push_back(tensor);
  }
  launch(call.name, written, [op = call.op, operands, fresh] {
    auto stack = operands;
    op.callBoxed(stack);
    for (std::size_t i = 0; i < fresh.size(); ++i) copy_all(fresh[i], stack[i]);
  });
  return results;
}

Stack waited(const Call& call) {
  TORCH_CHECK_NOT_IMPLEMENTED(!call.is_view(), call.name, ": this view is not supported by sim");
  auto stack = std::make_shared<Stack>(call.operands());
  launch(call.name, call.written(*stack), [op = call.op, stack] { op.callBoxed(*stack); });
  wait();
  return call.results(*stack, to_sim);
}

// What the runtime sent to the host without telling anybody.
struct Sent {
  double calls = 0, seconds = 0, bytes = 0;
};
std::mutex mutex;
std::map<std::string, Sent> sent_to_host;

Stack on_host(const Call& call) {
  wait();
  const auto begin = std::chrono::steady_clock::now();
  const auto arguments = call.translate(c10::kCPU, to_host, nullptr);
  auto stack = arguments;
  call.op.callBoxed(stack);
  double bytes = 0;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (call.writes(i)) copy_all(call.arguments[i], arguments[i]);
    for (auto& tensor : tensors(arguments[i])) bytes += tensor.defined() ? double(tensor.nbytes()) : 0;
  }
  for (const auto& value : stack) {
    for (auto& tensor : tensors(value)) bytes += tensor.defined() ? double(tensor.nbytes()) : 0;
  }
  const auto results = call.results(stack, to_sim);
  wait();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  std::lock_guard lock(mutex);
  auto& [calls, seconds, moved] = sent_to_host[call.name];
  calls += 1;
  seconds += took.count();
  moved += bytes;
  return results;
}

Stack run(const Call& call) {
  call.require_usable();
  if (!call.is_view() && due("cpu_fallback", call.name)) return on_host(call);
  const auto is_generator = [](auto& a) { return c10::GeneratorType::get()->isSubtypeOf(*a.type()); };
  const auto& declared = call.op.schema().arguments();
  TORCH_CHECK_NOT_IMPLEMENTED(!call.op.hasTag(at::Tag::nondeterministic_seeded) ||
                                  std::any_of(declared.begin(), declared.end(), is_generator),
                              call.name, ": takes no generator, so it cannot draw from the device's");
  Stack written_shapes, shapes;
  if (!infer(call, written_shapes, shapes)) return waited(call);
  return call.is_view() ? as_view(call, shapes) : queued(call, written_shapes, shapes);
}

void any_op(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto count = op.schema().arguments().size();
  Call call{op, {stack->end() - count, stack->end()}};
  torch::jit::drop(*stack, count);
  for (auto& result : run(call)) stack->push_back(std::move(result));
}

// The ops that every out-of-tree device must bring itself.

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, c10::GetAllocator(kSim), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(kSim),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const auto bytes = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  const auto& storage = impl->storage();
  if (bytes > storage.nbytes()) {
    auto data = c10::GetAllocator(kSim)->allocate(bytes);
    if (storage.nbytes() > 0) c10::GetAllocator(kSim)->copy_data(data.mutable_get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
  return self;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (on_sim(from) && on_sim(to)) {
    for (const auto* tensor : {&from, &to}) require_dtype("aten::copy_", *tensor);
    launch("aten::copy_", {resolved(to)}, [a = resolved(to), b = resolved(from)] { a.copy_(b); });
  } else if (on_sim(to)) {  // the host may change its tensor at once: staged
    auto staged = at::empty(from.sizes(), to.options().device(c10::kCPU)).copy_(from);
    launch("sim::to_device", {resolved(to)}, [a = resolved(to), staged] { a.copy_(staged); });
  } else {
    wait();
    to.copy_(resolved(from));
  }
  return to;
}

at::Scalar item(const at::Tensor& self) {
  wait();
  return at::_local_scalar_dense(resolved(self));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&any_op>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", item);
}

c10::Dict<std::string, std::vector<double>> fallbacks() {
  std::lock_guard lock(mutex);
  c10::Dict<std::string, std::vector<double>> table;
  for (const auto& [op, sent] : sent_to_host) table.insert(op, std::vector{sent.calls, sent.seconds, sent.bytes});
  return table;
}
void reset_fallbacks() {
  std::lock_guard lock(mutex);
  sent_to_host.clear();
}

TORCH_LIBRARY_FRAGMENT(sim, m) {
  m.def("fallbacks() -> Dict(str, float[])", fallbacks);
  m.def("reset_fallbacks() -> ()", reset_fallbacks);
}

}  // namespace
}  // namespace sim
