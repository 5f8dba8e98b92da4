// Attention with an interval of visible keys per query. Shapes: B batch, L queries, S keys, H
// heads, K kv heads, R = H / K heads that share a kv head, E head dim.
//
// Forward: a unit is one (batch, kv head, TILE queries). Its scores over the keys that any of
// them sees lie in scratch [R * TILE, S], never [L, S] for a head. Kept for backward: log-sum-exp.
// Backward: a unit is one (batch, kv head), which owns dk and dv there, so nothing is summed
// across threads. Probabilities are formed again for TILE queries of a head at a time; what the
// softmax subtracts, sum(p dp), is formed from them too and not from the rounded output.
// Everything is computed in float, rounded once. layer_scale and pb_relax are neutral in real
// arithmetic and keep half-precision scores in range, which float scores are anyway.
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <new>

#include "kernels.h"
#include "product.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

constexpr int64_t TILE = attention_tile;
constexpr int64_t BLOCK = 64;  // keys; a multiple of any W

int64_t padded(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Floats for one unit's work, in the largest vector's alignment. (No std::vector here: its
// instantiations would be shared between instruction sets.)
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : floats_(static_cast<float*>(aligned_alloc(64, size_t(padded(size + 1, 16)) * 4))) {
    if (!floats_) throw std::bad_alloc();
  }
  ~Scratch() { free(floats_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void clear() { used_ = 0; }
  float* take(int64_t size) {
    float* p = floats_ + used_;
    used_ += padded(size, 16);
    return p;
  }

 private:
  float* floats_;
  int64_t used_ = 0;
};

// out [rows, ld] = factor * x, as float; columns from `width` to ld are zero.
template <class T>
void widen(const T* x, int64_t stride, int64_t rows, int64_t width, float factor, float* out,
           int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    sweep(ld, [&](int64_t i, int64_t n) GLM_INLINED {
      const int64_t left = width - i < n ? width - i : n;
      vf v = left == W ? load(x + r * stride + i) : load_n(x + r * stride + i, left > 0 ? left : 0);
      give(out + r * ld + i, v * factor, n);
    });
  }
}

// out [width, BLOCK] = the transpose of x [rows <= BLOCK, width]; missing columns are zero.
template <class T>
void transpose(const T* x, int64_t stride, int64_t rows, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < width; ++e) out[e * BLOCK + r] = get(x + r * stride + e);
  if (rows == BLOCK) return;
  for (int64_t e = 0; e < width; ++e)
    memset(out + e * BLOCK + rows, 0, size_t(BLOCK - rows) * sizeof(float));
}

// The keys [first, last) that at least one of the queries sees.
struct Span {
  int64_t first, last;
};

Span visible(const int32_t* start, const int32_t* end, int64_t queries, int64_t keys) {
  Span span{keys, 0};
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t from = start[i] > 0 ? start[i] : 0, to = end[i] < keys ? end[i] : keys;
    if (from >= to) continue;
    span.first = from < span.first ? from : span.first;
    span.last = to > span.last ? to : span.last;
  }
  return span.first < span.last ? span : Span{0, 0};
}

// A query's interval, counted from `base` and cut to [0, size).
Span interval(const int32_t* start, const int32_t* end, int64_t i, int64_t base, int64_t size) {
  int64_t from = start[i] - base, to = end[i] - base;
  from = from < 0 ? 0 : from > size ? size : from;
  to = to < from ? from : to > size ? size : to;
  return {from, to};
}

// Scores [size] of one query -> exponentials, zero outside its interval; returns {sum, lse}.
struct Softmax {
  float sum, lse;
};

Softmax exponentials(float* s, int64_t size, Span seen) {
  memset(s, 0, size_t(seen.first) * sizeof(float));
  memset(s + seen.last, 0, size_t(size - seen.last) * sizeof(float));
  if (seen.first == seen.last) return {1.0f, 0.0f};
  float* p = s + seen.first;
  const int64_t count = seen.last - seen.first;
  vf top = all(-INFINITY);
  sweep(count, [&](int64_t i, int64_t n) GLM_INLINED {
    top = larger(top, n == W ? load(p + i) : load_n(p + i, n, -INFINITY));
  });
  const float m = largest(top);
  float total[1];
  sums(count, total, [&](int64_t i, int64_t n, vf* t) GLM_INLINED {
    vf e = exp(take(p + i, n) - m);
    give(p + i, e, n);
    t[0] += first(e, n);
  });
  return {total[0], m + std::log(total[0])};
}

template <class T>
void forward_tile(const AttentionForward<T>& a, int64_t b, int64_t g, int64_t first) {
  const int64_t shared = a.heads / a.kv_heads, ld = padded(a.width, W);
  const int64_t queries = a.queries - first < TILE ? a.queries - first : TILE;
  const int64_t rows = shared * queries;
  const int32_t *start = a.key_start + b * a.queries + first,
                *end = a.key_end + b * a.queries + first;
  const Span span = visible(start, end, queries, a.keys);
  const int64_t size = padded(span.last - span.first, BLOCK);
  Scratch scratch(rows * (2 * ld + size + 1) + BLOCK * (ld + a.width) + 128);
  float *q = scratch.take(rows * ld), *y = scratch.take(rows * ld), *p = scratch.take(rows * size);
  float *block = scratch.take(BLOCK * (ld > a.width ? ld : a.width)), *sum = scratch.take(rows);
  for (int64_t r = 0; r < shared; ++r)
    widen(a.q.at(b, first, g * shared + r), a.q.row, queries, a.width, a.scale,
          q + r * queries * ld, ld);
  for (int64_t j = 0; j < size; j += BLOCK) {
    const int64_t key = span.first + j, count = span.last - key < BLOCK ? span.last - key : BLOCK;
    transpose(a.k.at(b, key, g), a.k.row, count, a.width, block);
    product(rows, BLOCK, a.width, {q, ld, 1}, block, BLOCK, p + j, size, false);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = r % queries, h = g * shared + r / queries;
    const Span seen = interval(start, end, i, span.first, span.last - span.first);
    const Softmax row = exponentials(p + r * size, size, seen);
    sum[r] = row.sum;
    a.lse[(b * a.heads + h) * a.queries + first + i] = row.lse;
  }
  if (!size) memset(y, 0, size_t(rows * ld) * sizeof(float));
  for (int64_t j = 0; j < size; j += BLOCK) {
    const int64_t key = span.first + j, count = span.last - key < BLOCK ? span.last - key : BLOCK;
    widen(a.v.at(b, key, g), a.v.row, count, a.width, 1.0f, block, ld);
    product(rows, ld, count, {p + j, size, 1}, block, ld, y, ld, j > 0);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = first + r % queries, h = g * shared + r / queries;
    T* out = a.y + ((b * a.queries + i) * a.heads + h) * a.width;
    sweep(a.width, [&](int64_t e, int64_t n)
                       GLM_INLINED { give(out + e, take(y + r * ld + e, n) / sum[r], n); });
  }
}

// One (batch, kv head) in the backward: its keys and values as the products want them, and the
// sums of their gradients. nblocks blocks of BLOCK keys.
struct KeysValues {
  float *k, *kt, *vt;  // [S, ld], per block [E, BLOCK], the same
  float *dk, *dv;      // [S, ld]
};

template <class T>
KeysValues open(const AttentionBackward<T>& a, int64_t b, int64_t g, int64_t ld, Scratch& scratch) {
  const int64_t size = padded(a.keys, BLOCK);
  KeysValues kv;
  for (float** p : {&kv.k, &kv.dk, &kv.dv}) *p = scratch.take(size * ld);
  for (float** p : {&kv.kt, &kv.vt}) *p = scratch.take(size * a.width);
  memset(kv.dk, 0, size_t(size * ld) * sizeof(float));
  memset(kv.dv, 0, size_t(size * ld) * sizeof(float));
  widen(a.k.at(b, 0, g), a.k.row, a.keys, a.width, 1.0f, kv.k, ld);
  memset(kv.k + a.keys * ld, 0, size_t((size - a.keys) * ld) * sizeof(float));
  for (int64_t j = 0; j < a.keys; j += BLOCK) {
    const int64_t count = a.keys - j < BLOCK ? a.keys - j : BLOCK;
    transpose(a.k.at(b, j, g), a.k.row, count, a.width, kv.kt + j * a.width);
    transpose(a.v.at(b, j, g), a.v.row, count, a.width, kv.vt + j * a.width);
  }
  return kv;
}

// One tile of queries of one head, as float.
struct Queries {
  float *q, *dy, *dq;  // [TILE, ld]
  float *p, *dp;       // [TILE, S]
};

// p: scores of one query -> probabilities, zero outside `seen`;
// dp: gradients of the probabilities -> of the scores, p (dp - sum(p dp)).
void score_gradients(float* p, float* dp, int64_t size, Span seen, float lse) {
  for (float* x : {p, dp}) {
    memset(x, 0, size_t(seen.first) * sizeof(float));
    memset(x + seen.last, 0, size_t(size - seen.last) * sizeof(float));
  }
  p += seen.first, dp += seen.first;
  const int64_t count = seen.last - seen.first;
  float total[1];
  sums(count, total, [&](int64_t i, int64_t n, vf* s) GLM_INLINED {
    vf e = exp(take(p + i, n) - lse);
    give(p + i, e, n);
    s[0] = fma(first(e, n), take(dp + i, n), s[0]);
  });
  sweep(count, [&](int64_t i, int64_t n)
                   GLM_INLINED { give(dp + i, take(p + i, n) * (take(dp + i, n) - total[0]), n); });
}

template <class T>
void backward_tile(const AttentionBackward<T>& a, int64_t b, int64_t h, int64_t first,
                   const KeysValues& kv, const Queries& t, int64_t ld) {
  const int64_t queries = a.queries - first < TILE ? a.queries - first : TILE;
  const int32_t *start = a.key_start + b * a.queries + first,
                *end = a.key_end + b * a.queries + first;
  const float* lse = a.lse + (b * a.heads + h) * a.queries + first;
  const Span span = visible(start, end, queries, a.keys);
  const int64_t base = span.first / BLOCK * BLOCK, size = padded(span.last - base, BLOCK);
  widen(a.q.at(b, first, h), a.q.row, queries, a.width, a.scale, t.q, ld);
  widen(a.dy.at(b, first, h), a.dy.row, queries, a.width, 1.0f, t.dy, ld);
  for (int64_t j = 0; j < size; j += BLOCK) {
    const int64_t at = (base + j) * a.width;
    product(queries, BLOCK, a.width, {t.q, ld, 1}, kv.kt + at, BLOCK, t.p + j, size, false);
    product(queries, BLOCK, a.width, {t.dy, ld, 1}, kv.vt + at, BLOCK, t.dp + j, size, false);
  }
  for (int64_t i = 0; i < queries; ++i)
    score_gradients(t.p + i * size, t.dp + i * size, size,
                    interval(start, end, i, base, span.last - base), lse[i]);
  product(size, ld, queries, {t.p, 1, size}, t.dy, ld, kv.dv + base * ld, ld, true);
  product(size, ld, queries, {t.dp, 1, size}, t.q, ld, kv.dk + base * ld, ld, true);
  product(queries, ld, size, {t.dp, size, 1}, kv.k + base * ld, ld, t.dq, ld, false);
  for (int64_t i = 0; i < queries; ++i) {
    T* out = a.dq + ((b * a.queries + first + i) * a.heads + h) * a.width;
    sweep(a.width, [&](int64_t e, int64_t n)
                       GLM_INLINED { give(out + e, take(t.dq + i * ld + e, n) * a.scale, n); });
  }
}

template <class T>
void close(const float* sum, T* out, int64_t rows, int64_t ld, int64_t width, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    sweep(width, [&](int64_t e, int64_t n)
                     GLM_INLINED { give(out + r * stride + e, take(sum + r * ld + e, n), n); });
}

}  // namespace

// Units: B * K * tiles.
template <class T>
void attention_forward(const AttentionForward<T>& a, int64_t begin, int64_t end) {
  const int64_t tiles = (a.queries + attention_tile - 1) / attention_tile;
  for (int64_t unit = begin; unit < end; ++unit)
    forward_tile(a, unit / tiles / a.kv_heads, unit / tiles % a.kv_heads, unit % tiles * TILE);
}

// Units: B * K.
template <class T>
void attention_backward(const AttentionBackward<T>& a, int64_t begin, int64_t end) {
  const int64_t ld = padded(a.width, W), size = padded(a.keys, BLOCK);
  Scratch scratch(size * (3 * ld + 2 * a.width) + TILE * (3 * ld + 2 * size) + 256);
  for (int64_t unit = begin; unit < end; ++unit) {
    scratch.clear();
    const int64_t b = unit / a.kv_heads, g = unit % a.kv_heads, shared = a.heads / a.kv_heads;
    const KeysValues kv = open(a, b, g, ld, scratch);
    Queries t;
    for (float** p : {&t.q, &t.dy, &t.dq}) *p = scratch.take(TILE * ld);
    for (float** p : {&t.p, &t.dp}) *p = scratch.take(TILE * size);
    for (int64_t h = g * shared; h < (g + 1) * shared; ++h)
      for (int64_t first = 0; first < a.queries; first += TILE)
        backward_tile(a, b, h, first, kv, t, ld);
    const int64_t at = (b * a.keys * a.kv_heads + g) * a.width, stride = a.kv_heads * a.width;
    close(kv.dk, a.dk + at, a.keys, ld, a.width, stride);
    close(kv.dv, a.dv + at, a.keys, ld, a.width, stride);
  }
}

GLM_INSTANTIATE(attention_forward, AttentionForward)
GLM_INSTANTIATE(attention_backward, AttentionBackward)

}  // namespace glm::GLM_ISA
