// The elementary functions of the CPU's kernels and of the GPU's exact ones, written once: for
// vectors (vec.h) and for single floats (csrc/cuda/exact.h). Both define what is used here: vf, vi,
// `all`, `bits_as`, `fma`, which rounds once, and GLM_INLINE. The same bits everywhere need a
// compiler that contracts nothing, and divides and adds denormals as IEEE 754 says. Included once
// for each type of vectors.
namespace glm::GLM_SPACE {

// A NaN in x survives; limits are never NaN.
GLM_INLINE vf at_most(vf x, float limit) { return x > all(limit) ? all(limit) : x; }
GLM_INLINE vf at_least(vf x, float limit) { return x < all(limit) ? all(limit) : x; }
// 2^n for n in [-126, 127].
GLM_INLINE vf power_of_two(vi n) { return bits_as<vf>((n + 127) << 23); }

// e^x within 1 ulp, gradual underflow included; NaN, infinities and overflow as expf.
// x = n ln2 + r; e^r = 1 + r + r^2 q(r), q fitted at Chebyshev nodes (relative error 1e-8).
GLM_INLINE vf exp(vf x) {
  x = at_least(at_most(x, 89.0f), -104.0f);
  vf shifted = fma(x, 0x1.715476p+0f, 0x1.8p+23f);  // the sum's last bits are round(x / ln2)
  vi n = bits_as<vi>(shifted) - 0x4b400000;
  vf k = shifted - 0x1.8p+23f;
  vf r = fma(k, -0x1.7f7d1cp-20f, fma(k, -0x1.62e4p-1f, x));  // ln2 in two parts
  vf q = all(0x1.6d444ep-10f);
  constexpr float fitted[] = {0x1.120c68p-7f, 0x1.5554e8p-5f, 0x1.5554dcp-3f, 0.5f};
  for (float c : fitted) q = fma(q, r, c);
  vf y = fma(q, r * r, r) + 1.0f;
  n = x == x ? n : vi{};
  vi half = n >> 1;  // two factors, since 2^n alone leaves the normal range at both ends
  return y * power_of_two(half) * power_of_two(n - half);
}

// x with denormals as 0. On x86-64 an instruction that takes or makes a denormal is so slow that a
// product of a sharp distribution's probabilities, many of which are denormal, took 50 times as
// long (docs/exact.md).
GLM_INLINE vf without_denormals(vf x) {
  return (bits_as<vi>(x) & 0x7fffffff) < 0x00800000 ? vf{} : x;
}

GLM_INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// The normal distribution at x: `cdf` = (1 + erf(x / sqrt 2)) / 2 and `density`.
// For z = |x|, cdf(-z) = e^(-z^2/2) P(1 / (1 + 0.3 z)), P fitted to relative error 1e-7.
struct Normal {
  vf cdf, density;
};

GLM_INLINE Normal normal(vf x) {
  vf z = bits_as<vf>(bits_as<vi>(x) & 0x7fffffff);
  vf e = exp(z * z * -0.5f);
  vf u = 1.0f / fma(z, 0.3f, 1.0f);
  vf p = all(0.0f);
  constexpr float fitted[] = {0x1.3e6e3ap-5f,  -0x1.5f1dccp-3f, 0x1.dd6774p-3f,
                              -0x1.4ceeacp-4f, 0x1.2a357cp-3f,  0x1.7edd1cp-4f,
                              0x1.f48ccep-4f,  0x1.e945ep-4f,   0x1.3138b2p-17f};
  for (float c : fitted) p = fma(p, u, c);
  vf tail = e * p;
  return {x < all(0.0f) ? tail : 1.0f - tail, e * 0x1.988454p-2f};
}

// A function's value and derivative at x.
struct Slope {
  vf y, dy;
};

// x sigmoid(2z) with z = sqrt(2/pi) (x + 0.044715 x^3): the same as x/2 (1 + tanh z).
struct TanhGelu {
  static constexpr float c = 0x1.988454p-1f, cubic = 0.044715f;
  GLM_INLINE vf twice_z(vf x) { return x * fma(x * x, 2 * c * cubic, 2 * c); }
  GLM_INLINE vf value(vf x) { return x * sigmoid(twice_z(x)); }
  GLM_INLINE Slope slope(vf x) {
    vf s = sigmoid(twice_z(x)), dz = fma(x * x, 6 * c * cubic, 2 * c);
    return {x * s, fma(x * dz, s * (1.0f - s), s)};
  }
};

struct ErfGelu {
  GLM_INLINE vf value(vf x) { return x * normal(x).cdf; }
  GLM_INLINE Slope slope(vf x) {
    Normal p = normal(x);
    return {x * p.cdf, fma(x, p.density, p.cdf)};
  }
};

struct Silu {
  GLM_INLINE vf value(vf x) { return x * sigmoid(x); }
  GLM_INLINE Slope slope(vf x) {
    vf s = sigmoid(x);
    return {x * s, s * fma(x, 1.0f - s, 1.0f)};
  }
};

// The logarithm of x >= 1, infinity or NaN, in arithmetic that is the same everywhere.
GLM_INLINE float exact_log(float x) {
  if (!(x <= 3.4e38f)) return x;
  const uint32_t bits = bits_as<uint32_t>(x);
  double exponent = double(int32_t(bits >> 23) - 127);
  double m = double(bits_as<float>((bits & 0x7fffff) | 0x3f800000));
  if (m > 1.4142135623730951) m *= 0.5, exponent += 1.0;
  const double s = (m - 1.0) / (m + 1.0), square = s * s;  // log(m) = 2 atanh(s)
  double series = 0.0;
  for (int k = 19; k > 0; k -= 2) series = series * square + 1.0 / double(k);
  return float(exponent * 0.6931471805599453 + 2.0 * s * series);
}

}  // namespace glm::GLM_SPACE
