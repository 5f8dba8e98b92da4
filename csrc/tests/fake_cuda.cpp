// Lets a torch without CUDA hold fake tensors on device `cuda`: a device guard and hooks that
// report one device and do nothing. Without them torch ends the process at the first gradient. Must
// be loaded before torch (LD_PRELOAD); only for dry runs under FakeTensorMode.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

struct FakeCudaGuard : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}

 private:
  static Stream only() { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
};

C10_REGISTER_GUARD_IMPL(CUDA, FakeCudaGuard)

}  // namespace c10::impl

namespace at {

struct FakeCudaHooks : CUDAHooksInterface {
  explicit FakeCudaHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", FakeCudaHooks)

}  // namespace at
