// The table of one instruction set's kernels, fast or exact; compiled once for each, like the
// kernels. The exact table has some kernels of the fast one, GLM_FAST.
#include "kernels.h"

namespace glm {

#if defined(GLM_EXACT)
namespace GLM_FAST {
GLM_CODE_PRODUCTS(GLM_DECLARE)
GLM_CODE_KERNELS(GLM_DECLARE)
}  // namespace GLM_FAST
#define GLM_CODE_ENTRY(name, Args) GLM_FAST::name<T>,
#define GLM_EXACT_ENTRY(name, Args) name<T>,
#else
#define GLM_CODE_ENTRY(name, Args) name<T>,
#define GLM_EXACT_ENTRY(name, Args) nullptr,
#endif
#define GLM_ENTRY(name, Args) name<T>,
#if defined(__AVX512F__)
#define GLM_PRODUCT_ENTRY GLM_CODE_ENTRY
#else
#define GLM_PRODUCT_ENTRY GLM_ENTRY
#endif

namespace GLM_ISA {

template <class T>
constexpr Kernels<T> gathered{GLM_LANE_KERNELS(GLM_ENTRY) GLM_CODE_PRODUCTS(
    GLM_PRODUCT_ENTRY) GLM_CODE_KERNELS(GLM_CODE_ENTRY) GLM_EXACT_KERNELS(GLM_EXACT_ENTRY)};

extern const Kernels<float> table_float;
extern const Kernels<bf16> table_bf16;
const Kernels<float> table_float = gathered<float>;
const Kernels<bf16> table_bf16 = gathered<bf16>;

}  // namespace GLM_ISA
}  // namespace glm
