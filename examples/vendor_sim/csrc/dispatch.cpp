// Runs every aten op on the device. The op's meta kernel computes the shapes on the host. Then
// the op is queued, and the executor runs it on the storage behind the device addresses. An op
// whose result's shape depends on values waits for the queue instead.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>

#include <chrono>
#include <map>
#include <mutex>

#include "call.h"
#include "torch_sim.h"

namespace sim {

at::Tensor resolved(const at::Tensor& tensor) {
  const auto options = tensor.options().device(c10::kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  const auto bytes =
      at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size());
  return at::from_blob(sim::resolve(tensor.data_ptr(), bytes), tensor.sizes(), tensor.strides(),
                       options);
}

void launch(const std::string& name, std::vector<at::Tensor> written,
            std::function<void()> kernel) {
  for (const auto& tensor : written) {
    TORCH_CHECK_NOT_IMPLEMENTED(!lacks(tensor.scalar_type()), name, ": dtype ",
                                tensor.scalar_type(),
                                " is not supported by this device; use another");
  }
  auto work = spoiled(name, std::move(written), std::move(kernel));
  translated([&] {
    sim::enqueue(name, [work = std::move(work)] {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      work();
    });
  });
}

namespace {

at::Tensor shape_of(const at::Tensor& tensor) {
  return on_sim(tensor) ? at::empty_strided(tensor.sizes(), tensor.strides(),
                                            tensor.options().device(c10::kMeta))
                        : tensor;
}
at::Tensor empty_like(const at::Tensor& shape) {
  return at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(kSim));
}
// Copies a host scalar, which may change before the kernel runs.
at::Tensor operand(const at::Tensor& tensor) {
  if (on_sim(tensor)) return resolved(tensor);
  return tensor.unsafeGetTensorImpl()->is_wrapped_number() ? tensor : tensor.clone();
}
at::Tensor to_host(const at::Tensor& tensor) { return tensor.cpu(); }
at::Tensor to_sim(const at::Tensor& tensor) { return tensor.to(kSim); }

Stack operands_of(const Call& call) {
  return call.translate(c10::kCPU, operand,
                        [](const IValue& g) { return draw(g.toOptional<at::Generator>()); });
}

// Runs the meta kernel, which gives the shapes of results and of the arguments that are written.
// Returns false where there is none, or where it cannot know. Where the call itself is wrong, the
// kernel that runs instead reports it.
bool infer(const Call& call, Stack& arguments, Stack& results) {
  arguments = results = call.translate(c10::kMeta, shape_of, nullptr);
  try {
    call.op.callBoxed(results);
  } catch (const std::exception&) {
    return false;
  }
  return std::all_of(results.begin(), results.end(),
                     [](auto& v) { return v.isTensor() || holds_tensors(v); });
}

Stack as_view(const Call& call, const Stack& shapes) {
  const auto& base = call.arguments[call.source(0)].toTensor();
  const auto& shape = shapes.at(0).toTensor();
  return {base.as_strided(shape.sizes(), shape.strides(),
                          base.storage_offset() + shape.storage_offset())};
}

Stack queued(const Call& call, const Stack& written_shapes, const Stack& shapes) {
  for (std::size_t i = 0; i < call.arguments.size(); ++i) {
    if (!call.writes(i) || !call.arguments[i].isTensor()) continue;
    const auto &own = call.arguments[i].toTensor(), &shape = written_shapes[i].toTensor();
    if (own.sizes() != shape.sizes()) own.resize_(shape.sizes());
  }
  const auto results = call.results(shapes, empty_like);
  const auto operands = operands_of(call);
  auto written = call.written(operands);
  Stack fresh(results.size());  // None where a result is an argument
  for (std::size_t i = 0; i < results.size(); ++i) {
    if (call.source(i) >= 0) continue;
    fresh[i] = mapped(results[i], resolved);
    for (auto& tensor : tensors(fresh[i]))
      if (tensor.defined()) written.push_back(tensor);
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
  auto stack = std::make_shared<Stack>(operands_of(call));
  launch(call.name, call.written(*stack), [op = call.op, stack] { op.callBoxed(*stack); });
  wait();
  return call.results(*stack, to_sim);
}

// What the runtime silently sent to the host.
struct Sent {
  double calls = 0, seconds = 0, bytes = 0;
};
std::mutex counting;
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
    for (auto& tensor : tensors(arguments[i]))
      bytes += tensor.defined() ? double(tensor.nbytes()) : 0;
  }
  for (const auto& value : stack) {
    for (auto& tensor : tensors(value)) bytes += tensor.defined() ? double(tensor.nbytes()) : 0;
  }
  const auto results = call.results(stack, to_sim);
  wait();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  std::lock_guard lock(counting);
  auto& [calls, seconds, moved] = sent_to_host[call.name];
  calls += 1;
  seconds += took.count();
  moved += bytes;
  return results;
}

Stack run(const Call& call) {
  call.require_device();
  if (!call.is_view() && due("cpu_fallback", call.name)) return on_host(call);
  TORCH_CHECK_NOT_IMPLEMENTED(!call.is_random() || call.takes_generator(), call.name,
                              ": takes no generator, so it cannot draw from the device's");
  TORCH_CHECK_NOT_IMPLEMENTED(!call.op.hasTag(at::Tag::inplace_view), call.name,
                              ": changes what a tensor is, not its values; sim does not know how");
  Stack written_shapes = call.arguments, shapes(call.op.schema().returns().size());
  if (call.is_shaped()) return queued(call, written_shapes, shapes);
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

// The ops that every out-of-tree device must implement itself.

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, c10::GetAllocator(kSim),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(kSim),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size,
                          std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const auto bytes = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (const auto& storage = impl->storage(); bytes > storage.nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(storage, bytes);
  return self;
}

// Page-locked memory of the host is read and written by the queue, when its turn comes.
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (on_sim(from) && on_sim(to)) {
    launch("aten::copy_", {resolved(to)}, [a = resolved(to), b = resolved(from)] { a.copy_(b); });
  } else if (on_sim(to)) {
    auto host = from;
    if (!non_blocking || !from.is_pinned())  // staged, since the host may change its tensor at once
      host = at::empty(from.sizes(), to.options().device(c10::kCPU)).copy_(from);
    launch("sim::to_device", {resolved(to)}, [a = resolved(to), host] { a.copy_(host); });
  } else if (non_blocking && to.is_pinned()) {
    launch("sim::to_host", {to}, [to, b = resolved(from)] { to.copy_(b); });
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

// Operators without a derivative of their own, such as sim's backward ones, go on to the device;
// torch 2.7 and 2.9 leave saying so to the vendor.
TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) {
  constexpr auto key = c10::DispatchKey::AutogradPrivateUse1;
  if (!c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(key)) {
    m.fallback(torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&any_op>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("resize_", resize_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("_copy_from", copy_from);
  m.impl("_local_scalar_dense", item);
  // torch would compose it of other ops, with more roundings than one kernel has
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&any_op>());
}

c10::Dict<std::string, std::vector<double>> fallbacks() {
  std::lock_guard lock(counting);
  c10::Dict<std::string, std::vector<double>> table;
  for (const auto& [op, sent] : sent_to_host)
    table.insert(op, std::vector{sent.calls, sent.seconds, sent.bytes});
  return table;
}
void reset_fallbacks() {
  std::lock_guard lock(counting);
  sent_to_host.clear();
}

TORCH_LIBRARY_FRAGMENT(sim, m) {
  m.def("fallbacks() -> Dict(str, float[])", fallbacks);
  m.def("reset_fallbacks() -> ()", reset_fallbacks);
}

}  // namespace
}  // namespace sim
