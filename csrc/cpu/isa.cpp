// Chooses the instruction set: at first the best of those compiled in that this CPU has. On Arm the
// operating system tells what the CPU has; a program may not ask the CPU itself.
#include <atomic>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace glm {

#define GLM_DECLARE_TABLES(isa)            \
  namespace isa {                          \
  extern const Kernels<float> table_float; \
  extern const Kernels<bf16> table_bf16;   \
  }
#define GLM_TABLES(isa)   \
  GLM_DECLARE_TABLES(isa) \
  GLM_DECLARE_TABLES(isa##_exact)
GLM_ISAS(GLM_TABLES)

namespace {

struct Tables {
  const Kernels<float>* of_float;
  const Kernels<bf16>* of_bf16;
};

#define GLM_TABLE(isa) {&isa::table_float, &isa::table_bf16},
#define GLM_EXACT_TABLE(isa) {&isa##_exact::table_float, &isa##_exact::table_bf16},
const Tables tables[2][num_isas] = {{GLM_ISAS(GLM_TABLE)}, {GLM_ISAS(GLM_EXACT_TABLE)}};

#if defined(__aarch64__)
struct Features {
  bool dotprod = false, i8mm = false, bf16 = false;
};

#if defined(__linux__)
Features features() {
  // the bits of Linux's asm/hwcap.h, which older headers lack
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  return {(first >> 20 & 1) != 0, (second >> 13 & 1) != 0, (second >> 14 & 1) != 0};
}
#elif defined(__APPLE__)
bool reported(const char* name) {  // never run: no Apple machine at hand
  int value = 0;
  size_t size = sizeof value;
  return !sysctlbyname(name, &value, &size, nullptr, 0) && value;
}
Features features() {
  return {reported("hw.optional.arm.FEAT_DotProd"), reported("hw.optional.arm.FEAT_I8MM"),
          reported("hw.optional.arm.FEAT_BF16")};
}
#else
Features features() { return {}; }
#endif
#endif

Isa best() {
  for (int i = num_isas - 1; i > 0; --i)
    if (available(Isa(i))) return Isa(i);
  return Isa::scalar;
}

Isa active = best();
std::atomic<bool> wants_exact{false};

}  // namespace

bool available(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  if (isa == Isa::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__aarch64__)
  static const Features has = features();
  if (isa == Isa::neon) return true;
  if (isa == Isa::dotprod) return has.dotprod;
  if (isa == Isa::i8mm) return has.dotprod && has.i8mm && has.bf16;
#endif
  return isa == Isa::scalar;
}

Isa active_isa() { return active; }
void activate(Isa isa) { active = isa; }

bool exact() { return wants_exact.load(std::memory_order_relaxed); }
void set_exact(bool on) { wants_exact = on; }

template <>
const Kernels<float>& kernels<float>() {
  return *tables[exact()][int(active)].of_float;
}

template <>
const Kernels<bf16>& kernels<bf16>() {
  return *tables[exact()][int(active)].of_bf16;
}

}  // namespace glm
