// The device as PyTorch knows it: allocator, device guard, hooks and random generator. One device,
// one stream.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

#include "torch_sim.h"

namespace sim {
namespace {

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device(kSim, 0);
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, device};
    void* address = translated([&] { return sim::allocate(bytes); });
    c10::DataPtr data(address, address, &sim::release, device);
    translated([&] {  // NaN in every float, since new memory need not be zero
      sim::enqueue("poison",
                   [p = sim::resolve(address, bytes), bytes] { std::memset(p, 0xff, bytes); });
    });
    return data;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &sim::release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    sim::enqueue("memcpy", [a = sim::resolve(to, bytes), b = sim::resolve(from, bytes), bytes] {
      std::memcpy(a, b, bytes);
    });
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(kSim, &allocator);

// Page-locked memory: the host's own, in which the device knows its way.
struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    auto data = c10::GetAllocator(c10::kCPU)->allocate(bytes);
    void* address = data.get();
    if (bytes == 0) return data;
    std::lock_guard lock(mutex());
    blocks().insert_or_assign(address, Block{std::move(data), bytes});
    return {address, address, &release, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  static bool holds(const void* address) {
    std::lock_guard lock(mutex());
    const auto next = blocks().upper_bound(const_cast<void*>(address));
    if (next == blocks().begin()) return false;
    const auto& [start, block] = *std::prev(next);
    return address < static_cast<char*>(start) + block.bytes;
  }

 private:
  struct Block {
    c10::DataPtr data;
    std::size_t bytes;
  };
  static void release(void* address) {
    std::lock_guard lock(mutex());
    blocks().erase(address);
  }
  static std::map<void*, Block>& blocks() {
    static auto* all = new std::map<void*, Block>;
    return *all;
  }
  static std::mutex& mutex() {
    static auto* own = new std::mutex;
    return *own;
  }
};
Pinned pinned;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device) const override { return {kSim, 0}; }
  c10::Device getDevice() const override { return {kSim, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, {kSim, 0});
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream({kSim, 0}); }
  bool queryStream(const c10::Stream&) const override { return sim::pending() == 0; }
  void synchronizeStream(const c10::Stream&) const override { wait(); }
  void synchronizeDevice(c10::DeviceIndex) const override { wait(); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// State: seed and offset, as for a counter-based generator.
struct Generator final : c10::GeneratorImpl {
  Generator() : GeneratorImpl({kSim, 0}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  void set_current_seed(std::uint64_t seed) override { state = {seed, 0}; }
  std::uint64_t current_seed() const override { return state.seed; }
  std::uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return state.seed;
  }
  void set_offset(std::uint64_t offset) override { state.offset = offset; }
  std::uint64_t get_offset() const override { return state.offset; }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto tensor = at::detail::empty_cpu({sizeof state}, at::kByte);
    std::memcpy(tensor.mutable_data_ptr(), &state, sizeof state);
    return tensor.getIntrusivePtr();
  }
  void set_state(const c10::TensorImpl& tensor) override {
    TORCH_CHECK(
        tensor.numel() == sizeof state && tensor.dtype() == at::kByte && tensor.is_contiguous(),
        "sim: a generator state is ", sizeof state, " bytes; received ", tensor.numel(),
        " elements");
    std::memcpy(&state, tensor.data(), sizeof state);
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator;
    copy->state = state;
    return copy;
  }

  struct {
    std::uint64_t seed = c10::default_rng_seed_val, offset = 0;
  } state;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, std::size_t bytes) const override {
    auto data = allocator.allocate(bytes);
    if (const auto both = std::min(bytes, storage.nbytes()); both > 0)
      allocator.copy_data(data.mutable_get(), storage.data(), both);
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  }
  bool isPinnedPtr(const void* address) const override { return Pinned::holds(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>();
  }
};
[[maybe_unused]] const bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

}  // namespace

at::Generator& default_generator() {
  static auto* generator = new at::Generator(at::make_generator<Generator>());
  return *generator;
}

at::Generator draw(const std::optional<at::Generator>& given) {
  auto generator = given && given->defined() ? *given : default_generator();  // shared, not copied
  TORCH_CHECK(generator.device().type() == kSim, "sim: the generator lives on ", generator.device(),
              "; make it with torch.Generator('sim')");
  std::lock_guard lock(generator.mutex());
  const auto offset = generator.get_offset();
  generator.set_offset(offset + 1);
  // splitmix64's odd constant spreads neighbouring offsets over the 64 bits
  return at::detail::createCPUGenerator(generator.current_seed() ^
                                        (0x9e3779b97f4a7c15 * (offset + 1)));
}

void wait() {
  translated([] { sim::synchronize(); });
}

}  // namespace sim
