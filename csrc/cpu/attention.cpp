// Attention with an interval of visible keys per query. Shapes: B batch, L queries, S keys, H
// heads, K kv heads, E head dim, C head dim of the values.
//
// Forward: a unit of work is one (batch, kv head) and a part of the queries. It lays out keys and
// values once, then works on TILE queries of a head at a time. Their scores over the keys that any
// of them sees lie in scratch [TILE, S], never [L, S]. Nothing is kept for backward. Backward: a
// unit of work is one (batch, kv head). It owns its dk and dv, so threads share no sums.
// Probabilities are computed again for TILE queries of a head at a time. So is sum(p dp), which the
// softmax's gradient subtracts: it comes from these probabilities, not from the rounded output.
//
// Softmax and sums are float; results are rounded once. Products take floats. Where the CPU
// multiplies pairs of bfloat16 (Words = Pair, see product.h), they take the bfloat16 inputs, with
// probabilities and score gradients rounded to bfloat16, as in Dao et al. 2022 (FlashAttention).
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <new>

#include "kernels.h"
#include "product.h"
#include "transpose.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

constexpr int64_t TILE = attention_tile;  // queries; even, a multiple of a register tile's rows
constexpr int64_t BLOCK = 64;             // keys; a multiple of any W

int64_t padded(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

template <class Words>
int64_t words(int64_t size) {
  return (size + Words::per_word - 1) / Words::per_word;
}

// Scratch words for one unit, aligned for the widest vector. (Not std::vector: its instantiations
// would be shared between instruction sets.)
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : words_(static_cast<float*>(aligned_alloc(64, size_t(padded(size + 256, 16)) * 4))) {
    if (!words_) throw std::bad_alloc();
  }
  ~Scratch() { free(words_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void clear() { used_ = 0; }
  float* take(int64_t size) {
    float* p = words_ + used_;
    used_ += padded(size, 16);
    return p;
  }

 private:
  float* words_;
  int64_t used_ = 0;
};

// out [rows, words(width)]: x with words along its rows.
template <class Words, class T>
void along_rows(const T* x, int64_t stride, int64_t rows, int64_t width, float* out) {
  const int64_t ld = words<Words>(width);
  for (int64_t r = 0; r < rows; ++r) {
    if constexpr (Words::per_word == 2) {
      out[r * ld + ld - 1] = 0.0f;
      memcpy(out + r * ld, x + r * stride, size_t(width) * sizeof(T));
    } else {
      sweep(width, [&](int64_t i, int64_t n)
                       GLM_INLINED { give(out + r * ld + i, take(x + r * stride + i, n), n); });
    }
  }
}

// out [words(rows), ld]: x with words across its rows; rows and columns that x lacks are zero.
template <class Words, class T>
void across_rows(const T* x, int64_t stride, int64_t rows, int64_t width, float* out, int64_t ld) {
  for (int64_t r = 0; r < rows; r += Words::per_word) {
    const T *upper = x + r * stride, *lower = r + 1 < rows ? upper + stride : nullptr;
    float* words = out + r / Words::per_word * ld;
    sweep(ld, [&](int64_t i, int64_t n) GLM_INLINED {
      const int64_t left = width - i < n ? width - i : n, count = left > 0 ? left : 0;
      vf a = take(upper + (count ? i : 0), count);
      if constexpr (Words::per_word == 2) {
        vf b = lower ? take(lower + (count ? i : 0), count) : all(0.0f);
        a = bits_as<vf>(bits_as<vu>(a) >> 16 | bits_as<vu>(b));
      }
      give(words + i, a, n);
    });
  }
}

// Per block of BLOCK rows: out [words(width), BLOCK], the transpose of its words along rows;
// missing rows are zero.
template <class Words, class T>
void transposed(const T* x, int64_t stride, int64_t rows, int64_t width, float* out,
                float* scratch) {
  const int64_t ld = words<Words>(width);
  for (int64_t j = 0; j < rows; j += BLOCK, out += ld * BLOCK) {
    const int64_t count = rows - j < BLOCK ? rows - j : BLOCK;
    along_rows<Words>(x + j * stride, stride, count, width, scratch);
    memset(scratch + count * ld, 0, size_t((BLOCK - count) * ld) * sizeof(float));
    const int64_t squares = ld / SIDE * SIDE;
    for (int64_t r = 0; r < BLOCK; r += SIDE)
      for (int64_t e = 0; e < squares; e += SIDE)
        transpose(scratch + r * ld + e, ld, SIDE,
                  [&](int64_t j) GLM_INLINED { return out + (e + j) * BLOCK + r; });
    for (int64_t e = squares; e < ld; ++e)
      for (int64_t r = 0; r < BLOCK; ++r) out[e * BLOCK + r] = scratch[r * ld + e];
  }
}

// Keys [first, last).
struct Span {
  int64_t first, last;
};

// The keys that at least one of the queries sees.
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
Span interval(int64_t start, int64_t end, int64_t base, int64_t size) {
  int64_t from = start - base, to = end - base;
  from = from < 0 ? 0 : from > size ? size : from;
  to = to < from ? from : to > size ? size : to;
  return {from, to};
}

void clear_outside(float* row, int64_t size, Span seen) {
  memset(row, 0, size_t(seen.first) * sizeof(float));
  memset(row + seen.last, 0, size_t(size - seen.last) * sizeof(float));
}

// Turns products q k of one query [size] into exponentials of the scores, zero outside `seen`;
// returns their sum.
float exponentials(float* row, int64_t size, Span seen, float scale) {
  clear_outside(row, size, seen);
  float* p = row + seen.first;
  const int64_t count = seen.last - seen.first;
  vf top = all(-INFINITY);
  sweep(count, [&](int64_t i, int64_t n) GLM_INLINED {
    vf s = (n == W ? load(p + i) : load_n(p + i, n)) * scale;
    give(p + i, s, n);
    top = larger(top, n == W ? s : load_n(p + i, n, -INFINITY));
  });
  const float m = largest(top);
  float total[1];
  sums(count, total, [&](int64_t i, int64_t n, vf* t) GLM_INLINED {
    vf e = without_denormals(exp(take(p + i, n) - m));
    give(p + i, e, n);
    t[0] += first(e, n);
  });
  return count ? total[0] : 1.0f;
}

// Turns a row of floats into words along the row, in place.
template <class Words>
void as_words(float* row, int64_t size) {
  if (Words::per_word == 1) return;
  bf16* out = reinterpret_cast<bf16*>(row);
  for (int64_t i = 0; i < size; i += W) store(out + i, load(row + i));
}

// Turns two rows of floats into words across them, overwriting the upper row.
void as_words_across(float* upper, const float* lower, int64_t size) {
  for (int64_t i = 0; i < size; i += NATIVE) {
    nu word = rounded(load<nf>(upper + i)) | rounded(load<nf>(lower + i)) << 16;
    store(upper + i, bits_as<nf>(word));
  }
}

// out [rows, width] = factor * sum, rounded; row r's factor is factors[r] if given.
template <class T>
void close(const float* sum, int64_t ld, int64_t rows, int64_t width, float factor,
           const float* divisors, T* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float f = divisors ? factor / divisors[r] : factor;
    sweep(width, [&](int64_t e, int64_t n)
                     GLM_INLINED { give(out + r * stride + e, take(sum + r * ld + e, n) * f, n); });
  }
}

// Keys [span.first, span.last) of one (batch, kv head), for a part of the queries.
struct Keys {
  Span span;
  float *kt, *v;  // per block [words(E), BLOCK]; [words(S), ld]
};

// One tile of queries of one head in scratch.
struct Tile {
  float *q, *p, *y, *sum;  // [TILE, words(E)], [TILE, S], [TILE, ld], [TILE]
};

template <class Words, class T>
void forward_tile(const AttentionForward<T>& a, int64_t b, int64_t h, int64_t first,
                  const Keys& keys, const Tile& t) {
  const int64_t queries = a.queries - first < TILE ? a.queries - first : TILE;
  const int64_t ld = padded(a.values, W), depth = words<Words>(a.width);
  const int32_t* start = a.key_start + b * a.queries + first;
  const int32_t* end = a.key_end + b * a.queries + first;
  const Span span = visible(start, end, queries, a.keys);
  const int64_t skip = span.first > keys.span.first ? span.first - keys.span.first : 0;
  const int64_t base = skip / BLOCK * BLOCK, from = keys.span.first + base;
  const int64_t count = span.last > from ? span.last - from : 0, size = padded(count, BLOCK);
  along_rows<Words>(a.q.at(b, first, h), a.q.row, queries, a.width, t.q);
  for (int64_t j = 0; j < size; j += BLOCK)
    product<Words>(queries, BLOCK, depth, {t.q, depth, 1}, keys.kt + (base + j) * depth, BLOCK,
                   t.p + j, size, false);
  for (int64_t i = 0; i < queries; ++i) {
    float* row = t.p + i * size;
    t.sum[i] = exponentials(row, size, interval(start[i], end[i], from, count), a.scale);
    as_words<Words>(row, size);
  }
  product<Words>(queries, ld, words<Words>(count), {t.p, size, 1},
                 keys.v + base / Words::per_word * ld, ld, t.y, ld, false);
  close(t.y, ld, queries, a.values, 1.0f, t.sum,
        a.y + ((b * a.queries + first) * a.heads + h) * a.values, a.heads * a.values);
}

template <class Words, class T>
void forward_unit(const AttentionForward<T>& a, int64_t unit) {
  const int64_t tiles = (a.queries + TILE - 1) / TILE, part = unit % a.parts;
  const int64_t b = unit / a.parts / a.kv_heads, g = unit / a.parts % a.kv_heads;
  const int64_t from = part * tiles / a.parts * TILE, to = (part + 1) * tiles / a.parts * TILE;
  const int64_t queries = (to < a.queries ? to : a.queries) - from;
  const int64_t ld = padded(a.values, W), depth = words<Words>(a.width);
  const int64_t at = b * a.queries + from;
  const Span span = visible(a.key_start + at, a.key_end + at, queries, a.keys);
  const int64_t count = span.last - span.first, size = padded(count, BLOCK);
  Scratch scratch(size * (depth + ld + TILE) + TILE * (depth + ld + 1) + BLOCK * depth);
  const Keys keys{span, scratch.take(size * depth), scratch.take(size * ld)};
  const Tile tile{scratch.take(TILE * depth), scratch.take(TILE * size), scratch.take(TILE * ld),
                  scratch.take(TILE)};
  transposed<Words>(a.k.at(b, span.first, g), a.k.row, count, a.width, keys.kt,
                    scratch.take(BLOCK * depth));
  across_rows<Words>(a.v.at(b, span.first, g), a.v.row, count, a.values, keys.v, ld);
  const int64_t shared = a.heads / a.kv_heads;
  for (int64_t first = from; first < from + queries; first += TILE)
    for (int64_t h = g * shared; h < (g + 1) * shared; ++h)
      forward_tile<Words>(a, b, h, first, keys, tile);
}

// Backward's scratch for one (batch, kv head): operands laid out for the products, gradient sums.
struct KeysGradients {
  float *k, *kt, *vt;  // [words(S), ld], per block [words(E), BLOCK] and [words(C), BLOCK]
  float *dk, *dv;      // [S, ld], [S, ldv]
};

// One tile of queries of one head.
struct TileGradients {
  float *q, *dy;    // [TILE, words(E)], [TILE, words(C)]
  float *qt, *dyt;  // [words(TILE), ld], [words(TILE), ldv], words across queries
  float *p, *dp;    // [TILE, S]
  float *ds, *dq;   // [TILE, words(S)], [TILE, ld]
};

// p: products q k of one query -> probabilities; dp: gradients of the probabilities -> of the
// scores, p (dp - sum(p dp)); both zero outside `seen`.
void score_gradients(float* p, float* dp, int64_t size, Span seen, float scale) {
  const float factor = 1.0f / exponentials(p, size, seen, scale);
  clear_outside(dp, size, seen);
  p += seen.first, dp += seen.first;
  const int64_t count = seen.last - seen.first;
  float total[1];
  sums(count, total, [&](int64_t i, int64_t n, vf* s) GLM_INLINED {
    vf x = without_denormals(take(p + i, n) * factor);
    give(p + i, x, n);
    s[0] = fma(x, take(dp + i, n), s[0]);
  });
  sweep(count, [&](int64_t i, int64_t n) GLM_INLINED {
    give(dp + i, without_denormals(take(p + i, n) * (take(dp + i, n) - total[0])), n);
  });
}

// Lays out the tile's probabilities and score gradients as words along and across queries. Returns
// the score gradients along rows, their row stride, and the stride between words across.
template <class Words>
Strided lay_out(const TileGradients& t, int64_t queries, int64_t size) {
  if (Words::per_word == 1) return {t.dp, size, 1};
  if (queries % 2)
    for (float* x : {t.p, t.dp}) memset(x + queries * size, 0, size_t(size) * sizeof(float));
  for (int64_t i = 0; i < queries; ++i) {
    bf16* out = reinterpret_cast<bf16*>(t.ds + i * size / 2);
    for (int64_t j = 0; j < size; j += W) store(out + j, load(t.dp + i * size + j));
  }
  for (int64_t i = 0; i < queries; i += 2)
    for (float* x : {t.p, t.dp}) as_words_across(x + i * size, x + (i + 1) * size, size);
  return {t.ds, size / 2, 1};
}

template <class Words, class T>
void backward_tile(const AttentionBackward<T>& a, int64_t b, int64_t h, int64_t first,
                   const KeysGradients& kv, const TileGradients& t) {
  const int64_t queries = a.queries - first < TILE ? a.queries - first : TILE;
  const int64_t ld = padded(a.width, W), depth = words<Words>(a.width);
  const int64_t ldv = padded(a.values, W), vdepth = words<Words>(a.values);
  const int32_t* start = a.key_start + b * a.queries + first;
  const int32_t* end = a.key_end + b * a.queries + first;
  const Span span = visible(start, end, queries, a.keys);
  const int64_t base = span.first / BLOCK * BLOCK, count = span.last - base;
  const int64_t size = padded(count, BLOCK);
  const T *q = a.q.at(b, first, h), *dy = a.dy.at(b, first, h);
  along_rows<Words>(q, a.q.row, queries, a.width, t.q);
  along_rows<Words>(dy, a.dy.row, queries, a.values, t.dy);
  across_rows<Words>(q, a.q.row, queries, a.width, t.qt, ld);
  across_rows<Words>(dy, a.dy.row, queries, a.values, t.dyt, ldv);
  for (int64_t j = 0; j < size; j += BLOCK) {
    const float *kt = kv.kt + (base + j) * depth, *vt = kv.vt + (base + j) * vdepth;
    product<Words>(queries, BLOCK, depth, {t.q, depth, 1}, kt, BLOCK, t.p + j, size, false);
    product<Words>(queries, BLOCK, vdepth, {t.dy, vdepth, 1}, vt, BLOCK, t.dp + j, size, false);
  }
  for (int64_t i = 0; i < queries; ++i)
    score_gradients(t.p + i * size, t.dp + i * size, size, interval(start[i], end[i], base, count),
                    a.scale);
  const Strided ds = lay_out<Words>(t, queries, size);
  const int64_t across = words<Words>(queries), step = Words::per_word * size;
  product<Words>(count, ldv, across, {t.p, 1, step}, t.dyt, ldv, kv.dv + base * ldv, ldv, true);
  product<Words>(count, ld, across, {t.dp, 1, step}, t.qt, ld, kv.dk + base * ld, ld, true);
  product<Words>(queries, ld, words<Words>(count), ds, kv.k + base / Words::per_word * ld, ld, t.dq,
                 ld, false);
  close(t.dq, ld, queries, a.width, a.scale, nullptr,
        a.dq + ((b * a.queries + first) * a.heads + h) * a.width, a.heads * a.width);
}

template <class Words, class T>
void backward_unit(const AttentionBackward<T>& a, int64_t b, int64_t g) {
  const int64_t ld = padded(a.width, W), depth = words<Words>(a.width);
  const int64_t ldv = padded(a.values, W), vdepth = words<Words>(a.values);
  const int64_t size = padded(a.keys, BLOCK), shared = a.heads / a.kv_heads;
  const int64_t deepest = depth > vdepth ? depth : vdepth;
  Scratch scratch(size * (2 * ld + ldv + depth + vdepth + 3 * TILE) +
                  TILE * (depth + vdepth + 2 * ld + ldv) + BLOCK * deepest);
  const auto zeros = [&](int64_t count) {
    float* p = scratch.take(count);
    memset(p, 0, size_t(count) * sizeof(float));
    return p;
  };
  KeysGradients kv;
  TileGradients t;
  kv.k = zeros(size * ld), kv.dk = zeros(size * ld), kv.dv = zeros(size * ldv);
  kv.kt = scratch.take(size * depth), kv.vt = scratch.take(size * vdepth);
  t.q = scratch.take(TILE * depth), t.dy = scratch.take(TILE * vdepth);
  t.qt = scratch.take(TILE * ld), t.dyt = scratch.take(TILE * ldv), t.dq = scratch.take(TILE * ld);
  for (float** p : {&t.p, &t.dp, &t.ds}) *p = scratch.take(TILE * size);
  float* block = scratch.take(BLOCK * deepest);
  across_rows<Words>(a.k.at(b, 0, g), a.k.row, a.keys, a.width, kv.k, ld);
  transposed<Words>(a.k.at(b, 0, g), a.k.row, a.keys, a.width, kv.kt, block);
  transposed<Words>(a.v.at(b, 0, g), a.v.row, a.keys, a.values, kv.vt, block);
  for (int64_t h = g * shared; h < (g + 1) * shared; ++h)
    for (int64_t first = 0; first < a.queries; first += TILE)
      backward_tile<Words>(a, b, h, first, kv, t);
  const int64_t at = b * a.keys * a.kv_heads + g;
  close(kv.dk, ld, a.keys, a.width, a.scale, nullptr, a.dk + at * a.width, a.kv_heads * a.width);
  close(kv.dv, ldv, a.keys, a.values, 1.0f, nullptr, a.dv + at * a.values, a.kv_heads * a.values);
}

}  // namespace

// Units: B * K * parts.
template <class T>
void attention_forward(const AttentionForward<T>& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit)
    if constexpr (sizeof(T) == 2)
      has_pair_products() ? forward_unit<Pair>(a, unit) : forward_unit<Single>(a, unit);
    else
      forward_unit<Single>(a, unit);
}

// Units: B * K.
template <class T>
void attention_backward(const AttentionBackward<T>& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.kv_heads, g = unit % a.kv_heads;
    if constexpr (sizeof(T) == 2)
      has_pair_products() ? backward_unit<Pair>(a, b, g) : backward_unit<Single>(a, b, g);
    else
      backward_unit<Single>(a, b, g);
  }
}

GLM_INSTANTIATE(attention_forward, AttentionForward)
GLM_INSTANTIATE(attention_backward, AttentionBackward)

}  // namespace glm::GLM_ISA
