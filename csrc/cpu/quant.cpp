// Products with quantised weights in a checkpoint's own layout. Shapes: N rows, D inputs, F
// features.
//
// A vector of weights has W words: 4 W codes of 8 bits, or 8 W codes of 4 bits. Once per call, the
// inputs are rearranged to match the lanes of the weights, which are many more and stay as they
// are.
#include <type_traits>

#include "codes.h"
#include "kernels.h"

namespace glm::GLM_ISA {

namespace {

enum Groups { ROW, SMALL, LARGE };  // inputs that share a scale: a whole row, 32, a multiple of 128

#if defined(__AVX512F__)
constexpr int FEATURES = 4;
#else
constexpr int FEATURES = 2;
#endif
constexpr int ROWS = 4;

constexpr int64_t per_vector(int bits) { return bits == 4 ? 8 * W : 4 * W; }

// Returns the scales of the vector of weights at input i of a feature with scales s; `large` is the
// scale of its large group, loaded once per group.
template <int BITS, Groups G>
GLM_INLINE vf scale_at(const Codes& c, const uint16_t* s, vf large, int64_t i) {
  if (G == LARGE) return large;
  return spread<BITS == 4 ? 4 : 8>(s + i / rounded_block, c.groups - i / rounded_block);
}

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
  bool is_bf16;

  template <class T>
  void write(int64_t n, int64_t f, float s) const {
    const T* b = static_cast<const T*>(bias);
    put(static_cast<T*>(y) + n * features + f, b ? s + get(b + f) : s);
  }
};

// Products of int8 codes of weights and of inputs.
template <int BITS, Groups G, bool VNNI>
struct Rounded {
  const Product& a;
  static constexpr int64_t step_lanes = BITS == 4 ? 8 : 4;

  template <int R, int M>
  GLM_INLINED void add(vf (&total)[R][M], int64_t i, const int8_t* const* w,
                       const uint16_t* const* scale, const vf* large, int64_t n) const {
    vi high[R], low[R];
    vf size[R];
    for (int r = 0; r < R; ++r) {
      const vi words = load_words(w[r]);
      if (BITS == 4) {
        const Nibbles nibbles = unsigned_nibbles(words);
        high[r] = nibbles.high, low[r] = nibbles.low;
      } else {
        high[r] = VNNI ? words ^ int32_t(0x80808080) : words;
      }
      if (G != ROW) size[r] = scale_at<BITS, G>(a.w, scale[r], large[r], i);
    }
    for (int m = 0; m < M; ++m) {
      const int64_t lanes = ((n + m) * a.padded + i) / step_lanes;
      const int8_t* codes = a.codes + (n + m) * a.padded + i;
      const vi x = load_words(codes), second = BITS == 4 ? load_words(codes + 4 * W) : x;
      const vi start = BITS == 4 || VNNI ? load_words(a.excess + lanes) : vi{};
      const vf step = load(a.steps + lanes);
      for (int r = 0; r < R; ++r) {
        vi s;
        if (BITS == 4)
          s = add_unsigned<VNNI>(add_unsigned<VNNI>(start, high[r], x), low[r], second);
        else
          s = VNNI ? add_unsigned<VNNI>(start, high[r], x) : add_signed(start, high[r], x);
        total[r][m] = fma(to_float(s), G == ROW ? step : step * size[r], total[r][m]);
      }
    }
  }
};

// Products of the weights' codes with float inputs.
template <int BITS, Groups G>
struct Whole {
  const Product& a;

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
  GLM_INLINED void add(vf (&total)[R][M], int64_t i, const int8_t* const* w,
                       const uint16_t* const* scale, const vf* large, int64_t n) const {
    const float* x = a.values + n * a.padded + i;
    vf part[R][M] = {};
    if constexpr (BITS == 4) {
      vi words[R];
      for (int r = 0; r < R; ++r) words[r] = load_words(w[r]);
      nibbles<0>(part, words, x);
      for (int r = 0; r < R; ++r) {
        const vf size = G == ROW ? vf{} : scale_at<BITS, G>(a.w, scale[r], large[r], i);
        for (int m = 0; m < M; ++m)
          total[r][m] = G == ROW ? total[r][m] + part[r][m] : fma(part[r][m], size, total[r][m]);
      }
      return;
    }
    for (int k = 0; k < 4; ++k)
      for (int r = 0; r < R; ++r) {
        vf v = bytes(w[r] + k * W);
        if (G == SMALL) {  // exact: 8 bits times 11
          const int64_t group = (i + k * W) / rounded_block;
          v = v * from_half(scale[r][group < a.w.groups ? group : a.w.groups - 1]);
        }
        for (int m = 0; m < M; ++m) part[r][m] = fma(v, load(x + m * a.padded + k * W), part[r][m]);
      }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        total[r][m] =
            G == LARGE ? fma(part[r][m], large[r], total[r][m]) : total[r][m] + part[r][m];
  }
};

// R features f, f + apart, ..., and rows n to n + M. The order in which a result is summed depends
// on neither.
template <int BITS, Groups G, int R, int M, class Kind>
void tile(const Kind& kind, const Product& a, int64_t f, int64_t apart, int64_t n) {
  constexpr int64_t step = per_vector(BITS);
  const int64_t row_bytes = a.w.width * BITS / 8, whole = a.w.width / step * step;
  const int8_t* w[R];
  const uint16_t* scale[R];
  for (int r = 0; r < R; ++r) {
    w[r] = a.w.weight + (f + r * apart) * row_bytes;
    scale[r] = a.w.scale + (f + r * apart) * a.w.groups;
  }
  vf total[R][M] = {}, large[R] = {};
  float sizes[R][W];  // scales of W large groups at a time
  const int64_t group = G == LARGE ? a.w.width / a.w.groups : whole;
  const int64_t part = G == LARGE ? W * group : whole;
  for (int64_t begin = 0; begin < whole; begin += part) {
    const int64_t end = whole - begin < part ? whole : begin + part;
    if (G == LARGE)
      for (int r = 0; r < R; ++r)
        from_halves(scale[r] + begin / group, (end - begin) / group, sizes[r]);
    const float* size = sizes[0];
    for (int64_t i = begin, left = group; i < end; i += step) {
      if (G == LARGE)
        for (int r = 0; r < R; ++r) large[r] = all(size[r * W]);
      kind.add(total, i, w, scale, large, n);
      for (int r = 0; r < R; ++r) w[r] += 4 * W;
      if (G == LARGE && !(left -= step)) left = group, ++size;
    }
  }
  if (whole < a.w.width) {
    int8_t rest[R][4 * W] = {};
    for (int r = 0; r < R; ++r) {
      memcpy(rest[r], w[r], size_t(row_bytes - whole * BITS / 8));
      w[r] = rest[r];
    }
    kind.add(total, whole, w, scale, large, n);
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      const float s = sum(total[r][m]) * (G == ROW ? from_half(*scale[r]) : 1.0f);
      a.is_bf16 ? a.write<bf16>(n + m, f + r * apart, s) : a.write<float>(n + m, f + r * apart, s);
    }
}

template <int BITS, Groups G, int R, class Kind>
void rows(const Kind& kind, const Product& a, int64_t f, int64_t apart) {
  int64_t n = 0;
  for (; n + ROWS <= a.rows; n += ROWS) tile<BITS, G, R, ROWS>(kind, a, f, apart, n);
  for (; n < a.rows; ++n) tile<BITS, G, R, 1>(kind, a, f, apart, n);
}

template <int BITS, Groups G, class Kind>
void features(const Kind& kind, const Product& a, int64_t begin, int64_t end) {
  // Features lie far apart, so that each is one long stream. The CPU's own prefetching follows a
  // few streams, and reads twice as fast as explicit prefetching of neighbouring rows.
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
  features<BITS, G>(Rounded<BITS, G, false>{a}, a, begin, end);
}

template <int BITS>
void by_groups(const Product& a, int64_t begin, int64_t end) {
  if (a.w.groups == 1) return by_kind<BITS, ROW>(a, begin, end);
  if (a.w.width / a.w.groups == rounded_block) return by_kind<BITS, SMALL>(a, begin, end);
  by_kind<BITS, LARGE>(a, begin, end);
}

// Returns the place of input i in the rearranged inputs of its vector.
template <int BITS>
constexpr int64_t place_of_code(int64_t i) {
  if (BITS == 8) return i;
  const int64_t in = i % (8 * W);
  return i - in + in / 2 + (in % 2 ? 4 * W : 0);  // even elements are the high nibbles
}

template <int BITS>
constexpr int64_t place_of_value(int64_t i) {
  if (BITS == 8) return i;
  const int64_t in = i % (8 * W), nibble = in % 8 ^ 1;
  return i - in + nibble * W + in / 8;
}

constexpr int PARTS = rounded_block / W;

// Rounds a block of inputs, of which n exist, to integers in [-127, 127]. Returns the step. Where
// an input is NaN or infinite, so is the step, and all integers are 0.
template <class T>
float round_block(const T* x, int64_t n, vf (&out)[PARTS]) {
  vi top = {};  // as integers, magnitudes have the same order, and a NaN is above all
  for (int p = 0; p < PARTS; ++p) {
    const int64_t left = n - p * W;
    out[p] = left >= W ? load(x + p * W) : left > 0 ? load_n(x + p * W, left) : vf{};
    top = larger(top, bits_as<vi>(out[p]) & 0x7fffffff);
  }
  const float step = bits_as<float>(largest(top)) / 127.0f;
  const bool usable = step > 0 && step <= 3.4e38f;
  for (vf& v : out) {
    v = usable ? at_least(at_most(v / step, 127.0f), -127.0f) : vf{};
    v = (v + 0x1.8p+23f) - 0x1.8p+23f;  // to nearest, half to even
  }
  return step;
}

// Stores the codes of one block in the order in which the weights' lanes need them.
template <int BITS>
GLM_INLINE void place(int8_t* codes, const vf (&v)[PARTS]) {
#if defined(__AVX512F__)
  const auto bytes = [](vf x) GLM_INLINED {
    const vi whole = __builtin_convertvector(x, vi);
    return _mm512_maskz_cvtepi32_epi8(0xffff, bits_as<__m512i>(whole));
  };
  const auto keep = [&](int64_t at, __m128i x) GLM_INLINED { memcpy(codes + at, &x, sizeof x); };
  const __m128i a = bytes(v[0]), b = bytes(v[1]);
  if (BITS == 8) return keep(0, a), keep(W, b);
  const __m128i lower = _mm_set1_epi16(0xff);
  keep(0, _mm_packus_epi16(_mm_and_si128(a, lower), _mm_and_si128(b, lower)));
  keep(4 * W, _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
#else
  int32_t code[rounded_block];
  for (int p = 0; p < PARTS; ++p) {
    const vi whole = __builtin_convertvector(v[p], vi);
    memcpy(code + p * W, &whole, sizeof whole);
  }
  if (BITS == 8)
    for (int j = 0; j < rounded_block; ++j) codes[j] = int8_t(code[j]);
  else
    for (int j = 0; j < rounded_block / 2; ++j) {
      codes[j] = int8_t(code[2 * j]);
      codes[j + 4 * W] = int8_t(code[2 * j + 1]);
    }
#endif
}

template <int BITS, class T>
void input_codes(const QuantizedInput<T>& a, int64_t row) {
  constexpr int64_t share = BITS == 4 ? 8 : 4, unsigned_by = BITS == 4 ? 8 : 128;
  const vi ones = vi{} + 0x01010101;
  for (int64_t i = 0; i < a.padded; i += input_padding) {
    const int64_t at = row * a.padded + i;
    for (int64_t j = 0; j < input_padding; j += rounded_block) {
      vf v[PARTS];
      const float step = round_block(a.x + row * a.width + i + j, a.width - i - j, v);
      place<BITS>(a.codes + at + place_of_code<BITS>(j), v);
      for (int64_t k = 0; k < rounded_block / share; ++k) a.steps[(at + j) / share + k] = step;
    }
    for (int64_t j = at; j < at + input_padding; j += per_vector(BITS)) {
      vi total = add_unsigned<false>(vi{}, ones, load_words(a.codes + j));
      if (BITS == 4) total = add_unsigned<false>(total, ones, load_words(a.codes + j + 4 * W));
      total *= int32_t(-unsigned_by);
      memcpy(a.excess + j / share, &total, sizeof total);
    }
  }
}

template <int BITS, class T>
void input_values(const QuantizedInput<T>& a, int64_t row) {
  constexpr int64_t vector = per_vector(BITS);
  const T* x = a.x + row * a.width;
  float* values = a.values + row * a.padded;
  const int64_t whole = a.width / vector * vector;
  for (int64_t i = 0; i < whole; i += vector)
    for (int64_t j = 0; j < vector; ++j) values[i + place_of_value<BITS>(j)] = get(x + i + j);
  for (int64_t i = whole; i < a.padded; ++i)
    values[place_of_value<BITS>(i)] = i < a.width ? get(x + i) : 0.0f;
}

template <int BITS, class T>
void input(const QuantizedInput<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    a.codes ? input_codes<BITS>(a, row) : input_values<BITS>(a, row);
}

}  // namespace

template <class T>
void quantized_input(const QuantizedInput<T>& a, int64_t begin, int64_t end) {
  a.bits == 4 ? input<4>(a, begin, end) : input<8>(a, begin, end);
}

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

template <class T>
void round_activations(const RoundActivations<T>& a, int64_t begin, int64_t end) {
  vf v[PARTS];
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = 0; i < a.width; i += rounded_block) {
      const int64_t left = a.width - i, n = left < rounded_block ? left : rounded_block;
      const float step = round_block(a.x + row * a.width + i, left, v);
      T* y = a.y + row * a.width + i;
      sweep(n, [&](int64_t j, int64_t count) GLM_INLINED { give(y + j, v[j / W] * step, count); });
    }
}

GLM_INSTANTIATE(quantized_input, QuantizedInput)
GLM_INSTANTIATE(quantized_product, QuantizedProduct)
GLM_INSTANTIATE(dequantize, Dequantize)
GLM_INSTANTIATE(round_activations, RoundActivations)

}  // namespace glm::GLM_ISA
