// The functions of functions.h on vectors that are several of the machine's.
#pragma once

#include "vec_wide.h"

namespace glm::GLM_ISA::narrow {

typedef nf vf;
typedef ni vi;
GLM_INLINE vf all(float x) { return native(x); }
GLM_INLINE vf fma(vf a, vf b, vf c) { return glm::GLM_ISA::fma(a, b, c); }
GLM_INLINE vf fma(vf a, vf b, float c) { return fma(a, b, all(c)); }
GLM_INLINE vf fma(vf a, float b, vf c) { return fma(a, all(b), c); }
GLM_INLINE vf fma(vf a, float b, float c) { return fma(a, all(b), all(c)); }

}  // namespace glm::GLM_ISA::narrow

#undef GLM_SPACE
#define GLM_SPACE GLM_ISA::narrow
#include "functions.h"
#undef GLM_SPACE
#define GLM_SPACE GLM_ISA

namespace glm::GLM_ISA {

using narrow::exact_log;

#define GLM_BY_PARTS(name)                                                      \
  GLM_INLINE vf name(vf x) {                                                    \
    return by_parts(x, [](nf part) GLM_INLINED { return narrow::name(part); }); \
  }
GLM_BY_PARTS(exp)
GLM_BY_PARTS(without_denormals)
GLM_BY_PARTS(sigmoid)

struct Slope {
  vf y, dy;
};

template <class Function>
struct ByParts {
  GLM_INLINE vf value(vf x) {
    return by_parts(x, [](nf part) GLM_INLINED { return Function::value(part); });
  }
  GLM_INLINE Slope slope(vf x) {
    const Parts p = bits_as<Parts>(x);
    Parts y, dy;
    for (int i = 0; i < W / NATIVE; ++i) {
      const narrow::Slope s = Function::slope(p.part[i]);
      y.part[i] = s.y, dy.part[i] = s.dy;
    }
    return {bits_as<vf>(y), bits_as<vf>(dy)};
  }
};
using TanhGelu = ByParts<narrow::TanhGelu>;
using ErfGelu = ByParts<narrow::ErfGelu>;
using Silu = ByParts<narrow::Silu>;

}  // namespace glm::GLM_ISA
