// Attention of one query per sequence (decode), keys and values read once, where they lie. Shapes:
// B batch, S keys, H heads, K kv heads, E head dim, C head dim of the values; R = H / K queries
// share a kv head.
//
// A unit of work is one (batch, kv head), so a sequence's result does not depend on what else is in
// the batch. The scores [R, S] of its queries lie in scratch. Keys, then values, are read in blocks
// that stay in the cache while up to HEADS queries at a time pass over them. All arithmetic is
// float, whatever T is, and results are rounded once; sums over keys are added up block by block.
//
// Exact, the sums are those of a prompt's attention (attention.cpp): a score is one chain over the
// head dim, so a vector holds keys, and a value is one chain over all keys.
#include <cmath>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "transpose.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

constexpr int64_t BLOCK = EXACT ? 32 : 128;                      // keys
constexpr int HEADS = REGISTERS < 32 ? 2 : NATIVE == 4 ? 4 : 6;  // queries held in registers
// Keys at a time for each of R such queries, and vectors of values at a time; exact: vectors of
// keys, too. Short vectors need more sums under way to hide the latency of fma.
template <int R>
constexpr int at_a_time = NATIVE == 4 && REGISTERS == 32 && R <= 2 ? 8 : 4;

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

// out [width, BLOCK]: the transpose of n <= BLOCK keys [n, width]. `rest` [SIDE, width] takes the
// last ones, which fill no square; out's columns behind them hold whatever it held before.
template <class T>
void transposed(const T* k, int64_t stride, int64_t n, int64_t width, float* out, T* rest) {
  for (int64_t j = 0; j < n; j += SIDE, k += SIDE * stride) {
    if (n - j < SIDE) {
      for (int64_t i = 0; i < n - j; ++i)
        memcpy(rest + i * width, k + i * stride, size_t(width) * sizeof(T));
      k = rest, stride = width;
    }
    int64_t e = 0;
    for (; e + SIDE <= width; e += SIDE) {
      if (e % int64_t(line_bytes / sizeof(T)) == 0)
        for (int64_t i = 0; i < SIDE; ++i)
          fetch_ahead(k + i * stride + e, SIDE * stride * int64_t(sizeof(T)));
      transpose(k + e, stride, SIDE,
                [&](int64_t row) GLM_INLINED { return out + (e + row) * BLOCK + j; });
    }
    for (; e < width; ++e)
      for (int64_t i = 0; i < SIDE; ++i) out[e * BLOCK + j + i] = get(k + i * stride + e);
  }
}

// p [R, ldp] = q kt in one chain for each score;  q [R, ld], kt [width, BLOCK]. p has room for
// BLOCK.
template <int R>
void chains(const float* kt, int64_t keys, int64_t width, const float* q, int64_t ld, float* p,
            int64_t ldp) {
  constexpr int most = int(BLOCK) / NATIVE, V = at_a_time<R> < most ? at_a_time<R> : most;
  for (int64_t j = 0; j < keys; j += V * NATIVE) {
    nf total[R][V];
    for (auto& sums : total)
      for (nf& sum : sums) sum = native(0.0f);
    for (int64_t e = 0; e < width; ++e) {
      nf x[V];
      for (int v = 0; v < V; ++v) x[v] = load<nf>(kt + e * BLOCK + j + v * NATIVE);
      for (int r = 0; r < R; ++r) {
        const nf of_query = native(q[r * ld + e]);
        for (int v = 0; v < V; ++v) total[r][v] = fma(of_query, x[v], total[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(p + r * ldp + j + v * NATIVE, total[r][v]);
  }
}

// y [R, ld] += p v for C vectors of columns, the last of n columns.
template <int R, int C, class T>
void strip(const T* v, int64_t stride, int64_t keys, int64_t n, const float* p, int64_t ldp,
           float* y, int64_t ld) {
  nf total[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      total[r][c] = EXACT ? load<nf>(y + r * ld + c * NATIVE) : native(0.0f);
  for (int64_t j = 0; j < keys; ++j)
    for (int c = 0; c < C; ++c) {
      const nf x = part_of(v + j * stride + c * NATIVE, C == 1 ? n : int64_t(NATIVE));
      for (int r = 0; r < R; ++r) total[r][c] = fma(x, native(p[r * ldp + j]), total[r][c]);
    }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float* out = y + r * ld + c * NATIVE;
      store(out, EXACT ? total[r][c] : load<nf>(out) + total[r][c]);
    }
}

template <int R, class T>
void values(const T* v, int64_t stride, int64_t keys, int64_t width, const float* p, int64_t ldp,
            float* y, int64_t ld) {
  constexpr int columns = at_a_time<R>;
  int64_t e = 0;
  for (; e + columns * NATIVE <= width; e += columns * NATIVE)
    strip<R, columns>(v + e, stride, keys, NATIVE, p, ldp, y + e, ld);
  for (; columns > 4 && e + 4 * NATIVE <= width; e += 4 * NATIVE)
    strip<R, 4>(v + e, stride, keys, NATIVE, p, ldp, y + e, ld);
  for (; e < width; e += NATIVE)
    strip<R, 1>(v + e, stride, keys, width - e < NATIVE ? width - e : NATIVE, p, ldp, y + e, ld);
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
  const int64_t count = to > from ? to - from : 0;
  // exact: whole blocks of scores, a block of keys transposed, and the last ones of it
  const int64_t size = EXACT ? (count + BLOCK - 1) / BLOCK * BLOCK : padded(count);
  const int64_t of_keys = EXACT ? BLOCK * a.width : 0, rest = EXACT ? SIDE * a.width : 0;
  const Zeros zeros(of_keys + rest + shared * (ld + ldv + size + 1));
  float *kt = zeros.p, *last = kt + of_keys, *q = last + rest, *y = q + shared * ld;
  float *p = y + shared * ldv, *sum = p + shared * size;
  for (int64_t r = 0; r < shared; ++r) {
    const T* x = a.q.at(b, 0, g * shared + r);
    sweep(a.width,
          [&](int64_t e, int64_t n) GLM_INLINED { give(q + r * ld + e, take(x + e, n), n); });
  }
  for (int64_t j = 0; j < count; j += BLOCK) {
    const int64_t keys = count - j < BLOCK ? count - j : BLOCK;
    const T* k = a.k.at(b, from + j, g);
    if (EXACT) transposed(k, a.k.row, keys, a.width, kt, reinterpret_cast<T*>(last));
    in_groups(shared, [&](auto heads, int64_t r) {
      constexpr int R = heads.value;
      if constexpr (EXACT)
        chains<R>(kt, keys, a.width, q + r * ld, ld, p + r * size + j, size);
      else
        scores<R>(k, a.k.row, keys, a.width, q + r * ld, ld, p + r * size + j, size);
    });
  }
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
  for (int64_t unit = begin; unit < end; ++unit)
    decode_unit(a, unit / a.kv_heads, unit % a.kv_heads);
}

GLM_INSTANTIATE(attention_decode, AttentionForward)

}  // namespace glm::GLM_ISA
