// Products with quantised weights in a checkpoint's own layout. Shapes: N rows, D inputs, F
// features.
//
// A vector of weights has W words: 4 W codes of 8 bits, or 8 W codes of 4 bits. Once per call,
// quantized_input rearranges the inputs to match the lanes of the weights, which are many more and
// stay as they are.
//
// The exact product sums in 16 lanes on every machine, those that AVX-512 has anyway
// (docs/exact.md). A shorter vector holds a part of them, and a span of inputs is gone through once
// for each part.
#include <type_traits>

#include "codes.h"
#include "kernels.h"

namespace glm::GLM_ISA {

namespace {

enum Groups { ROW, SMALL, LARGE };  // inputs that share a scale: a whole row, 32, a multiple of 128

#if defined(GLM_EXACT) && GLM_PORTABLE_OF(GLM_ISA)
// where each fma may be a call, larger tiles take long to compile and gain little
constexpr int FEATURES = 1;
#else
constexpr int FEATURES = 4;
#endif
constexpr int ROWS = 4;
// sums of 2 features and 4 rows fill 16 registers
constexpr int FEATURES_OF_ROWS = REGISTERS == 32 ? 4 : 2;
// Inputs that are summed by themselves: whole vectors of weights, and a part of a large group.
constexpr int64_t SPAN = input_padding;
// The vectors that hold the lanes of one sum.
constexpr int PARTS = EXACT ? exact_lanes / W : 1;

// quantized_product's arguments without the type of bias and result, so that the many tiles below
// are compiled once instead of once per type.
struct Product {
  Codes w;
  const void* bias;
  const float* values;
  const int8_t* codes;
  const float* steps;
  const int32_t* excess;
  void* y;
  int64_t rows, features, padded;
  int64_t group;  // inputs that share a scale; divided here, since a division costs a tile dearly
  bool is_bf16;

  template <class T>
  void write(int64_t n, int64_t f, float s) const {
    const T* b = static_cast<const T*>(bias);
    put(static_cast<T*>(y) + n * features + f, b ? s + get(b + f) : s);
  }
};

// Adds the products of a vector of weights at input i, for R features and M rows from n on. Both
// codes are int8. The scales of small groups are applied here, other scales in `tile`.
template <int BITS, Groups G, bool VNNI>
struct Rounded {
  const Product& a;
  static constexpr int64_t inputs = per_vector(BITS);  // of one call of `add`
  static constexpr bool features_in_lanes = false, has_all_parts = false;
  static constexpr int64_t step_lanes = BITS == 4 ? 8 : 4;

  GLM_INLINED static vi dot(vi start, vi words, vi x, vi second) {
    if (BITS == 4) return add_nibbles<VNNI>(start, unsigned_nibbles(words), x, second);
    if (VNNI) return add_unsigned<VNNI>(start, words ^ int32_t(0x80808080), x);
    return add_signed(vi{}, words, x);
  }

  template <int R, int M>
  GLM_INLINED void add(vf (&part)[R][M], int64_t i, const int8_t* const* w,
                       const uint16_t* const* scale, int64_t n, int) const {
    const int64_t block = i / rounded_block;
    vi words[R];
    vf size[R];
    for (int r = 0; r < R; ++r) {
      words[r] = load_words(w[r]);
      if (G == SMALL)
        size[r] = spread<rounded_block / step_lanes>(scale[r] + block, a.w.groups - block);
    }
    for (int m = 0; m < M; ++m) {
      const int64_t at = (n + m) * a.padded + i, lanes = int64_t(uint64_t(at) / step_lanes);
      const vi x = load_words(a.codes + at),
               second = load_words(a.codes + at + (BITS == 4) * 4 * W);
      const vi start = load_words(a.excess + lanes);
      const vf step = load(a.steps + lanes);
      for (int r = 0; r < R; ++r) {
        const vf s = to_float(dot(start, words[r], x, second));
        part[r][m] = fma(s, G == SMALL ? step * size[r] : step, part[r][m]);
      }
    }
  }
};

#if defined(GLM_ARM) && !defined(GLM_EXACT)
// The same a block of inputs at a time. The sums of codes' products are exact, so a result has the
// same bits whichever instruction made them. Lane r belongs to feature r.
template <int BITS, Groups G>
struct Blocks {
  const Product& a;
  static constexpr int64_t inputs = rounded_block;
  static constexpr bool features_in_lanes = true, has_all_parts = false;

  template <int R, int M>
  GLM_INLINED void add(vf (&part)[R][M], int64_t i, const int8_t* const* w,
                       const uint16_t* const* scale, int64_t n, int) const {
    Block weights[R], x[M];
    vf size = {};
    for (int r = 0; r < R; ++r) {
      weights[r] = weights_of_block<BITS>(w[r]);
      if (G == SMALL) size[r] = from_half(scale[r][i / rounded_block]);
    }
    for (int m = 0; m < M; ++m) x[m] = load_block(a.codes + (n + m) * a.padded + i);
    vi sums[M];
    block_sums(weights, x, sums);
    for (int m = 0; m < M; ++m) {
      const float step = a.steps[uint64_t((n + m) * a.padded + i) / (BITS == 4 ? 8 : 4)];
      const vf s = sums_as_floats<BITS>(sums[m]);
      part[0][m] = fma(s, G == SMALL ? size * step : all(step), part[0][m]);
    }
  }
};
#endif

// The same for float inputs.
template <int BITS, Groups G>
struct Whole {
  const Product& a;
  static constexpr int64_t inputs = per_vector(BITS);
  // whether a vector of weights has inputs of every part's lanes
  static constexpr bool features_in_lanes = false, has_all_parts = BITS == 8;

  template <int K, int R, int M>
  GLM_INLINED void nibbles(vf (&part)[R][M], const vi (&words)[R], const float* x) const {
    vf w[R];
    for (int r = 0; r < R; ++r) w[r] = nibble<K>(words[r]);
    for (int m = 0; m < M; ++m) {
      const vf v = load(x + m * a.padded + K * W);
      for (int r = 0; r < R; ++r) part[r][m] = fma(w[r], v, part[r][m]);
    }
    if constexpr (K < 7) nibbles<K + 1>(part, words, x);
  }

  template <int R, int M>
  GLM_INLINED void add(vf (&part)[R][M], int64_t i, const int8_t* const* w,
                       const uint16_t* const* scale, int64_t n, int p) const {
    const float* x = a.values + n * a.padded + i;
    const int64_t groups = a.w.groups;
    if constexpr (BITS == 4) {
      vf few[R][M] = {};
      vi words[R];
      for (int r = 0; r < R; ++r) words[r] = load_words(w[r]);
      nibbles<0>(G == SMALL ? few : part, words, x);
      if (G != SMALL) return;
      for (int r = 0; r < R; ++r) {
        const vf size = spread<4>(scale[r] + i / rounded_block, groups - i / rounded_block);
        for (int m = 0; m < M; ++m) part[r][m] = fma(few[r][m], size, part[r][m]);
      }
      return;
    }
    for (int k = p; k < 4; k += PARTS)
      for (int r = 0; r < R; ++r) {
        vf v = bytes(w[r], k);
        if (G == SMALL) {  // exact: 8 bits times 11
          const int64_t group = (i + k * W) / rounded_block;
          v = v * from_half(scale[r][group < groups ? group : groups - 1]);
        }
        for (int m = 0; m < M; ++m) part[r][m] = fma(v, load(x + m * a.padded + k * W), part[r][m]);
      }
  }
};

// Gives each feature, which has one lane of part[0], a vector of its own, otherwise zero.
template <int R, int M>
GLM_INLINE void from_lanes(vf (&part)[R][M]) {
  for (int m = 0; m < M; ++m) {
    const vi all = bits_as<vi>(part[0][m]);
    for (int r = 0; r < R; ++r) {
      vi lane = {};
      lane[r] = -1;
      part[r][m] = bits_as<vf>(all & lane);
    }
  }
}

GLM_INLINE float sum_of_lanes(vf x) {
#if defined(GLM_ARM) && defined(GLM_EXACT)
  return (x[0] + x[2]) + (x[1] + x[3]);  // by halves, as on other machines; `sum` adds neighbours
#else
  return sum(x);
#endif
}

// R features f, f + apart, ..., and rows n to n + M. The order in which a result is summed depends
// on neither: SPAN inputs are summed by themselves, which rounds less and scales a large group
// once.
template <int BITS, Groups G, int R, int M, class Kind>
void tile(const Kind& kind, const Product& a, int64_t f, int64_t apart, int64_t n) {
  constexpr int64_t step = Kind::inputs;
  const int64_t width = a.w.width, row_bytes = width * BITS / 8;
  const int8_t* w[R];
  const uint16_t* scale[R];
  for (int r = 0; r < R; ++r) {
    w[r] = a.w.weight + (f + r * apart) * row_bytes;
    scale[r] = a.w.scale + (f + r * apart) * a.w.groups;
    fetch_ahead(scale[r]);
  }
  vf totals[PARTS][R][M] = {};
  const auto span = [&](int64_t i, int64_t inputs, const float* size) GLM_INLINED {
    for (int r = 0; r < R; ++r)
      for (int64_t line = 0; line < SPAN * BITS / 8; line += line_bytes) fetch_ahead(w[r] + line);
    for (int p = 0; p < PARTS; ++p) {
      vf part[R][M] = {};
      vf(&total)[R][M] = totals[p];
      if constexpr (PARTS == 1) {
        for (int64_t j = 0; j < inputs; j += step) {
          kind.add(part, i + j, w, scale, n, 0);
          for (int r = 0; r < R; ++r) w[r] += step * BITS / 8;
        }
      } else {
        constexpr bool all = Kind::has_all_parts;
        for (int64_t j = all ? 0 : p * step; j < inputs; j += all ? step : PARTS * step) {
          const int8_t* at[R];
          for (int r = 0; r < R; ++r) at[r] = w[r] + j * BITS / 8;
          kind.add(part, i + j, at, scale, n, p);
        }
      }
      if constexpr (Kind::features_in_lanes) from_lanes(part);
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m)
          if constexpr (G == LARGE)
            total[r][m] = fma(part[r][m], size[r * W], total[r][m]);
          else
            total[r][m] += part[r][m];
    }
    for (int r = 0; PARTS > 1 && r < R; ++r) w[r] += SPAN * BITS / 8;
  };
  float sizes[R][W];  // scales of W large groups at a time
  const int64_t whole = width - width % SPAN, stretch = G == LARGE ? W * a.group : whole;
  for (int64_t begin = 0, first = 0; begin < whole; begin += stretch, first += W) {
    const int64_t end = whole - begin < stretch ? whole : begin + stretch;
    if (G == LARGE)
      for (int r = 0; r < R; ++r)
        from_halves(scale[r] + first, a.w.groups - first < W ? a.w.groups - first : W, sizes[r]);
    const float* size = sizes[0];
    for (int64_t i = begin, left = a.group; i < end; i += SPAN) {
      span(i, SPAN, size);
      if (G == LARGE && !(left -= SPAN)) left = a.group, ++size;
    }
  }
  if (G != LARGE && whole < width) {
    // Inputs behind the width are zeros, so any weights do there: those of the next features, where
    // the matrix goes on for long enough.
    constexpr int64_t bytes = SPAN * BITS / 8;
    int8_t rest[R][bytes];
    const bool inside = (a.features - 1 - f - (R - 1) * apart) * row_bytes >= bytes;
    for (int r = 0; !inside && r < R; ++r) {
      memset(rest[r], 0, bytes);
      memcpy(rest[r], w[r], size_t(row_bytes - whole * BITS / 8));
      w[r] = rest[r];
    }
    span(whole, width - whole, sizes[0]);
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      for (int half = PARTS / 2; half; half /= 2)
        for (int p = 0; p < half; ++p) totals[p][r][m] += totals[p + half][r][m];
      const float s = sum_of_lanes(totals[0][r][m]) * (G == ROW ? from_half(*scale[r]) : 1.0f);
      a.is_bf16 ? a.write<bf16>(n + m, f + r * apart, s) : a.write<float>(n + m, f + r * apart, s);
    }
}

template <int BITS, Groups G, int R, class Kind>
void rows(const Kind& kind, const Product& a, int64_t f, int64_t apart) {
  int64_t n = 0;
  constexpr int some = R < FEATURES_OF_ROWS ? R : FEATURES_OF_ROWS;
  if constexpr (!EXACT || R > 1)  // fewer tiles to compile
    for (; n + ROWS <= a.rows; n += ROWS)
      for (int r = 0; r < R; r += some) tile<BITS, G, some, ROWS>(kind, a, f + r * apart, apart, n);
  for (; n < a.rows; ++n) tile<BITS, G, R, 1>(kind, a, f, apart, n);
}

template <int BITS, Groups G, class Kind>
void features(const Kind& kind, const Product& a, int64_t begin, int64_t end) {
  // Features lie far apart, so that each is one long stream. The CPU's own prefetching follows a
  // few streams, and `fetch_ahead` helps it; with neighbouring rows that reads half as fast.
  const int64_t apart = (end - begin) / FEATURES;
  for (int64_t i = 0; i < apart; ++i) rows<BITS, G, FEATURES>(kind, a, begin + i, apart);
  for (int64_t f = begin + FEATURES * apart; f < end; ++f) rows<BITS, G, 1>(kind, a, f, 1);
}

template <int BITS, Groups G>
void by_kind(const Product& a, int64_t begin, int64_t end) {
  if (!a.codes) return features<BITS, G>(Whole<BITS, G>{a}, a, begin, end);
#if defined(__AVX512F__)
  if (has_byte_products()) return features<BITS, G>(Rounded<BITS, G, true>{a}, a, begin, end);
#endif
#if defined(GLM_ARM) && !defined(GLM_EXACT)
  features<BITS, G>(Blocks<BITS, G>{a}, a, begin, end);
#else
  features<BITS, G>(Rounded<BITS, G, false>{a}, a, begin, end);
#endif
}

template <int BITS>
void by_groups(const Product& a, int64_t begin, int64_t end) {
  if (a.w.groups == 1) return by_kind<BITS, ROW>(a, begin, end);
  if (a.group == rounded_block) return by_kind<BITS, SMALL>(a, begin, end);
  by_kind<BITS, LARGE>(a, begin, end);
}

}  // namespace

template <class T>
void quantized_product(const QuantizedProduct<T>& a, int64_t begin, int64_t end) {
  const Product p{a.w,
                  a.bias,
                  a.values,
                  a.codes,
                  a.steps,
                  a.excess,
                  a.y,
                  a.rows,
                  a.features,
                  a.padded,
                  a.w.width / a.w.groups,
                  std::is_same_v<T, bf16>};
  p.w.bits == 4 ? by_groups<4>(p, begin, end) : by_groups<8>(p, begin, end);
}

template <class T>
void dequantize(const Dequantize<T>& a, int64_t begin, int64_t end) {
  const Codes& c = a.codes;
  const int64_t group = c.width / c.groups;
  constexpr int64_t most = 256;
  float values[most];
  for (int64_t f = begin; f < end; ++f)
    for (int64_t i = 0; i < c.width; i += most) {
      const int64_t stop = i + most < c.width ? i + most : c.width;
      const int8_t* p = c.weight + (f * c.width + i) * c.bits / 8;
      if (c.bits == 4) {
        for (int64_t j = 0; j < (stop - i) / 2; ++j) {
          values[2 * j] = float(p[j] >> 4);
          values[2 * j + 1] = float(int8_t(uint8_t(p[j]) << 4) >> 4);
        }
      } else {
        for (int64_t j = 0; j < stop - i; ++j) values[j] = float(p[j]);
      }
      for (int64_t at = i; at < stop;) {
        const int64_t g = at / group, next = (g + 1) * group < stop ? (g + 1) * group : stop;
        const float s = from_half(c.scale[f * c.groups + g]);
        sweep(next - at, [&](int64_t j, int64_t n) GLM_INLINED {
          give(a.w + f * c.width + at + j, take(values + at - i + j, n) * s, n);
        });
        at = next;
      }
    }
}

GLM_INSTANTIATE(quantized_product, QuantizedProduct)
#if !defined(GLM_EXACT)
GLM_INSTANTIATE(dequantize, Dequantize)
#endif

}  // namespace glm::GLM_ISA
