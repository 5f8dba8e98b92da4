// Arithmetic on quantised weights for 64-bit Arm: codes to floats, and sums of products of codes.
#pragma once

#include "vec.h"

namespace glm::GLM_ISA {

GLM_INLINE float half_to_float(uint16_t h) { return bits_as<__fp16>(h); }

// Moves the bytes that `index` names to the top of their lanes, with zeros below.
GLM_INLINE int32x4_t to_top(uint8x16_t x, const uint8_t* index) {
  return vreinterpretq_s32_u8(vqtbl1q_u8(x, vld1q_u8(index)));
}

// Nibble K of every word, as floats; nibbles are signed.
template <int K>
GLM_INLINE vf signed_nibble(vi w) {
  constexpr uint8_t B = K / 2, none = 255;
  constexpr uint8_t index[16] = {none, none, none, B,     none, none, none, B + 4,
                                 none, none, none, B + 8, none, none, none, B + 12};
  const uint8x16_t x = bits_as<uint8x16_t>(w);
  const uint8x16_t high = K % 2 ? vandq_u8(x, vdupq_n_u8(0xf0)) : vshlq_n_u8(x, 4);
  return bits_as<vf>(vcvtq_n_f32_s32(to_top(high, index), 28));  // as a fraction: exact
}

// The four int8 at p + 4 k, as floats; p holds sixteen.
GLM_INLINE vf signed_bytes(const int8_t* p, int k) {
  constexpr uint8_t none = 255;
  static constexpr uint8_t index[4][16] = {
      {none, none, none, 0, none, none, none, 1, none, none, none, 2, none, none, none, 3},
      {none, none, none, 4, none, none, none, 5, none, none, none, 6, none, none, none, 7},
      {none, none, none, 8, none, none, none, 9, none, none, none, 10, none, none, none, 11},
      {none, none, none, 12, none, none, none, 13, none, none, none, 14, none, none, none, 15}};
  const uint8x16_t x = vreinterpretq_u8_s8(vld1q_s8(p));
  return bits_as<vf>(vcvtq_n_f32_s32(to_top(x, index[k]), 24));
}

// sum += the products of each lane's four signed bytes; those of b are above -128.
GLM_INLINE vi add_words(vi sum, vi a, vi b) {
  const int8x16_t x = bits_as<int8x16_t>(a), y = bits_as<int8x16_t>(b);
  const int32x4_t s = bits_as<int32x4_t>(sum);
#if defined(__ARM_FEATURE_DOTPROD)
  return bits_as<vi>(vdotq_s32(s, x, y));
#else
  const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y)), high = vmull_high_s8(x, y);
  return bits_as<vi>(vpadalq_s16(s, vpaddq_s16(low, high)));
#endif
}

// 32 codes, of weights or of inputs, that share a step of the inputs.
struct Block {
  int8x16_t first, second;
};

GLM_INLINE Block load_block(const int8_t* p) { return {vld1q_s8(p), vld1q_s8(p + 16)}; }

// 32 weights. Those of 4 bits are 16 times too large, and the even ones come first.
template <int BITS>
GLM_INLINE Block weights_of_block(const int8_t* p) {
  if (BITS == 8) return load_block(p);
  const int8x16_t x = vld1q_s8(p);
  return {vandq_s8(x, vdupq_n_s8(int8_t(0xf0))), vshlq_n_s8(x, 4)};
}

// Returns sums of products whose total is that of the block.
GLM_INLINE int32x4_t products(Block w, Block x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.first, x.first), w.second, x.second);
#else
  // two products fit 16 bits, since the inputs' codes are at least -127
  int16x8_t a = vmull_s8(vget_low_s8(w.first), vget_low_s8(x.first));
  int16x8_t b = vmull_s8(vget_low_s8(w.second), vget_low_s8(x.second));
  a = vmlal_high_s8(a, w.first, x.first), b = vmlal_high_s8(b, w.second, x.second);
  return vpadalq_s16(vpaddlq_s16(a), b);
#endif
}

// Returns the sum of each feature's products in the feature's lane.
GLM_INLINE vi lanes_of_sums(const Block (&w)[4], Block x) {
  const int32x4_t low = vpaddq_s32(products(w[0], x), products(w[1], x));
  const int32x4_t high = vpaddq_s32(products(w[2], x), products(w[3], x));
  return bits_as<vi>(vpaddq_s32(low, high));
}

GLM_INLINE vi lanes_of_sums(const Block (&w)[1], Block x) {
  return vi{vaddvq_s32(products(w[0], x)), 0, 0, 0};
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// Two blocks as four matrices of two rows and eight columns.
struct Matrices {
  int8x16_t part[4];
};

GLM_INLINE int64x2_t as_halves(int8x16_t x) { return vreinterpretq_s64_s8(x); }

GLM_INLINE Matrices matrices(Block a, Block b) {
  const int64x2_t a1 = as_halves(a.first), b1 = as_halves(b.first);
  const int64x2_t a2 = as_halves(a.second), b2 = as_halves(b.second);
  return {{vreinterpretq_s8_s64(vzip1q_s64(a1, b1)), vreinterpretq_s8_s64(vzip2q_s64(a1, b1)),
           vreinterpretq_s8_s64(vzip1q_s64(a2, b2)), vreinterpretq_s8_s64(vzip2q_s64(a2, b2))}};
}

// Products of two rows with four features, two by two.
GLM_INLINE void matrix_sums(const Matrices& x, const Matrices& w01, const Matrices& w23, vi* out) {
  int32x4_t s = vdupq_n_s32(0), t = s;
  for (int k = 0; k < 4; ++k) {
    s = vmmlaq_s32(s, x.part[k], w01.part[k]);
    t = vmmlaq_s32(t, x.part[k], w23.part[k]);
  }
  const int64x2_t low = vreinterpretq_s64_s32(s), high = vreinterpretq_s64_s32(t);
  out[0] = bits_as<vi>(vzip1q_s64(low, high)), out[1] = bits_as<vi>(vzip2q_s64(low, high));
}
#endif

// out[m] has the sum of feature r's products with row m in lane r.
template <int R, int M>
GLM_INLINE void block_sums(const Block (&w)[R], const Block (&x)[M], vi (&out)[M]) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  if constexpr (R == 4 && M % 2 == 0) {
    const Matrices w01 = matrices(w[0], w[1]), w23 = matrices(w[2], w[3]);
    for (int m = 0; m < M; m += 2) matrix_sums(matrices(x[m], x[m + 1]), w01, w23, out + m);
    return;
  }
#endif
  for (int m = 0; m < M; ++m) out[m] = lanes_of_sums(w, x[m]);
}

template <int BITS>
GLM_INLINE vf sums_as_floats(vi x) {
  const int32x4_t s = bits_as<int32x4_t>(x);
  return bits_as<vf>(BITS == 4 ? vcvtq_n_f32_s32(s, 4) : vcvtq_f32_s32(s));
}

}  // namespace glm::GLM_ISA
