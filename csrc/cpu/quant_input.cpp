// Inputs of products with quantised weights: rearranges them to match the lanes of the weights, and
// rounds them to int8 codes in blocks of 32.
#include "codes.h"
#include "kernels.h"

namespace glm::GLM_ISA {

namespace {

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
#if defined(__AVX2__)
  const auto whole = [&](int p) GLM_INLINED { return __builtin_convertvector(v[p], vi); };
#if defined(__AVX512F__)
  const auto bytes = [&](int half) GLM_INLINED {
    return _mm512_maskz_cvtepi32_epi8(0xffff, bits_as<__m512i>(whole(half)));
  };
#else
  const auto words = [&](int p) GLM_INLINED {
    const __m256i x = bits_as<__m256i>(whole(p));
    return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  };
  const auto bytes = [&](int half) GLM_INLINED {
    return _mm_packs_epi16(words(2 * half), words(2 * half + 1));
  };
#endif
  const auto keep = [&](int64_t at, __m128i x) GLM_INLINED { memcpy(codes + at, &x, sizeof x); };
  const __m128i a = bytes(0), b = bytes(1);
  if (BITS == 8) return keep(0, a), keep(16, b);
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
GLM_INSTANTIATE(round_activations, RoundActivations)

}  // namespace glm::GLM_ISA
