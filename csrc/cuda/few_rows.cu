// Products of a few rows with a weight in int8, int4 or half precision: a decode step's. Reading
// the weight takes most of the time, so a thread loads 16 bytes of each of `outputs_at_once`
// outputs before it uses any, and every weight serves all ROWS rows of x. The scale of a group
// multiplies a sum, not its weights. Shapes: as in quant.cu; V weights per load.
//
// A row's sums are formed in the same order whatever ROWS is: a result does not depend on how many
// rows there are.
#include "device.h"
#include "weights.h"

namespace glm::gpu {

namespace {

constexpr int outputs_at_once = 4, most_threads = 256, most_rows = 8;
constexpr int eight = 8;  // weights that are multiplied at a time: 16 bytes of x in half precision

// Weights 8 e to 8 e + 7 of a load, without their scale.
template <class T, int BITS>
__device__ inline void eight_weights(const Words& load, int e, float (&out)[eight]) {
  GLM_UNROLL
  for (int j = 0; j < eight; ++j) {
    if constexpr (BITS == 16) {
      T value;
      value.bits = uint16_t(load.x[j / 2] >> 16 * (j % 2));
      out[j] = to_float(value);
    } else if constexpr (BITS == 8) {
      out[j] = code_at<8>(load.x[2 * e + j / 4], 8 * (j % 4));
    } else {  // the even element is in the high nibble
      out[j] = code_at<4>(load.x[e], 4 * (j ^ 1));
    }
  }
}

// Sums each of C values over the lanes of a wave, from the lane's bit `mask` on; lane l gets the
// total of value l % C. Two lanes exchange halves of what they hold: some C exchanges, instead of C
// for every halving of the wave.
template <int C>
__device__ inline float wave_totals(const float (&x)[C], int mask = 1) {
  if constexpr (C == 1) {
    float total = x[0];
    for (; mask < wave(); mask *= 2) total += swapped(total, mask);
    return total;
  } else {
    const bool odd = int(threadIdx.x) & mask;
    float half[C / 2];
    GLM_UNROLL
    for (int i = 0; i < C / 2; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      half[i] = (odd ? b : a) + swapped(odd ? a : b, mask);
    }
    return wave_totals(half, 2 * mask);
  }
}

// Each block computes `outputs_at_once` outputs of ROWS rows.
template <class X, class T, int BITS, int ROWS, int V>
__global__ void __launch_bounds__(most_threads) few_rows(QuantizedRows<X, T> a) {
  constexpr int R = outputs_at_once;
  GLM_SHARED(float, of_wave, most_threads / 32 * R * most_rows);
  const int64_t first = int64_t(blockIdx.x) * R, first_row = int64_t(blockIdx.y) * ROWS;
  const unsigned width = unsigned(a.w.width), group = unsigned(a.w.width / a.w.groups);
  const int64_t row_bytes = a.w.width * BITS / 8;
  int64_t f[R];
  GLM_UNROLL
  for (int r = 0; r < R; ++r) f[r] = first + r < a.w.outputs ? first + r : a.w.outputs - 1;
  float sum[ROWS * R] = {};
  for (unsigned i = threadIdx.x * V; i < width; i += blockDim.x * V) {
    Words load[R];
    float scale[R], part[ROWS * R] = {};
    GLM_UNROLL
    for (int r = 0; r < R; ++r)
      load[r] = *reinterpret_cast<const Words*>(a.w.codes + f[r] * row_bytes + i * BITS / 8);
    GLM_UNROLL
    for (int r = 0; r < R; ++r)
      scale[r] = BITS == 16 ? 1.0f : scale_of(a.w, f[r] * a.w.groups + i / group);
    GLM_UNROLL
    for (int e = 0; e < V / eight; ++e) {
      float w[R][eight];
      GLM_UNROLL
      for (int r = 0; r < R; ++r) eight_weights<T, BITS>(load[r], e, w[r]);
      GLM_UNROLL
      for (int n = 0; n < ROWS; ++n) {
        const int64_t row = first_row + n < a.rows ? first_row + n : a.rows - 1;
        float x[eight];
        take<eight>(a.x + row * a.w.width + i + e * eight, x);
        GLM_UNROLL
        for (int r = 0; r < R; ++r) GLM_UNROLL
        for (int j = 0; j < eight; ++j) part[n * R + r] = fmaf(x[j], w[r][j], part[n * R + r]);
      }
    }
    GLM_UNROLL
    for (int k = 0; k < ROWS * R; ++k) sum[k] = fmaf(scale[k % R], part[k], sum[k]);
  }
  const int lane = int(threadIdx.x) % wave(), mine = int(threadIdx.x) / wave();
  const float of_lane = wave_totals(sum);
  if (lane < ROWS * R) of_wave[mine * ROWS * R + lane] = of_lane;
  __syncthreads();
  const int k = int(threadIdx.x);
  if (k >= ROWS * R || first + k % R >= a.w.outputs || first_row + k / R >= a.rows) return;
  float total = 0.0f;
  for (int n = 0; n < int(blockDim.x) / wave(); ++n) total += of_wave[n * ROWS * R + k];
  const int64_t output = first + k % R;
  from_float(total + (a.bias ? to_float(a.bias[output]) : 0.0f),
             a.y[(first_row + k / R) * a.w.outputs + output]);
}

// For widths and groups that 16 bytes do not divide: a byte at a time, one output per block.
template <int BITS, class X, class T>
__global__ void __launch_bounds__(max_threads, 1) narrow_rows(QuantizedRows<X, T> a) {
  constexpr int V = 8 / BITS;
  const int64_t f = blockIdx.x, row = blockIdx.y;
  float sum = 0.0f;
  for (int64_t i = int64_t(threadIdx.x) * V; i < a.w.width; i += int64_t(blockDim.x) * V) {
    float w[V], x[V];
    weights<BITS, V>(a.w, f, i, w);
    take<V, 1>(a.x + row * a.w.width + i, x);
    for (int j = 0; j < V; ++j) sum = fmaf(x[j], w[j], sum);
  }
  const float total = block_sum(sum);
  if (threadIdx.x == 0)
    from_float(total + (a.bias ? to_float(a.bias[f]) : 0.0f), a.y[row * a.w.outputs + f]);
}

// Threads for a row of `loads` loads: few rounds, and the last of them nearly full.
int threads_of_loads(int64_t loads) {
  return threads_for(divided_up(loads, divided_up(loads, most_threads)));
}

template <int ROWS, class X, class T, int BITS>
void run(const QuantizedRows<X, T>& a, Stream stream) {
  constexpr int V = 128 / BITS;
  const dim3 grid(unsigned(divided_up(a.w.outputs, outputs_at_once)),
                  unsigned(divided_up(a.rows, ROWS)));
  launch(few_rows<X, T, BITS, ROWS, V>, grid, threads_of_loads(a.w.width / V), stream, a);
}

template <class X, class T, int BITS>
void wide_rows(const QuantizedRows<X, T>& a, Stream stream) {
  if (a.rows == 1) return run<1, X, T, BITS>(a, stream);
  if (a.rows == 2) return run<2, X, T, BITS>(a, stream);
  if (a.rows <= 4) return run<4, X, T, BITS>(a, stream);
  run<most_rows, X, T, BITS>(a, stream);
}

template <class X, class T, int BITS>
void run(const QuantizedRows<X, T>& a, Stream stream) {
  if (wide_codes(a.w, 16) && fits_wide<X>(a.w.width, a.x)) {
    wide_rows<X, T, BITS>(a, stream);
  } else {
    const dim3 grid(unsigned(a.w.outputs), unsigned(a.rows));
    launch(narrow_rows<BITS, X, T>, grid, threads_for(a.w.width * BITS / 8), stream, a);
  }
}

}  // namespace

template <class X, class T>
void quantized_rows(const QuantizedRows<X, T>& a, Stream stream) {
  if (!a.rows || !a.w.outputs) return;
  a.w.bits == 4 ? run<X, T, 4>(a, stream) : run<X, T, 8>(a, stream);
}

template <class T>
bool half_rows(const QuantizedRows<T, T>& a, Stream stream) {
  if (!a.rows || !a.w.outputs) return true;
  if (!wide_codes(a.w, 16) || !fits_wide<T>(a.w.width, a.x)) return false;
  wide_rows<T, T, 16>(a, stream);
  return true;
}

template void quantized_rows(const QuantizedRows<float, float>&, Stream);
template void quantized_rows(const QuantizedRows<bf16, bf16>&, Stream);
template void quantized_rows(const QuantizedRows<f16, f16>&, Stream);
template void quantized_rows(const QuantizedRows<float, bf16>&, Stream);
template void quantized_rows(const QuantizedRows<float, f16>&, Stream);
template bool half_rows(const QuantizedRows<bf16, bf16>&, Stream);
template bool half_rows(const QuantizedRows<f16, f16>&, Stream);

}  // namespace glm::gpu
