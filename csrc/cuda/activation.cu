// GELU (tanh form), GeGLU (erf form, gate second) and SwiGLU (gate first). Shapes: N rows, F inner
// width; the gated kinds read rows of 2F. Bound by memory: one pass, nothing kept but the input.
#include "exact.h"

namespace glm::gpu {

namespace {

// A function's value and derivative at x.
struct Slope {
  float y, dy;
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// x sigmoid(2z) with z = sqrt(2/pi) (x + 0.044715 x^3): the same as x/2 (1 + tanh z).
struct TanhGelu {
  static constexpr float c = 0x1.988454p-1f, cubic = 0.044715f;
  __device__ static Slope slope(float x) {
    const float s = sigmoid(x * fmaf(x * x, 2 * c * cubic, 2 * c));
    const float dz = fmaf(x * x, 6 * c * cubic, 2 * c);
    return {x * s, fmaf(x * dz, s * (1.0f - s), s)};
  }
};

// Uses erfc, which keeps its digits where 1 + erf cancels.
struct ErfGelu {
  __device__ static Slope slope(float x) {
    const float cdf = 0.5f * erfcf(x * -0x1.6a09e6p-1f);
    return {x * cdf, fmaf(x, expf(-0.5f * x * x) * 0x1.988454p-2f, cdf)};
  }
};

struct Silu {
  __device__ static Slope slope(float x) {
    const float s = sigmoid(x);
    return {x * s, s * fmaf(x, 1.0f - s, 1.0f)};
  }
};

// Rows are a grid's second dimension, which has at most 65535.
template <class Gate, class T, int V>
__global__ void alone(Activation<T> a) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i >= a.rows * a.width) return;
  float x[V], d[V];
  take(a.x + i, x);
  if (a.dy) take(a.dy + i, d);
  for (int j = 0; j < V; ++j) {
    const auto s = Gate::slope(x[j]);
    x[j] = a.dy ? d[j] * s.dy : s.y;
  }
  give(a.y + i, x);
}

// y = gate(x[gate ...]) * x[other ...], and both gradients.
template <class Gate, bool gate_first, class T, int V>
__global__ void gated(Activation<T> a) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i >= a.width) return;
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const int64_t at = row * 2 * a.width + i;
    const int64_t gate = at + (gate_first ? 0 : a.width), other = at + (gate_first ? a.width : 0);
    float g[V], o[V], d[V];
    take(a.x + gate, g);
    take(a.x + other, o);
    if (a.dy) take(a.dy + row * a.width + i, d);
    for (int j = 0; j < V; ++j) {
      const auto s = Gate::slope(g[j]);
      g[j] = a.dy ? d[j] * o[j] * s.dy : s.y * o[j];
      o[j] = a.dy ? d[j] * s.y : 0.0f;
    }
    give(a.y + (a.dy ? gate : row * a.width + i), g);
    if (a.dy) give(a.y + other, o);
  }
}

// The functions as the platform computes them, and in the CPU's own arithmetic.
struct Fast {
  using Tanh = TanhGelu;
  using Erf = ErfGelu;
  using Sigmoid = Silu;
};
struct Exact {
  using Tanh = exact::TanhGelu;
  using Erf = exact::ErfGelu;
  using Sigmoid = exact::Silu;
};

template <class Functions, class T, int V>
void run(const Activation<T>& a, Kind kind, Stream stream) {
  const int64_t size = (kind == Kind::gelu ? a.rows * a.width : a.width) / V;
  const int threads = threads_for(size < 256 ? size : 256);
  const dim3 grid(unsigned(divided_up(size, threads)),
                  kind == Kind::gelu ? 1u : unsigned(a.rows < 65535 ? a.rows : 65535));
  if (kind == Kind::gelu)
    launch(alone<typename Functions::Tanh, T, V>, grid, threads, stream, a);
  else if (kind == Kind::geglu)
    launch(gated<typename Functions::Erf, false, T, V>, grid, threads, stream, a);
  else
    launch(gated<typename Functions::Sigmoid, true, T, V>, grid, threads, stream, a);
}

template <class Functions, class T>
void run(const Activation<T>& a, Kind kind, Stream stream) {
  if (!a.rows || !a.width) return;
  const int64_t width = kind == Kind::gelu ? a.rows * a.width : a.width;
  if (fits_wide<T>(width, a.x, a.dy, a.y))
    run<Functions, T, wide<T>>(a, kind, stream);
  else
    run<Functions, T, 1>(a, kind, stream);
}

}  // namespace

template <class T>
void activation(const Activation<T>& a, Kind kind, Stream stream) {
  run<Fast>(a, kind, stream);
}

template <class T>
void exact_activation(const Activation<T>& a, Kind kind, Stream stream) {
  run<Exact>(a, kind, stream);
}

template void activation<float>(const Activation<float>&, Kind, Stream);
template void activation<bf16>(const Activation<bf16>&, Kind, Stream);
template void activation<f16>(const Activation<f16>&, Kind, Stream);
template void exact_activation<float>(const Activation<float>&, Kind, Stream);
template void exact_activation<bf16>(const Activation<bf16>&, Kind, Stream);

}  // namespace glm::gpu
