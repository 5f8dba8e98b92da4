// Arithmetic on quantised weights: converts codes to floats, and sums products of codes. A word is
// 4 bytes; a vector of words holds the codes of W lanes.
#pragma once

#define GLM_CODES 1
#include "vec.h"
#if defined(GLM_ARM)
#include "codes_arm.h"
#endif

namespace glm::GLM_ISA {

// Codes in a vector of weights.
constexpr int64_t per_vector(int bits) { return bits == 4 ? 8 * W : 4 * W; }

GLM_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

GLM_INLINE float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(GLM_ARM)
  return half_to_float(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  if ((h & 0x7c00) == 0x7c00) return bits_as<float>(sign | 0x7f800000 | rest);
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(rest) * 0x1p+112f));
#endif
}

// The first n <= W of p, as floats.
GLM_INLINE void from_halves(const uint16_t* p, int64_t n, float* out) {
#if defined(__AVX512F__)
  const __mmask16 some = __mmask16((1u << n) - 1);
  store(out, bits_as<vf>(_mm512_maskz_cvtph_ps(some, _mm256_maskz_loadu_epi16(some, p))));
#else
#if defined(__AVX2__)
  if (n == W)
    return store(
        out, bits_as<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#endif
  for (int64_t i = 0; i < n; ++i) out[i] = from_half(p[i]);
#endif
}

// Both nibbles of every byte as unsigned bytes that are 8 too large; `low` holds the lower ones.
struct Nibbles {
  vi high, low;
};
GLM_INLINE Nibbles unsigned_nibbles(vi w) {
#if defined(__AVX512F__)
  const auto turned = [](vi x) GLM_INLINED {  // (x ^ 8) & 15
    return bits_as<vi>(_mm512_maskz_ternarylogic_epi32(
        0xffff, bits_as<__m512i>(x), _mm512_set1_epi8(8), _mm512_set1_epi8(15), 0x28));
  };
  return {turned(bits_as<vi>(bits_as<vu>(w) >> 4)), turned(w)};
#else
  const vu turned = bits_as<vu>(w) ^ 0x88888888u;
  return {bits_as<vi>((turned >> 4) & 0x0f0f0f0fu), bits_as<vi>(turned & 0x0f0f0f0fu)};
#endif
}

// Nibble k of every word, as floats; nibbles are signed.
template <int K>
GLM_INLINE vf nibble(vi w) {
#if defined(__AVX512F__)
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  // the permutation reads the low four bits alone
  const vu shifted = bits_as<vu>(w) >> (4 * K);
  return bits_as<vf>(_mm512_maskz_permutexvar_ps(0xffff, bits_as<__m512i>(shifted), values));
#elif defined(GLM_ARM)
  return signed_nibble<K>(w);
#else
  // a big-endian machine has the first byte at a word's top
  constexpr int place = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? K ^ 6 : K;
  return to_float(bits_as<vi>(bits_as<vu>(w) << (28 - 4 * place)) >> 28);
#endif
}

// W int8 from p + k W on, as floats; p holds 4 W.
GLM_INLINE vf bytes(const int8_t* p, int k) {
#if defined(GLM_ARM)
  return signed_bytes(p, k);
#elif defined(__AVX512F__)
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k * W));
  return to_float(bits_as<vi>(_mm512_maskz_cvtepi8_epi32(0xffff, b)));
#elif defined(__AVX2__)
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + k * W));
  return to_float(bits_as<vi>(_mm256_cvtepi8_epi32(b)));
#else
  p += k * W;
  return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
#endif
}

#if defined(__AVX512F__)
GLM_INLINE bool has_byte_products() { return __builtin_cpu_supports("avx512vnni"); }
#endif

// sum += the products of each lane's four bytes; u unsigned below 16, or with VNNI below 256.
template <bool VNNI>
GLM_INLINE vi add_unsigned(vi sum, vi u, vi s) {
#if defined(__AVX512F__)
  if constexpr (VNNI) {
    // assembly, since this file must compile for CPUs that lack the instruction
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
    return sum;
  }
  const __m512i pairs = _mm512_maddubs_epi16(bits_as<__m512i>(u), bits_as<__m512i>(s));
  return sum + bits_as<vi>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(bits_as<__m256i>(u), bits_as<__m256i>(s));
  return sum + bits_as<vi>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(GLM_ARM)
  return add_words(sum, u, s);
#else
  uint8_t a[4 * W];
  int8_t b[4 * W];
  memcpy(a, &u, sizeof a), memcpy(b, &s, sizeof b);
  for (int i = 0; i < 4 * W; ++i) sum[i / 4] += int(a[i]) * b[i];
  return sum;
#endif
}

// sum += the products of both nibbles of every byte: the higher ones with x, the lower ones with y.
template <bool VNNI>
GLM_INLINE vi add_nibbles(vi sum, Nibbles u, vi x, vi y) {
#if defined(__AVX512F__)
  if constexpr (!VNNI) {
    const __m512i high = _mm512_maddubs_epi16(bits_as<__m512i>(u.high), bits_as<__m512i>(x));
    const __m512i low = _mm512_maddubs_epi16(bits_as<__m512i>(u.low), bits_as<__m512i>(y));
    const __m512i pairs = _mm512_add_epi16(high, low);
    return sum + bits_as<vi>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
#elif defined(__AVX2__)
  const __m256i high = _mm256_maddubs_epi16(bits_as<__m256i>(u.high), bits_as<__m256i>(x));
  const __m256i low = _mm256_maddubs_epi16(bits_as<__m256i>(u.low), bits_as<__m256i>(y));
  const __m256i pairs = _mm256_add_epi16(high, low);
  return sum + bits_as<vi>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
  return add_unsigned<VNNI>(add_unsigned<VNNI>(sum, u.high, x), u.low, y);
}

// sum += the products of each lane's four signed bytes; those of b are above -128.
GLM_INLINE vi add_signed(vi sum, vi a, vi b) {
#if defined(__AVX512F__)
  const __m512i x = bits_as<__m512i>(a), y = bits_as<__m512i>(b);
  const __m512i even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8),
                                         _mm512_srai_epi16(_mm512_slli_epi16(y, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srai_epi16(x, 8), _mm512_srai_epi16(y, 8));
  return sum + bits_as<vi>(even) + bits_as<vi>(odd);
#elif defined(__AVX2__)
  const __m256i x = bits_as<__m256i>(a), y = bits_as<__m256i>(b);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
  return sum + bits_as<vi>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(GLM_ARM)
  return add_words(sum, a, b);
#else
  int8_t x[4 * W], y[4 * W];
  memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
  for (int i = 0; i < 4 * W; ++i) sum[i / 4] += int(x[i]) * y[i];
  return sum;
#endif
}

// Spreads scales over the lanes, LANES lanes each. Behind the `left` scales at p, which belong to
// inputs, any value will do: the inputs are zeros there.
template <int LANES>
GLM_INLINE vf spread(const uint16_t* p, int64_t left) {
  constexpr int count = W / LANES > 0 ? W / LANES : 1;
  if (count == 1) return all(from_half(*p));
#if defined(__AVX2__)
  uint64_t halves = 0;
  if (left >= count)
    memcpy(&halves, p, count * sizeof *p);
  else
    for (int64_t i = 0; i < left; ++i) halves |= uint64_t(p[i]) << (16 * i);
  const __m128 few = _mm_cvtph_ps(_mm_cvtsi64_si128(int64_t(halves)));
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i / LANES;
#if defined(__AVX512F__)
  return bits_as<vf>(
      _mm512_maskz_permutexvar_ps(0xffff, bits_as<__m512i>(lanes), _mm512_zextps128_ps512(few)));
#else
  return bits_as<vf>(
      _mm256_permutevar8x32_ps(_mm256_zextps128_ps256(few), bits_as<__m256i>(lanes)));
#endif
#else
  float lane[W];
  for (int i = 0; i < W; ++i) lane[i] = from_half(p[i / LANES < left ? i / LANES : left - 1]);
  return load(lane);
#endif
}

}  // namespace glm::GLM_ISA
