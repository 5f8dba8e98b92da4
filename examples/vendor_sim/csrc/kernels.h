// Device kernels on raw pointers. T element type, A arithmetic type (float, or double for double);
// R rows, D width.
#pragma once

#include <cmath>
#include <cstdint>

namespace sim::kernels {

template <class A>
A cdf(A x) {  // of the normal distribution
  return A(0.5) * (1 + std::erf(x * A(M_SQRT1_2)));
}

// x [R, 2F] = [a, b] -> y [R, F] = a * gelu(b). `tanh` selects the approximation: a fault, not an
// option.
template <class T, class A>
void geglu(const T* x, T* y, std::int64_t rows, std::int64_t f, bool tanh) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < f; ++i) {
      const A a = x[2 * r * f + i], b = x[(2 * r + 1) * f + i];
      const A inner = A(M_2_SQRTPI * M_SQRT1_2) * (b + A(0.044715) * b * b * b);
      y[r * f + i] = T(a * b * (tanh ? A(0.5) * (1 + std::tanh(inner)) : cdf(b)));
    }
  }
}

// Needs the forward's input only. gelu'(b) = cdf(b) + b pdf(b).
template <class T, class A>
void geglu_backward(const T* dy, const T* x, T* dx, std::int64_t rows, std::int64_t f) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < f; ++i) {
      const A a = x[2 * r * f + i], b = x[(2 * r + 1) * f + i], g = dy[r * f + i];
      const A pdf = A(M_2_SQRTPI * M_SQRT1_2 / 2) * std::exp(-b * b / 2);
      dx[2 * r * f + i] = T(g * b * cdf(b));
      dx[(2 * r + 1) * f + i] = T(g * a * (cdf(b) + b * pdf));
    }
  }
}

// s = x + alpha residual, rounded to T; y = (s - mean) rstd w + b. Keeps mean and rstd [R].
// Sums in double: a plain running float sum would be worse than the reference's pairwise one.
template <class T, class A>
void add_layer_norm(const T* x, const T* residual, const T* w, const T* b, T* y, T* s, double* mean,
                    double* rstd, std::int64_t rows, std::int64_t d, double eps, double alpha) {
  for (std::int64_t r = 0; r < rows; ++r, x += d, residual += d, y += d, s += d) {
    double sum = 0, squares = 0;
    for (std::int64_t i = 0; i < d; ++i) sum += A(s[i] = T(A(x[i]) + A(alpha) * A(residual[i])));
    mean[r] = sum / d;
    for (std::int64_t i = 0; i < d; ++i) squares += (A(s[i]) - mean[r]) * (A(s[i]) - mean[r]);
    rstd[r] = 1 / std::sqrt(squares / d + eps);
    for (std::int64_t i = 0; i < d; ++i)
      y[i] = T(A((A(s[i]) - mean[r]) * rstd[r] * A(w[i]) + A(b[i])));
  }
}

// dx = ds + rstd (w dy - mean(w dy) - n mean(w dy n)), n = (s - mean) rstd; dresidual = alpha dx.
// dw, db [D] double, zeroed by the caller. All in double: the differences cancel where rows are
// large.
template <class T, class A>
void add_layer_norm_backward(const T* dy, const T* ds, const T* s, const T* w, const double* mean,
                             const double* rstd, T* dx, T* dresidual, double* dw, double* db,
                             std::int64_t rows, std::int64_t d, double alpha) {
  for (std::int64_t r = 0; r < rows; ++r, dy += d, ds += d, s += d, dx += d, dresidual += d) {
    double first = 0, second = 0;
    for (std::int64_t i = 0; i < d; ++i) {
      const double n = (double(A(s[i])) - mean[r]) * rstd[r], g = double(A(dy[i])) * A(w[i]);
      first += g;
      second += g * n;
      dw[i] += A(dy[i]) * n;
      db[i] += A(dy[i]);
    }
    for (std::int64_t i = 0; i < d; ++i) {
      const double n = (double(A(s[i])) - mean[r]) * rstd[r], g = double(A(dy[i])) * A(w[i]);
      const double grad = A(ds[i]) + rstd[r] * (g - first / d - n * (second / d));
      dx[i] = T(A(grad));
      dresidual[i] = T(A(alpha * grad));
    }
  }
}

struct AdamW {
  double lr, beta1, beta2, eps, decay, correction1, correction2;
};

// Loshchilov & Hutter 2019, algorithm 2, on N elements; P parameter type, G gradient type, C type
// of the rounded copy.
template <class P, class G, class C>
void adamw(P* p, const G* grad, P* m, P* v, C* copy, float scale, std::int64_t n, const AdamW& c) {
  for (std::int64_t i = 0; i < n; ++i) {
    const P g = P(grad[i]) * P(scale);
    m[i] = P(c.beta1) * m[i] + P(1 - c.beta1) * g;
    v[i] = P(c.beta2) * v[i] + P(1 - c.beta2) * g * g;
    const P step = (m[i] / P(c.correction1)) / (std::sqrt(v[i] / P(c.correction2)) + P(c.eps));
    p[i] = p[i] * P(1 - c.lr * c.decay) - P(c.lr) * step;
    if (copy) copy[i] = C(p[i]);
  }
}

}  // namespace sim::kernels
