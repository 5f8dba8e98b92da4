// Products of up to 64 rows in half precision with a weight in int8 or int4, on tensor cores. A
// wave takes 16 outputs, a lane 16 bytes of each of two of them at a time; codes become pairs in
// half precision without rounding, and a group's scale multiplies sums in float. So reading the
// codes bounds the product whatever the number of rows. Shapes: as in quant.cu; TILES tiles of 8
// rows, V codes per load.
//
// A row's sums are formed in the same order whatever TILES is: a result does not depend on how many
// rows there are.
#include "device.h"
#include "tensor_cores.h"
#include "weights.h"

namespace glm::gpu {

#if !defined(__HIPCC__)

namespace {

constexpr int threads = 256, waves = threads / 32, tile_outputs = 16, tile_rows = 8;

template <int BITS>
constexpr int span = 4 * 128 / BITS;  // inputs that a wave takes at a time

// Codes 8 e to 8 e + 7 of a load as four pairs, exactly. Pairs for 4 bits: (1, 5), (0, 4), (3, 7),
// (2, 6); for 8 bits: (0, 2), (1, 3), (4, 6), (5, 7).
template <class T, int BITS>
__device__ inline void code_pairs(const Words& load, int e, uint32_t (&out)[4]) {
  // a code at the low end of a mantissa, its top bit flipped, counts from this power of two on
  constexpr uint32_t power = is_bf16<T> ? 0x43004300u : 0x64006400u;  // 128, 1024
  GLM_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (BITS == 4) {
      constexpr uint32_t offset = power | 0x00080008u;
      out[i] = minus<T>(chosen(load.x[e] >> 4 * i, 0x000f000fu, offset), offset);
    } else if constexpr (is_bf16<T>) {  // a byte does not fit into 7 bits: by way of float
      const uint32_t word = load.x[2 * e + i / 2];
      const int p = 8 * (i % 2);
      out[i] = highs(as_bits(code_at<8>(word, p)), as_bits(code_at<8>(word, p + 16)));
    } else {
      constexpr uint32_t offset = power | 0x00800080u;
      const uint32_t word = load.x[2 * e + i / 2] >> 8 * (i % 2);
      out[i] = minus<T>(chosen(word, 0x00ff00ffu, offset), offset);
    }
  }
}

// Eight values of x in the same pairs.
template <int BITS>
__device__ inline void value_pairs(const Words& x, uint32_t (&out)[4]) {
  if constexpr (BITS == 4) {
    out[0] = highs(x.x[0], x.x[2]), out[1] = lows(x.x[0], x.x[2]);
    out[2] = highs(x.x[1], x.x[3]), out[3] = lows(x.x[1], x.x[3]);
  } else {
    out[0] = lows(x.x[0], x.x[1]), out[1] = highs(x.x[0], x.x[1]);
    out[2] = lows(x.x[2], x.x[3]), out[3] = highs(x.x[2], x.x[3]);
  }
}

__device__ inline Words words_at(const void* p) { return *static_cast<const Words*>(p); }

// Each block computes 16 outputs; its waves take parts of the inputs in turn.
template <class T, int BITS, int TILES, int V>
__global__ void __launch_bounds__(threads, 1) tensor_rows(QuantizedRows<T, T> a) {
  GLM_SHARED(float, of_wave, waves * TILES * tile_rows * tile_outputs);
  const int lane = int(threadIdx.x) % 32, mine = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int64_t first = int64_t(blockIdx.x) * tile_outputs, last = a.w.outputs - 1;
  const int64_t low = first + g < last ? first + g : last;
  const int64_t high = first + g + 8 < last ? first + g + 8 : last;
  const unsigned width = unsigned(a.w.width), group = unsigned(a.w.width / a.w.groups);
  const int8_t* low_codes = a.w.codes + low * (a.w.width * BITS / 8) + t * 16;
  const int8_t* high_codes = a.w.codes + high * (a.w.width * BITS / 8) + t * 16;
  float sum[TILES][4] = {};
  for (unsigned i = mine * span<BITS>; i < width; i += waves * span<BITS>) {
    const Words of_low = words_at(low_codes + i * BITS / 8);
    const Words of_high = words_at(high_codes + i * BITS / 8);
    const float low_scale = scale_of(a.w, low * a.w.groups + i / group);
    const float high_scale = scale_of(a.w, high * a.w.groups + i / group);
    float part[TILES][4] = {};
    GLM_UNROLL
    for (int e = 0; e < V / 8; ++e) {
      uint32_t l[4], h[4];
      code_pairs<T, BITS>(of_low, e, l);
      code_pairs<T, BITS>(of_high, e, h);
      GLM_UNROLL
      for (int j = 0; j < TILES; ++j) {
        const int64_t row = tile_rows * j + g;
        Words x{};
        if (row < a.rows) x = words_at(a.x + row * a.w.width + i + t * V + e * 8);
        uint32_t b[4];
        value_pairs<BITS>(x, b);
        multiply<T>(part[j], {l[0], h[0], l[1], h[1]}, b[0], b[1]);
        multiply<T>(part[j], {l[2], h[2], l[3], h[3]}, b[2], b[3]);
      }
    }
    GLM_UNROLL
    for (int j = 0; j < TILES; ++j) {
      GLM_UNROLL
      for (int k = 0; k < 4; ++k)
        sum[j][k] = fmaf(k < 2 ? low_scale : high_scale, part[j][k], sum[j][k]);
    }
  }
  GLM_UNROLL
  for (int j = 0; j < TILES; ++j) {
    GLM_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int row = tile_rows * j + 2 * t + k % 2, output = g + k / 2 * 8;
      of_wave[(mine * TILES * tile_rows + row) * tile_outputs + output] = sum[j][k];
    }
  }
  __syncthreads();
  for (int n = int(threadIdx.x); n < TILES * tile_rows * tile_outputs; n += threads) {
    const int64_t output = first + n % tile_outputs, row = n / tile_outputs;
    if (output > last || row >= a.rows) continue;
    float total = a.bias ? to_float(a.bias[output]) : 0.0f;
    for (int w = 0; w < waves; ++w) total += of_wave[w * TILES * tile_rows * tile_outputs + n];
    from_float(total, a.y[row * a.w.outputs + output]);
  }
}

// Whether the current device has the tensor cores that tensor_cores.h takes.
bool has_tensor_cores() {
#if defined(GLM_FIBERS)
  return wave() == 32;
#else
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 8;
#endif
}

template <int TILES, class T, int BITS>
void run(const QuantizedRows<T, T>& a, Stream stream) {
  const dim3 grid(unsigned(divided_up(a.w.outputs, tile_outputs)));
  launch(tensor_rows<T, BITS, TILES, 128 / BITS>, grid, threads, stream, a);
}

template <class T, int BITS>
bool run(const QuantizedRows<T, T>& a, Stream stream) {
  if (a.w.width / a.w.groups % span<BITS> || !wide_codes(a.w, 16)) return false;
  if (a.rows <= tile_rows)
    run<1, T, BITS>(a, stream);
  else if (a.rows <= 2 * tile_rows)
    run<2, T, BITS>(a, stream);
  else if (a.rows <= 4 * tile_rows)
    run<4, T, BITS>(a, stream);
  else
    run<8, T, BITS>(a, stream);
  return true;
}

}  // namespace

#endif

template <class T>
bool quantized_tiles(const QuantizedRows<T, T>& a, Stream stream) {
#if defined(__HIPCC__)
  (void)a, (void)stream;
  return false;  // matrix cores of AMD hold tiles otherwise
#else
  if (!a.rows || !a.w.outputs) return true;
  if (a.rows > 8 * tile_rows || !fits_wide<T>(a.w.width, a.x) || !has_tensor_cores()) return false;
  return a.w.bits == 4 ? run<T, 4>(a, stream) : run<T, 8>(a, stream);
#endif
}

template bool quantized_tiles(const QuantizedRows<bf16, bf16>&, Stream);
template bool quantized_tiles(const QuantizedRows<f16, f16>&, Stream);

}  // namespace glm::gpu
