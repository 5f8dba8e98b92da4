// Chooses the instruction set: at first the best of those compiled in that this CPU has.
#include "kernels.h"

namespace glm {

#define GLM_TABLES(isa)                    \
  namespace isa {                          \
  extern const Kernels<float> table_float; \
  extern const Kernels<bf16> table_bf16;   \
  }
GLM_TABLES(scalar)
#if defined(__x86_64__)
GLM_TABLES(avx2)
GLM_TABLES(avx512)
#endif

namespace {

struct Tables {
  const Kernels<float>* of_float;
  const Kernels<bf16>* of_bf16;
};

const Tables tables[num_isas] = {
    {&scalar::table_float, &scalar::table_bf16},
#if defined(__x86_64__)
    {&avx2::table_float, &avx2::table_bf16},
    {&avx512::table_float, &avx512::table_bf16},
#endif
};

Isa best() {
  for (int i = num_isas - 1; i > 0; --i)
    if (available(Isa(i))) return Isa(i);
  return Isa::scalar;
}

Isa active = best();

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
#endif
  return isa == Isa::scalar;
}

Isa active_isa() { return active; }
void activate(Isa isa) { active = isa; }

template <>
const Kernels<float>& kernels<float>() {
  return *tables[int(active)].of_float;
}

template <>
const Kernels<bf16>& kernels<bf16>() {
  return *tables[int(active)].of_bf16;
}

}  // namespace glm
