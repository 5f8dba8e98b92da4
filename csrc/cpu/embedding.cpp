// Table lookup and the gradient of its table. Shapes: N ids, V vocabulary, D width.
#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

template <class T>
void embedding_forward(const EmbeddingForward<T>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n)
    memcpy(a.y + n * a.width, a.weight + a.ids[n] * a.row_stride, size_t(a.width) * sizeof(T));
}

// A table row's gradient: its occurrences in order of position, summed in float, rounded once.
// Every row is written by one thread, so the result is the same for any number of them.
template <class T>
void embedding_backward(const EmbeddingBackward<T>& a, int64_t begin, int64_t end) {
  for (int64_t v = begin; v < end; ++v) {
    T* out = a.dweight + v * a.width;
    const int64_t first = a.starts[v], last = a.starts[v + 1];
    sweep(a.width, [&](int64_t i, int64_t n) GLM_INLINED {
      vf s = all(0.0f);
      for (int64_t k = first; k < last; ++k) s += take(a.dy + a.order[k] * a.width + i, n);
      give(out + i, s * a.shrink, n);
    });
  }
}

GLM_INSTANTIATE(embedding_forward, EmbeddingForward)
GLM_INSTANTIATE(embedding_backward, EmbeddingBackward)

}  // namespace glm::GLM_ISA
