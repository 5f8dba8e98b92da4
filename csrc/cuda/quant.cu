// Conversion of quantised weights to float or half precision, for products with many rows, and
// rounding of activations. Shapes: D inputs, F outputs, G groups of D / G inputs that share a
// scale.
#include "device.h"
#include "weights.h"

namespace glm::gpu {

namespace {

constexpr int rounding_block = 32;  // inputs that share a step where activations become int8

// Each block converts one row: V weights a thread, which in half precision are 16 bytes to store.
template <class T, int BITS, int V>
__global__ void as_values(Codes w, T* out) {
  const int64_t f = blockIdx.x;
  for (int64_t i = int64_t(threadIdx.x) * V; i < w.width; i += int64_t(blockDim.x) * V) {
    float x[V];
    weights<BITS, V>(w, f, i, x);
    give<V>(out + f * w.width + i, x);
  }
}

// x as int8 codes times a step, max|x| / 127 of every block of 32 inputs; one thread per block.
template <class T>
__global__ void round_blocks(const T* x, float* out, int64_t rows, int64_t width) {
  const int64_t blocks = (width + rounding_block - 1) / rounding_block;
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= rows * blocks) return;
  const int64_t row = n / blocks, begin = n % blocks * rounding_block;
  const int64_t end = begin + rounding_block < width ? begin + rounding_block : width;
  float top = 0.0f;
  bool number = true;
  for (int64_t i = begin; i < end; ++i) {
    const float v = fabsf(to_float(x[row * width + i]));
    number = number && v == v;
    top = fmaxf(top, v);
  }
  const float step = (number ? top : NAN) / 127.0f;
  for (int64_t i = begin; i < end; ++i) {
    const float code = step > 0.0f ? rintf(to_float(x[row * width + i]) / step) : 0.0f;
    out[row * width + i] = fminf(fmaxf(code, -127.0f), 127.0f) * step;
  }
}

template <class T, int BITS>
void run(const Codes& w, T* out, Stream stream) {
  constexpr int V = 8, least = 8 / BITS;
  const dim3 grid(unsigned(w.outputs));
  if (wide_codes(w, BITS) && fits_wide<T>(w.width, out))
    launch(as_values<T, BITS, V>, grid, threads_for(w.width / V), stream, w, out);
  else
    launch(as_values<T, BITS, least>, grid, threads_for(w.width / least), stream, w, out);
}

}  // namespace

template <class T>
void dequantize(const Codes& w, T* out, Stream stream) {
  if (!w.outputs || !w.width) return;
  w.bits == 4 ? run<T, 4>(w, out, stream) : run<T, 8>(w, out, stream);
}

template <class T>
void round_activations(const T* x, float* out, int64_t rows, int64_t width, Stream stream) {
  const int64_t blocks = rows * divided_up(width, rounding_block);
  if (blocks)
    launch(round_blocks<T>, dim3(unsigned(divided_up(blocks, 64))), 64, stream, x, out, rows,
           width);
}

template void dequantize(const Codes&, float*, Stream);
template void dequantize(const Codes&, bf16*, Stream);
template void dequantize(const Codes&, f16*, Stream);
template void round_activations(const float*, float*, int64_t, int64_t, Stream);
template void round_activations(const bf16*, float*, int64_t, int64_t, Stream);
template void round_activations(const f16*, float*, int64_t, int64_t, Stream);

}  // namespace glm::gpu
