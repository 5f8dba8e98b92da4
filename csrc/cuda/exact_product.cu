// Products in float32 whose sums have an order that depends on the depth alone (docs/exact.md): of
// rows and columns of any strides, float or bf16, without tensor cores. A block computes a square
// tile of y; a thread holds one lane of R x R sums, whose rows and columns lie `side` apart so that
// the threads of a wave read shared memory side by side.
#include "exact.h"

namespace glm::gpu {

namespace {

constexpr int product_threads = 256, depth_at_once = 32;

template <int LANES>
struct Tile {
  static constexpr int side = LANES == 1 ? 16 : 4;  // threads of a lane are side x side
  static constexpr int R = LANES == 1 ? 4 : 8;      // a side of a thread's sums
  static constexpr int size = side * R;
  static constexpr int row = depth_at_once + (LANES == 1 ? 1 : 16);  // without bank conflicts
};

// Copies `count` rows of x, from depth 0 to `depth`, into shared memory; zeros where there is none.
template <class Tile, class T>
__device__ inline void fill(float* tile, const T* x, int64_t count, int64_t depth, int64_t row,
                            int64_t step) {
  for (int i = int(threadIdx.x); i < Tile::size * depth_at_once; i += product_threads) {
    const int r = step == 1 ? i / depth_at_once : i % Tile::size;
    const int k = step == 1 ? i % depth_at_once : i / Tile::size;
    tile[r * Tile::row + k] = r < count && k < depth ? to_float(x[r * row + k * step]) : 0.0f;
  }
}

// The sum of N lanes: the upper half is added to the lower one, and so on.
template <int N>
__device__ inline float by_halves(const float (&x)[N]) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    float y[N / 2];
    GLM_UNROLL
    for (int l = 0; l < N / 2; ++l) y[l] = x[l] + x[l + N / 2];
    return by_halves(y);
  }
}

template <int LANES, class A, class B, class Y>
__global__ void __launch_bounds__(product_threads) multiply(Products<A, B, Y> a) {
  using T = Tile<LANES>;
  constexpr int R = T::R;
  GLM_SHARED(float, memory, 2 * T::size * T::row);
  float *left = memory, *right = memory + T::size * T::row;
  const int lane = int(threadIdx.x) % LANES, tile = int(threadIdx.x) / LANES;
  const int m0 = tile / T::side, n0 = tile % T::side;
  const int64_t row = int64_t(blockIdx.y) * T::size, column = int64_t(blockIdx.x) * T::size;
  const int64_t unit = blockIdx.z / unsigned(a.members), member = blockIdx.z % unsigned(a.members);
  float sum[R][R] = {};
  const auto add = [&](int k) {
    float x[R], y[R];
    GLM_UNROLL
    for (int i = 0; i < R; ++i) x[i] = left[(m0 + i * T::side) * T::row + k];
    GLM_UNROLL
    for (int i = 0; i < R; ++i) y[i] = right[(n0 + i * T::side) * T::row + k];
    GLM_UNROLL
    for (int m = 0; m < R; ++m) {
      GLM_UNROLL
      for (int n = 0; n < R; ++n) sum[m][n] = fmaf(x[m], y[n], sum[m][n]);
    }
  };
  for (int64_t j = member; j < member + a.outer; ++j) {
    const A* x = a.a.p + unit * a.a.unit + j * a.a.member + row * a.a.row;
    const B* y = a.b.p + unit * a.b.unit + j * a.b.member + column * a.b.row;
    for (int64_t k = 0; k < a.depth; k += depth_at_once) {
      const int64_t depth = a.depth - k;
      fill<T>(left, x + k * a.a.step, a.rows - row, depth, a.a.row, a.a.step);
      fill<T>(right, y + k * a.b.step, a.columns - column, depth, a.b.row, a.b.step);
      __syncthreads();
      if (depth >= depth_at_once) {
        GLM_UNROLL
        for (int i = 0; i < depth_at_once; i += LANES) add(i + lane);
      } else {
        for (int i = lane; i < int(depth); i += LANES) add(i);
      }
      __syncthreads();
    }
  }
  const int64_t z = blockIdx.z;
  Y* out = a.y.p + unit * a.y.unit + member * a.y.member;
  if constexpr (LANES == 1) {
    GLM_UNROLL
    for (int m = 0; m < R; ++m) {
      const int64_t i = row + m0 + m * T::side;
      if (i >= a.rows) continue;
      const float factor = a.factors ? a.factors[z * a.rows + i] : a.factor;
      GLM_UNROLL
      for (int n = 0; n < R; ++n) {
        const int64_t c = column + n0 + n * T::side;
        if (c < a.columns) from_float(sum[m][n] * factor, out[i * a.y.row + c * a.y.step]);
      }
    }
  } else {
    const int n = int(threadIdx.x) % R, owner = int(threadIdx.x) / R;  // of the sum to add up
    const int64_t c = column + owner % T::side + n * T::side;
    GLM_UNROLL
    for (int m = 0; m < R; ++m) {
      GLM_UNROLL
      for (int i = 0; i < R; ++i) memory[(tile * R + i) * (LANES + 1) + lane] = sum[m][i];
      __syncthreads();
      const int64_t i = row + owner / T::side + m * T::side;
      if (owner < T::side * T::side && i < a.rows && c < a.columns) {
        float x[LANES];
        GLM_UNROLL
        for (int l = 0; l < LANES; ++l) x[l] = memory[(owner * R + n) * (LANES + 1) + l];
        from_float(by_halves(x) + (a.bias ? to_float(a.bias[c]) : 0.0f),
                   out[i * a.y.row + c * a.y.step]);
      }
      __syncthreads();
    }
  }
}

template <int LANES, class A, class B, class Y>
void run(const Products<A, B, Y>& a, Stream stream) {
  constexpr int size = Tile<LANES>::size;
  if (!a.rows || !a.columns || !a.units) return;
  const dim3 grid(unsigned(divided_up(a.columns, size)), unsigned(divided_up(a.rows, size)),
                  unsigned(a.units * a.members));
  launch(multiply<LANES, A, B, Y>, grid, product_threads, stream, a);
}

}  // namespace

template <class T>
void exact_product(const Products<T, T, T>& a, Stream stream) {
  run<exact::lanes>(a, stream);
}

template <class A, class B, class Y>
void exact_chains(const Products<A, B, Y>& a, Stream stream) {
  run<1>(a, stream);
}

template void exact_product(const Products<float, float, float>&, Stream);
template void exact_product(const Products<bf16, bf16, bf16>&, Stream);
template void exact_chains(const Products<float, float, float>&, Stream);
template void exact_chains(const Products<bf16, bf16, float>&, Stream);
template void exact_chains(const Products<float, bf16, bf16>&, Stream);

}  // namespace glm::gpu
