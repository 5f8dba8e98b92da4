// Products with an int8 or int4 weight in a checkpoint's own layout, and conversion of the weight
// to float32 for products with many rows. Shapes: N rows of x, D inputs, F outputs, G groups of D /
// G inputs that share a scale. 4 bits: two codes a byte, the even element in the high nibble.
// Reading the weight takes most of a decode step: every block reads one output's codes once, for
// `rows_at_once` rows of x, which are few and stay in the cache.
#include "device.h"

namespace glm::gpu {

namespace {

constexpr int rows_at_once = 4;
constexpr int rounding_block = 32;  // inputs that share a step where activations become int8

__device__ inline float scale_of(const Codes& w, int64_t at) {
  return w.scale16 ? to_float(w.scale16[at]) : w.scale32[at];
}

// Returns V weights of row f from element i on, times their scale; V divides a group. Their V *
// BITS / 8 bytes are one load.
template <int BITS, int V>
__device__ inline void weights(const Codes& w, int64_t f, int64_t i, float (&out)[V]) {
  constexpr int bytes = V * BITS / 8;
  const int64_t at = f * (w.width * BITS / 8) + i * BITS / 8;
  const Pack<uint8_t, bytes> code = *reinterpret_cast<const Pack<uint8_t, bytes>*>(w.codes + at);
  const float scale = scale_of(w, f * w.groups + i / (w.width / w.groups));
  for (int j = 0; j < V; ++j) {
    const uint8_t byte = code.x[j * BITS / 8];
    const uint8_t high = BITS == 4 && j % 2 ? uint8_t(byte << 4) : byte;
    out[j] = float(BITS == 4 ? int8_t(high) >> 4 : int8_t(byte)) * scale;
  }
}

// Each block computes one output of a few rows.
template <class X, class T, int BITS, int V>
__global__ void __launch_bounds__(max_threads, 1) few_rows(QuantizedRows<X, T> a) {
  constexpr int A = V < wide<X> ? 1 : wide<X>;
  const int64_t f = blockIdx.x, first = int64_t(blockIdx.y) * rows_at_once;
  const int rows = int(a.rows - first < rows_at_once ? a.rows - first : rows_at_once);
  float sum[rows_at_once] = {};
  for (int64_t i = int64_t(threadIdx.x) * V; i < a.w.width; i += int64_t(blockDim.x) * V) {
    float w[V], x[V];
    weights<BITS, V>(a.w, f, i, w);
    for (int r = 0; r < rows_at_once; ++r) {  // all of them: the sums stay in registers
      if (r >= rows) break;
      take<V, A>(a.x + (first + r) * a.w.width + i, x);
      for (int j = 0; j < V; ++j) sum[r] = fmaf(x[j], w[j], sum[r]);
    }
  }
  for (int r = 0; r < rows_at_once; ++r) {
    if (r >= rows) break;
    const float total = block_sum(sum[r]);
    if (threadIdx.x != 0) continue;
    from_float(total + (a.bias ? to_float(a.bias[f]) : 0.0f), a.y[(first + r) * a.w.outputs + f]);
  }
}

template <int BITS, int V>
__global__ void as_float(Codes w, float* out) {
  const int64_t f = blockIdx.x;
  for (int64_t i = int64_t(threadIdx.x) * V; i < w.width; i += int64_t(blockDim.x) * V) {
    float x[V];
    weights<BITS, V>(w, f, i, x);
    give<V, 1>(out + f * w.width + i, x);
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

// How many weights a thread converts at a time: 16 bytes where rows allow it, else one byte.
bool wide_codes(const Codes& w) {
  const int64_t row_bytes = w.width * w.bits / 8, step = 128 / w.bits;
  return row_bytes % 16 == 0 && w.width / w.groups % step == 0 &&
         reinterpret_cast<uintptr_t>(w.codes) % 16 == 0;
}

template <class X, class T, int BITS>
void run(const QuantizedRows<X, T>& a, Stream stream) {
  constexpr int V = 128 / BITS, least = 8 / BITS;
  const dim3 grid(unsigned(a.w.outputs), unsigned(divided_up(a.rows, rows_at_once)));
  if (wide_codes(a.w) && fits_wide<X>(a.w.width, a.x))
    launch(few_rows<X, T, BITS, V>, grid, threads_for(a.w.width / V), stream, a);
  else
    launch(few_rows<X, T, BITS, least>, grid, threads_for(a.w.width / least), stream, a);
}

template <int BITS>
void run(const Codes& w, float* out, Stream stream) {
  constexpr int V = 128 / BITS, least = 8 / BITS;
  const dim3 grid(unsigned(w.outputs));
  if (wide_codes(w))
    launch(as_float<BITS, V>, grid, threads_for(w.width / V), stream, w, out);
  else
    launch(as_float<BITS, least>, grid, threads_for(w.width / least), stream, w, out);
}

}  // namespace

template <class X, class T>
void quantized_rows(const QuantizedRows<X, T>& a, Stream stream) {
  if (!a.rows || !a.w.outputs) return;
  a.w.bits == 4 ? run<X, T, 4>(a, stream) : run<X, T, 8>(a, stream);
}

void dequantize(const Codes& w, float* out, Stream stream) {
  if (!w.outputs || !w.width) return;
  w.bits == 4 ? run<4>(w, out, stream) : run<8>(w, out, stream);
}

template <class T>
void round_activations(const T* x, float* out, int64_t rows, int64_t width, Stream stream) {
  const int64_t blocks = rows * divided_up(width, rounding_block);
  if (blocks)
    launch(round_blocks<T>, dim3(unsigned(divided_up(blocks, 64))), 64, stream, x, out, rows,
           width);
}

template void quantized_rows(const QuantizedRows<float, float>&, Stream);
template void quantized_rows(const QuantizedRows<bf16, bf16>&, Stream);
template void quantized_rows(const QuantizedRows<f16, f16>&, Stream);
template void quantized_rows(const QuantizedRows<float, bf16>&, Stream);
template void quantized_rows(const QuantizedRows<float, f16>&, Stream);
template void round_activations(const float*, float*, int64_t, int64_t, Stream);
template void round_activations(const bf16*, float*, int64_t, int64_t, Stream);
template void round_activations(const f16*, float*, int64_t, int64_t, Stream);

}  // namespace glm::gpu
