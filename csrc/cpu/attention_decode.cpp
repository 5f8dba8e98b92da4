// Attention of one query per sequence (decode), keys and values read once, where they lie. Shapes:
// B batch, S keys, H heads, K kv heads, E head dim, C head dim of the values; R = H / K queries
// share a kv head.
//
// A unit of work is one (batch, kv head), so a sequence's result does not depend on what else is in
// the batch. The scores [R, S] of its queries lie in scratch. Keys, then values, are read in blocks
// that stay in the cache while up to HEADS queries at a time pass over them. All arithmetic is
// float, whatever T is, and results are rounded once; sums over keys are added up block by block.
#include <cmath>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

constexpr int64_t BLOCK = 128;                              // keys
constexpr int HEADS = REGISTERS < 32 ? 2 : W == 4 ? 4 : 6;  // queries held in registers
// Keys at a time for each of R such queries, and vectors of values at a time. Short vectors need
// more sums under way to hide the latency of fma.
template <int R>
constexpr int at_a_time = W == 4 && REGISTERS == 32 && R <= 2 ? 8 : 4;

int64_t padded(int64_t size) { return (size + W - 1) / W * W; }

// Zeroed scratch for one unit, aligned for the widest vector.
struct Zeros {
  explicit Zeros(int64_t size)
      : p(static_cast<float*>(aligned_alloc(64, size_t(size * 4 + 63) / 64 * 64))) {
    if (!p) throw std::bad_alloc();
    memset(p, 0, size_t(size) * sizeof(float));
  }
  ~Zeros() { free(p); }
  Zeros(const Zeros&) = delete;
  Zeros& operator=(const Zeros&) = delete;
  float* p;
};

// Calls f<R>() for a remainder R <= MOST.
template <int MOST, class F>
void rest_of_group(int64_t rest, F f) {
  if (rest == MOST) return f(std::integral_constant<int, MOST>{});
  if constexpr (MOST > 1) rest_of_group<MOST - 1>(rest, f);
}

// Calls f<R>(first) for every group of R <= HEADS queries.
template <class F>
void in_groups(int64_t queries, F f) {
  int64_t r = 0;
  for (; r + HEADS <= queries; r += HEADS) f(std::integral_constant<int, HEADS>{}, r);
  rest_of_group<HEADS - 1>(queries - r, [&](auto heads) { f(heads, r); });
}

// p [R, ldp] = q k^T;  q [R, ld] padded with zeros, k [keys, width].
template <int R, class T>
void scores(const T* k, int64_t stride, int64_t keys, int64_t width, const float* q, int64_t ld,
            float* p, int64_t ldp) {
  constexpr int KEYS = at_a_time<R>;
  int64_t j = 0;
  for (; j + KEYS <= keys; j += KEYS) {
    vf total[R][KEYS] = {};
    sweep(width, [&](int64_t e, int64_t n) GLM_INLINED {
      vf x[KEYS];
      for (int i = 0; i < KEYS; ++i) x[i] = take(k + (j + i) * stride + e, n);
      for (int r = 0; r < R; ++r) {
        const vf of_query = load(q + r * ld + e);
        for (int i = 0; i < KEYS; ++i) total[r][i] = fma(of_query, x[i], total[r][i]);
      }
    });
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < KEYS; i += 4) {
        const vf* t = total[r] + i;
        sums({t[0], t[1], t[2], t[3]}, p + r * ldp + j + i);
      }
  }
  for (; j < keys; ++j) {
    vf total[R] = {};
    sweep(width, [&](int64_t e, int64_t n) GLM_INLINED {
      const vf x = take(k + j * stride + e, n);
      for (int r = 0; r < R; ++r) total[r] = fma(load(q + r * ld + e), x, total[r]);
    });
    for (int r = 0; r < R; ++r) p[r * ldp + j] = sum(total[r]);
  }
}

// y [R, ld] += p v for C vectors of columns, the last of n columns.
template <int R, int C, class T>
void strip(const T* v, int64_t stride, int64_t keys, int64_t n, const float* p, int64_t ldp,
           float* y, int64_t ld) {
  vf total[R][C] = {};
  for (int64_t j = 0; j < keys; ++j)
    for (int c = 0; c < C; ++c) {
      const vf x = take(v + j * stride + c * W, C == 1 ? n : int64_t(W));
      for (int r = 0; r < R; ++r) total[r][c] = fma(x, p[r * ldp + j], total[r][c]);
    }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float* out = y + r * ld + c * W;
      store(out, load(out) + total[r][c]);
    }
}

template <int R, class T>
void values(const T* v, int64_t stride, int64_t keys, int64_t width, const float* p, int64_t ldp,
            float* y, int64_t ld) {
  constexpr int columns = at_a_time<R>;
  int64_t e = 0;
  for (; e + columns * W <= width; e += columns * W)
    strip<R, columns>(v + e, stride, keys, W, p, ldp, y + e, ld);
  for (; columns > 4 && e + 4 * W <= width; e += 4 * W)
    strip<R, 4>(v + e, stride, keys, W, p, ldp, y + e, ld);
  for (; e < width; e += W)
    strip<R, 1>(v + e, stride, keys, width - e < W ? width - e : W, p, ldp, y + e, ld);
}

// Turns products q k into exponentials of the scores; returns their sum.
float exponentials(float* p, int64_t size, float scale) {
  vf top = all(-INFINITY);
  sweep(size, [&](int64_t i, int64_t n) GLM_INLINED {
    const vf s = take(p + i, n) * scale;
    give(p + i, s, n);
    top = larger(top, n == W ? s : load_n(p + i, n, -INFINITY));
  });
  const float m = largest(top);
  float total[1];
  sums(size, total, [&](int64_t i, int64_t n, vf* t) GLM_INLINED {
    const vf e = without_denormals(exp(take(p + i, n) - m));
    give(p + i, e, n);
    t[0] += first(e, n);
  });
  return total[0];
}

template <class T>
void decode_unit(const AttentionForward<T>& a, int64_t b, int64_t g) {
  const int64_t shared = a.heads / a.kv_heads, ld = padded(a.width), ldv = padded(a.values);
  const int64_t from = a.key_start[b] > 0 ? a.key_start[b] : 0;
  const int64_t to = a.key_end[b] < a.keys ? a.key_end[b] : a.keys;
  const int64_t count = to > from ? to - from : 0, size = padded(count);
  const Zeros zeros(shared * (ld + ldv + size + 1));
  float *q = zeros.p, *y = q + shared * ld, *p = y + shared * ldv, *sum = p + shared * size;
  for (int64_t r = 0; r < shared; ++r) {
    const T* x = a.q.at(b, 0, g * shared + r);
    sweep(a.width,
          [&](int64_t e, int64_t n) GLM_INLINED { give(q + r * ld + e, take(x + e, n), n); });
  }
  for (int64_t j = 0; j < count; j += BLOCK)
    in_groups(shared, [&](auto heads, int64_t r) {
      const int64_t keys = count - j < BLOCK ? count - j : BLOCK;
      scores<heads.value>(a.k.at(b, from + j, g), a.k.row, keys, a.width, q + r * ld, ld,
                          p + r * size + j, size);
    });
  for (int64_t r = 0; r < shared; ++r)
    sum[r] = count ? exponentials(p + r * size, count, a.scale) : 1.0f;
  for (int64_t j = 0; j < count; j += BLOCK)
    in_groups(shared, [&](auto heads, int64_t r) {
      const int64_t keys = count - j < BLOCK ? count - j : BLOCK;
      values<heads.value>(a.v.at(b, from + j, g), a.v.row, keys, a.values, p + r * size + j, size,
                          y + r * ldv, ldv);
    });
  for (int64_t r = 0; r < shared; ++r) {
    T* out = a.y + (b * a.heads + g * shared + r) * a.values;
    sweep(a.values, [&](int64_t e, int64_t n) GLM_INLINED {
      give(out + e, take(y + r * ldv + e, n) * (1.0f / sum[r]), n);
    });
  }
}

}  // namespace

// Units: B * K.
template <class T>
void attention_decode(const AttentionForward<T>& a, int64_t begin, int64_t end) {
  // exact: with the sums of a prompt's, whose units are the same here
  if constexpr (EXACT) return attention_forward(a, begin, end);
  for (int64_t unit = begin; unit < end; ++unit)
    decode_unit(a, unit / a.kv_heads, unit % a.kv_heads);
}

GLM_INSTANTIATE(attention_decode, AttentionForward)

}  // namespace glm::GLM_ISA
