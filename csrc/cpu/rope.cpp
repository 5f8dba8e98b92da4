// Rotary embedding. Shapes: R = B * L rows (one position each), H heads, E head dim, G sections of
// P pairs. Every row's cos and sin serve all its heads. Backward is the same rotation by -angle.
#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

// Pairs (i, i + P) of one section.
template <class T>
void turn_halves(const T* x, T* y, const float* cos, const float* sin, int64_t pairs, float sign) {
  sweep(pairs, [&](int64_t i, int64_t n) GLM_INLINED {
    vf a = take(x + i, n), b = take(x + pairs + i, n);
    vf c = take(cos + i, n), s = take(sin + i, n) * sign;
    give(y + i, a * c - b * s, n);
    give(y + pairs + i, fma(b, c, a * s), n);
  });
}

typedef uint64_t pair __attribute__((vector_size(W * 4)));
typedef uint32_t half __attribute__((vector_size(W * 2)));

// The lanes with neighbours 2i and 2i + 1 exchanged: every 64 bits turned by 32.
GLM_INLINE vf swapped(vf x) {
  pair u = bits_as<pair>(x);
  return bits_as<vf>(u << 32 | u >> 32);
}

// Each of W / 2 values twice.
GLM_INLINE vf doubled(const float* p) {
  half h;
  memcpy(&h, p, sizeof h);
  pair u = __builtin_convertvector(h, pair);
  return bits_as<vf>(u << 32 | u);
}

// Pairs (2i, 2i + 1) of one section: W / 2 pairs at a time, the rest one by one.
template <class T>
void turn_neighbours(const T* x, T* y, const float* cos, const float* sin, int64_t pairs,
                     float sign) {
  vf signs;
  for (int i = 0; i < W; ++i) signs[i] = i % 2 ? sign : -sign;
  int64_t i = 0;
  for (; i + W / 2 <= pairs; i += W / 2) {
    vf t = load(x + 2 * i);
    store(y + 2 * i, fma(t, doubled(cos + i), swapped(t) * (doubled(sin + i) * signs)));
  }
  for (; i < pairs; ++i) {
    const float a = get(x + 2 * i), b = get(x + 2 * i + 1), c = cos[i], s = sin[i] * sign;
    put(y + 2 * i, a * c - b * s);
    put(y + 2 * i + 1, b * c + a * s);
  }
}

}  // namespace

template <class T>
void rope_turn(const Rope<T>& a, int64_t begin, int64_t end) {
  const int64_t turned = a.sections * a.pairs;  // angles per row
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.length, l = row % a.length;
    const int64_t angles = (a.shared ? l : row) * turned;
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* x = a.x + b * a.stride_b + l * a.stride_l + h * a.stride_h;
      T* y = a.y + (row * a.heads + h) * a.width;
      for (int64_t g = 0; g < a.sections; ++g) {
        const float *cos = a.cos + angles + g * a.pairs, *sin = a.sin + angles + g * a.pairs;
        const int64_t at = 2 * g * a.pairs;
        (a.interleaved ? turn_neighbours<T> : turn_halves<T>)(x + at, y + at, cos, sin, a.pairs,
                                                              a.sign);
      }
      memcpy(y + 2 * turned, x + 2 * turned, size_t(a.width - 2 * turned) * sizeof(T));
    }
  }
}

GLM_INSTANTIATE(rope_turn, Rope)

}  // namespace glm::GLM_ISA
