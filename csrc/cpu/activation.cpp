// GELU (tanh form), GeGLU (erf form, gate second) and SwiGLU (gate first). Shapes: N rows, F inner
// width; the gated kinds read rows of 2F. Backward keeps only the input and computes its factors
// again, which costs less than reading them from memory. All kinds use one fast exponential.
#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

// y = gate(x[gate_at ...]) * x[other_at ...] for rows [begin, end).
template <class Gate, class T>
void gated_forward(const Activation<T>& a, int64_t begin, int64_t end, bool gate_first) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = a.x + row * 2 * a.width;
    const T *gate = gate_first ? x : x + a.width, *other = gate_first ? x + a.width : x;
    T* y = a.y + row * a.width;
    sweep(a.width, [&](int64_t i, int64_t n) GLM_INLINED {
      give(y + i, Gate::value(take(gate + i, n)) * take(other + i, n), n);
    });
  }
}

template <class Gate, class T>
void gated_backward(const Activation<T>& a, int64_t begin, int64_t end, bool gate_first) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * 2 * a.width, half = a.width;
    const int64_t gate = at + (gate_first ? 0 : half), other = at + (gate_first ? half : 0);
    const T* dy = a.dy + row * a.width;
    sweep(a.width, [&](int64_t i, int64_t n) GLM_INLINED {
      vf d = take(dy + i, n), o = take(a.x + other + i, n);
      Slope g = Gate::slope(take(a.x + gate + i, n));
      give(a.y + gate + i, d * o * g.dy, n);
      give(a.y + other + i, d * g.y, n);
    });
  }
}

}  // namespace

template <class T>
void gelu_forward(const Activation<T>& a, int64_t begin, int64_t end) {
  sweep((end - begin) * a.width, [&](int64_t i, int64_t n) GLM_INLINED {
    const int64_t at = begin * a.width + i;
    give(a.y + at, TanhGelu::value(take(a.x + at, n)), n);
  });
}

template <class T>
void gelu_backward(const Activation<T>& a, int64_t begin, int64_t end) {
  sweep((end - begin) * a.width, [&](int64_t i, int64_t n) GLM_INLINED {
    const int64_t at = begin * a.width + i;
    give(a.y + at, take(a.dy + at, n) * TanhGelu::slope(take(a.x + at, n)).dy, n);
  });
}

template <class T>
void geglu_forward(const Activation<T>& a, int64_t begin, int64_t end) {
  gated_forward<ErfGelu>(a, begin, end, false);
}

template <class T>
void geglu_backward(const Activation<T>& a, int64_t begin, int64_t end) {
  gated_backward<ErfGelu>(a, begin, end, false);
}

template <class T>
void swiglu_forward(const Activation<T>& a, int64_t begin, int64_t end) {
  gated_forward<Silu>(a, begin, end, true);
}

template <class T>
void swiglu_backward(const Activation<T>& a, int64_t begin, int64_t end) {
  gated_backward<Silu>(a, begin, end, true);
}

GLM_INSTANTIATE(gelu_forward, Activation)
GLM_INSTANTIATE(gelu_backward, Activation)
GLM_INSTANTIATE(geglu_forward, Activation)
GLM_INSTANTIATE(geglu_backward, Activation)
GLM_INSTANTIATE(swiglu_forward, Activation)
GLM_INSTANTIATE(swiglu_backward, Activation)

}  // namespace glm::GLM_ISA
