// Rotary embedding. Shapes: R = B * L rows (one position each), H heads, E head dim, G sections of
// P pairs. One block per row: its angles serve all its heads. Backward is the rotation by -angle.
#include "device.h"

namespace glm::gpu {

namespace {

// Neighbouring pairs are turned by a fma each in eights, a section's last ones without, as the CPU
// does (docs/exact.md): `fused` says which.
//
// V pairs at a time, A elements per load. A unit is V pairs, or one load of elements that pass
// unchanged.
template <bool interleaved, class T, int V>
__device__ inline void turn(const T* x, T* y, const float* cos, const float* sin, int64_t pairs,
                            float sign, bool fused) {
  constexpr int A = V == 1 ? 1 : interleaved ? 2 * V : V;
  float a[2 * V], c[V], s[V];
  take<V, 1>(cos, c);
  take<V, 1>(sin, s);
  if constexpr (interleaved) {
    take<2 * V, A>(x, a);
  } else {
    float b[V];
    take<V, A>(x, b);
    for (int j = 0; j < V; ++j) a[2 * j] = b[j];
    take<V, A>(x + pairs, b);
    for (int j = 0; j < V; ++j) a[2 * j + 1] = b[j];
  }
  for (int j = 0; j < V; ++j) {
    const float p = a[2 * j], q = a[2 * j + 1], t = s[j] * sign;
    a[2 * j] = interleaved && fused ? fmaf(p, c[j], -(q * t)) : p * c[j] - q * t;
    a[2 * j + 1] = !interleaved || fused ? fmaf(q, c[j], p * t) : q * c[j] + p * t;
  }
  if constexpr (interleaved) {
    give<2 * V, A>(y, a);
  } else {
    float b[V];
    for (int j = 0; j < V; ++j) b[j] = a[2 * j];
    give<V, A>(y, b);
    for (int j = 0; j < V; ++j) b[j] = a[2 * j + 1];
    give<V, A>(y + pairs, b);
  }
}

template <bool interleaved, class T, int V>
__global__ void turn_rows(Rope<T> a) {
  constexpr int passing = V == 1 ? 1 : interleaved ? 2 * V : V;
  const int64_t row = blockIdx.x, b = row / a.length, l = row % a.length;
  const int pairs = int(a.sections * a.pairs), turned = pairs / V;
  const int units = turned + int(a.width - 2 * pairs) / passing;
  const int64_t angles = (a.shared ? l : row) * pairs;
  for (int u = int(threadIdx.x); u < int(a.heads) * units; u += int(blockDim.x)) {
    const int h = u / units, k = u % units;
    const T* x = a.x + b * a.stride_b + l * a.stride_l + h * a.stride_h;
    T* y = a.y + (row * a.heads + h) * a.width;
    if (k >= turned) {
      using Rest = Pack<T, passing>;
      const int at = 2 * pairs + (k - turned) * passing;
      *reinterpret_cast<Rest*>(y + at) = *reinterpret_cast<const Rest*>(x + at);
      continue;
    }
    const int pair = k * V, section = pair / int(a.pairs), p = pair % int(a.pairs);
    const int64_t at = 2 * section * a.pairs + (interleaved ? 2 * p : p);
    turn<interleaved, T, V>(x + at, y + at, a.cos + angles + pair, a.sin + angles + pair, a.pairs,
                            a.sign, p / 8 < int(a.pairs) / 8);
  }
}

template <bool interleaved, class T>
void run(const Turn<T>& turn, Stream stream) {
  constexpr int V = interleaved ? wide<T> / 2 : wide<T>;
  const Rope<T>& a = turn.of;
  const dim3 grid{unsigned(turn.batch * a.length)};
  const bool whole_strides =
      a.stride_b % wide<T> == 0 && a.stride_l % wide<T> == 0 && a.stride_h % wide<T> == 0;
  if (a.pairs % V == 0 && whole_strides && fits_wide<T>(a.width, a.x, a.y))
    launch(turn_rows<interleaved, T, V>, grid, threads_for(a.heads * a.width / (2 * V)), stream, a);
  else
    launch(turn_rows<interleaved, T, 1>, grid, threads_for(a.heads * a.width / 2), stream, a);
}

}  // namespace

template <class T>
void rope_turn(const Turn<T>& a, Stream stream) {
  if (!a.batch || !a.of.length || !a.of.heads) return;
  a.of.interleaved ? run<true>(a, stream) : run<false>(a, stream);
}

GLM_GPU_INSTANTIATE(rope_turn, Turn)

}  // namespace glm::gpu
