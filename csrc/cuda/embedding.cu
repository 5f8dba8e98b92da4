// Table lookup and the gradient of its table. Shapes: N ids, V vocabulary, D width.
#include "device.h"

namespace glm::gpu {

namespace {

template <class T, int V>
__global__ void gather(Lookup<T> a) {
  const int64_t n = blockIdx.x, id = a.table.ids[n], width = a.table.width;
  if (id < 0 || id >= a.vocab) return out_of_range("embedding: id", id, a.vocab);
  const T* row = a.table.weight + id * a.table.row_stride;
  for (int64_t i = int64_t(threadIdx.x) * V; i < width; i += int64_t(blockDim.x) * V)
    *reinterpret_cast<Pack<T, V>*>(a.table.y + n * width + i) =
        *reinterpret_cast<const Pack<T, V>*>(row + i);
}

// The gradient of a table row: its occurrences are summed in float in order of position, and
// rounded once. One block per row, no atomics.
template <class T, int V>
__global__ void scatter(EmbeddingBackward<T> a) {
  const int64_t v = blockIdx.x, first = a.starts[v], last = a.starts[v + 1];
  for (int64_t i = int64_t(threadIdx.x) * V; i < a.width; i += int64_t(blockDim.x) * V) {
    float sum[V] = {}, d[V];
    for (int64_t k = first; k < last; ++k) {
      take(a.dy + a.order[k] * a.width + i, d);
      for (int j = 0; j < V; ++j) sum[j] += d[j];
    }
    for (int j = 0; j < V; ++j) sum[j] *= a.shrink;
    give(a.dweight + v * a.width + i, sum);
  }
}

}  // namespace

template <class T>
void embedding_forward(const Lookup<T>& a, Stream stream) {
  const EmbeddingForward<T>& t = a.table;
  if (!a.count || !t.width) return;
  const dim3 grid{unsigned(a.count)};
  if (fits_wide<T>(t.width, t.weight, t.y) && t.row_stride % wide<T> == 0)
    launch(gather<T, wide<T>>, grid, threads_for(t.width / wide<T>), stream, a);
  else
    launch(gather<T, 1>, grid, threads_for(t.width), stream, a);
}

template <class T>
void embedding_backward(const TableGradient<T>& a, Stream stream) {
  if (!a.vocab || !a.of.width) return;
  const dim3 grid{unsigned(a.vocab)};
  if (fits_wide<T>(a.of.width, a.of.dy, a.of.dweight))
    launch(scatter<T, wide<T>>, grid, threads_for(a.of.width / wide<T>), stream, a.of);
  else
    launch(scatter<T, 1>, grid, threads_for(a.of.width), stream, a.of);
}

GLM_GPU_INSTANTIATE(embedding_forward, Lookup)
GLM_GPU_INSTANTIATE(embedding_backward, TableGradient)

}  // namespace glm::gpu
