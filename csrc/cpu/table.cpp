// The table of one instruction set's kernels; compiled once per set, like the kernels.
#include "kernels.h"

namespace glm::GLM_ISA {

#define GLM_ENTRY(name, Args) name<T>,
template <class T>
constexpr Kernels<T> gathered{GLM_KERNELS(GLM_ENTRY)};

extern const Kernels<float> table_float;
extern const Kernels<bf16> table_bf16;
const Kernels<float> table_float = gathered<float>;
const Kernels<bf16> table_bf16 = gathered<bf16>;

}  // namespace glm::GLM_ISA
