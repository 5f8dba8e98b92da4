// Tests every kernel, with the instruction sets this CPU has, against plain loops in double.
// Buffers are exactly as large as needed, so that the sanitizers see any access beyond them; sizes
// are odd.
#include "kernels.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

using namespace glm;
using Doubles = std::vector<double>;

namespace {

int failures = 0;
const char* where = "";

uint32_t state = 1;
double uniform() {  // xorshift32, in (-2, 2)
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state / 4294967296.0 * 4 - 2;
}

double value(float x) { return x; }
double value(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
void set(float& to, double x) { to = float(x); }
void set(bf16& to, double x) {
  const float f = float(x);
  uint32_t u;
  memcpy(&u, &f, 4);
  to.bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// A heap buffer that is not one byte longer than its content.
template <class T>
struct Buffer {
  std::vector<T> at;
  explicit Buffer(int64_t n) : at(size_t(n)) {
    for (T& x : at) set(x, uniform());
    at.shrink_to_fit();
  }
  T* p() { return at.data(); }
  double operator[](int64_t i) const { return value(at[size_t(i)]); }
};

template <class T>
double eps() {
  return sizeof(T) == 2 ? 1.0 / 128 : 1.0 / 8388608;
}

// A number of all bits of exact results (FNV-1a), the same for every instruction set and machine.
uint64_t exact_bits = 0;
template <class T>
void fold(T x) {
  const float f = float(value(x));
  uint32_t u;
  memcpy(&u, &f, 4);
  exact_bits = (exact_bits ^ (f == f ? u : 0)) * 0x100000001b3;
}

// The tolerance: so many roundings to T, and float arithmetic on sums of up to a few hundred terms
// of order `scale` or more, which may cancel.
template <class T>
void expect(const char* name, const Buffer<T>& got, const Doubles& want, double scale = 1,
            int roundings = 1) {
  double worst = 0;
  for (double x : want) scale = std::fmax(scale, std::fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::fabs(got[int64_t(i)] - want[i]);
    if (!(error <= worst)) worst = error;
  }
  if (exact())
    for (T x : got.at) fold(x);
  if (worst <= scale * (0.5 * roundings * eps<T>() + 64 * eps<float>())) return;
  ++failures;
  std::printf("FAILED %s %s: error %g at scale %g\n", where, name, worst, scale);
}

template <class T>
void norm(bool layer, bool residual, int64_t rows, int64_t d) {
  const Kernels<T>& k = kernels<T>();
  const double e = 1e-5, alpha = 1.5;
  Buffer<T> x(rows * d), r(rows * d), w(d), b(d), y(rows * d), total(rows * d), dy(rows * d),
      dt(rows * d), dx(rows * d), dr(rows * d), dw(d), db(d);
  Buffer<float> stats((layer ? 2 : 1) * rows);
  k.norm_forward({x.p(), residual ? r.p() : nullptr, w.p(), layer ? b.p() : nullptr, y.p(),
                  residual ? total.p() : nullptr, stats.p(), rows, d, float(e), float(alpha)},
                 0, rows);
  const int64_t per_chunk = 4, chunks = (rows + 3) / 4;
  Buffer<float> dws(chunks * d), dbs(chunks * d);
  const Buffer<T>& t = residual ? total : x;
  k.norm_backward({dy.p(), residual ? dt.p() : nullptr, t.at.data(), w.p(), stats.p(), dx.p(),
                   residual ? dr.p() : nullptr, dws.p(), layer ? dbs.p() : nullptr, rows, d,
                   per_chunk, float(alpha)},
                  0, chunks);
  k.sum_chunks({dws.p(), dw.p(), chunks, d}, 0, d);
  k.sum_chunks({dbs.p(), db.p(), chunks, d}, 0, d);
  Doubles ey, et, ex, er, ew(d), eb(d);
  double terms = 1;  // of dx, before they cancel
  for (int64_t i = 0; i < rows; ++i) {
    double mean = 0, square = 0, gh = 0, g0 = 0;
    if (residual)
      for (int64_t j = 0; j < d; ++j) et.push_back(x[i * d + j] + alpha * r[i * d + j]);
    for (int64_t j = 0; layer && j < d; ++j) mean += t[i * d + j] / double(d);
    for (int64_t j = 0; j < d; ++j) square += std::pow(t[i * d + j] - mean, 2) / double(d);
    const double scale = 1 / std::sqrt(square + e);
    for (int64_t j = 0; j < d; ++j) {
      const double h = (t[i * d + j] - mean) * scale, g = dy[i * d + j] * w[j];
      ey.push_back(h * w[j] + (layer ? b[j] : 0));
      ew[j] += dy[i * d + j] * h, eb[j] += dy[i * d + j];
      terms = std::fmax(terms, std::fabs(alpha * g * scale));
      gh += g * h / double(d), g0 += layer ? g / double(d) : 0;
    }
    for (int64_t j = 0; j < d; ++j) {
      const double h = (t[i * d + j] - mean) * scale, g = dy[i * d + j] * w[j];
      ex.push_back((g - g0 - h * gh) * scale + (residual ? dt[i * d + j] : 0));
      er.push_back(alpha * ex.back());
    }
  }
  expect("norm y", y, ey), expect("norm dx", dx, ex, terms), expect("norm dw", dw, ew);
  if (residual) expect("norm total", total, et), expect("norm dr", dr, er, terms);
  if (layer) expect("norm db", db, eb);
}

template <class T>
using ActivationKernel = void (*)(const Activation<T>&, int64_t, int64_t);

// The derivative by central differences in double.
template <class T>
void activation(const char* name, ActivationKernel<T> forward, ActivationKernel<T> backward,
                const std::function<double(double)>& f, int gate, int64_t rows, int64_t width) {
  const int64_t in = gate < 0 ? width : 2 * width;
  Buffer<T> x(rows * in), y(rows * width), dy(rows * width), dx(rows * in);
  forward({x.p(), nullptr, y.p(), rows, width}, 0, rows);
  backward({x.p(), dy.p(), dx.p(), rows, width}, 0, rows);
  Doubles ey, ex(rows * in);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) {
      const int64_t g = i * in + j + (gate == 1 ? width : 0), o = i * in + j + (gate ? 0 : width);
      const double a = x[g], d = dy[i * width + j], other = gate < 0 ? 1 : x[o];
      ey.push_back(f(a) * other);
      if (gate >= 0) ex[o] = d * f(a);
      ex[g] = d * other * (f(a + 1e-5) - f(a - 1e-5)) / 2e-5;
    }
  expect(name, y, ey), expect(name, dx, ex);
}

template <class T>
void rope(bool interleaved, int64_t sections, int64_t pairs, int64_t extra) {
  const int64_t batch = 2, length = 3, heads = 2, e = 2 * sections * pairs + extra, gap = 5;
  const int64_t stride = heads * (e + gap);
  Buffer<T> x(batch * length * stride - gap), y(batch * length * heads * e);
  Buffer<float> c(length * sections * pairs), s(length * sections * pairs);
  kernels<T>().rope_turn({x.p(), c.p(), s.p(), y.p(), length, heads, e, length * stride, stride,
                          e + gap, sections, pairs, true, interleaved, -1.0f},
                         0, batch * length);
  Doubles want;
  for (int64_t row = 0; row < batch * length; ++row)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t j = 0; j < e; ++j) {
        const int64_t at = row * stride + h * (e + gap), g = j / (2 * pairs), in = j % (2 * pairs);
        if (j >= 2 * sections * pairs) {
          want.push_back(x[at + j]);
          continue;
        }
        const int64_t pair = interleaved ? in / 2 : in % pairs, step = interleaved ? 1 : pairs;
        const bool second = interleaved ? in % 2 : in >= pairs;
        const int64_t angle = (row % length * sections + g) * pairs + pair;
        const double other = x[at + j + (second ? -step : step)];
        want.push_back(x[at + j] * c[angle] + (second ? -1 : 1) * other * s[angle]);
      }
  expect("rope", y, want);
}

template <class T>
void embedding(int64_t d) {
  const std::vector<int64_t> ids = {3, 0, 3, 6, 3}, order = {1, 0, 2, 4, 3},
                             starts = {0, 1, 1, 1, 4, 4, 4, 5};
  Buffer<T> w(7 * (d + 2) - 2), y(5 * d), dy(5 * d), dw(7 * d);
  kernels<T>().embedding_forward({ids.data(), w.p(), y.p(), d, d + 2}, 0, 5);
  kernels<T>().embedding_backward({dy.p(), order.data(), starts.data(), dw.p(), d, 0.1f}, 0, 7);
  Doubles ey, ew(7 * d);
  for (int64_t n = 0; n < 5; ++n)
    for (int64_t j = 0; j < d; ++j) {
      ey.push_back(w[ids[n] * (d + 2) + j]);
      ew[ids[n] * d + j] += 0.1 * dy[n * d + j];
    }
  expect("embedding y", y, ey), expect("embedding dw", dw, ew);
}

template <class T>
void cross_entropy(int64_t rows, int64_t vocab) {
  Buffer<T> z(rows * vocab);
  const Buffer<T> before = z;
  Buffer<float> weight(rows), loss(rows);
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < rows; ++i) labels.push_back(i * 7 % vocab);
  kernels<T>().cross_entropy({z.p(), labels.data(), weight.p(), loss.p(), vocab, true}, 0, rows);
  Doubles el, ez;
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t v = 0; v < vocab; ++v) sum += std::exp(before[i * vocab + v]);
    for (int64_t v = 0; v < vocab; ++v)
      ez.push_back(weight[i] * (std::exp(before[i * vocab + v]) / sum - (v == labels[i])));
    el.push_back(weight[i] * (std::log(sum) - before[i * vocab + labels[i]]));
  }
  expect("cross_entropy loss", loss, el), expect("cross_entropy dz", z, ez);
}

// Probabilities from 1 to below the smallest denormal leave no denormal for the products.
template <class T>
void sharp_cross_entropy() {
  std::vector<T> z(220);
  for (size_t v = 0; v < z.size(); ++v) set(z[v], double(v) / -2);
  const int64_t label = 0;
  const float weight = 0.5f;
  float loss = 0;
  kernels<T>().cross_entropy({z.data(), &label, &weight, &loss, 220, true}, 0, 1);
  int denormal = 0, positive = 0;
  for (const T& x : z) {
    positive += value(x) > 0;
    denormal += std::fpclassify(float(value(x))) == FP_SUBNORMAL;
  }
  if (denormal == 0 && positive > 160) return;
  ++failures;
  std::printf("FAILED %s: of a sharp row's gradients %d are denormal, %d positive\n", where,
              denormal, positive);
}

struct Sizes {
  int64_t queries, keys, heads, kv_heads, width, values;
};

template <class T>
void attention(Sizes n) {
  const int64_t batch = 2, rows = batch * n.queries * n.heads, places = batch * n.keys * n.kv_heads;
  const int64_t qs = rows * n.width, ks = places * n.width, vs = places * n.values;
  const int64_t ys = rows * n.values;
  Buffer<T> q(qs), k(ks), v(vs), y(ys), dy(ys), dq(qs), dk(ks), dv(vs);
  std::vector<int32_t> start, end;
  for (int64_t i = 0; i < batch * n.queries; ++i) {  // every fifth query sees nothing
    start.push_back(int32_t(i * 3 % n.keys));
    end.push_back(i % 5 == 4 ? start.back() : int32_t(start.back() + i * 11 % n.keys + 1));
    if (end.back() > n.keys) end.back() = int32_t(n.keys);
  }
  auto view = [&](Buffer<T>& x, int64_t length, int64_t heads, int64_t width) {
    return Heads<T>{x.p(), length * heads * width, heads * width, width};
  };
  const Heads<T> hq = view(q, n.queries, n.heads, n.width),
                 hk = view(k, n.keys, n.kv_heads, n.width),
                 hv = view(v, n.keys, n.kv_heads, n.values),
                 hd = view(dy, n.queries, n.heads, n.values);
  const float scale = 0.3f;
  const int64_t parts = n.queries > attention_tile ? 2 : 1;
  kernels<T>().attention_forward({hq, hk, hv, start.data(), end.data(), y.p(), n.queries, n.keys,
                                  n.heads, n.kv_heads, n.width, n.values, parts, scale},
                                 0, batch * n.kv_heads * parts);
  Buffer<T> alone(ys);
  if (n.queries == 1)
    kernels<T>().attention_decode({hq, hk, hv, start.data(), end.data(), alone.p(), 1, n.keys,
                                   n.heads, n.kv_heads, n.width, n.values, 1, scale},
                                  0, batch * n.kv_heads);
  kernels<T>().attention_backward(
      {hd, hq, hk, hv, start.data(), end.data(), dq.p(), dk.p(), dv.p(), n.queries, n.keys, n.heads,
       n.kv_heads, n.width, n.values, scale},
      0, batch * n.kv_heads);
  Doubles ey(ys), eq(qs), ek(ks), ev(vs);
  for (int64_t row = 0; row < batch * n.queries * n.heads; ++row) {
    const int64_t h = row % n.heads, i = row / n.heads, b = i / n.queries;
    auto place = [&](int64_t j) {
      return (b * n.keys + j) * n.kv_heads + h * n.kv_heads / n.heads;
    };
    double sum = 0, mean = 0;
    Doubles p(n.keys), dp(n.keys);
    for (int64_t j = start[i]; j < end[i]; ++j) {
      double s = 0;
      for (int64_t e = 0; e < n.width; ++e) s += q[row * n.width + e] * k[place(j) * n.width + e];
      sum += p[j] = std::exp(double(scale) * s);
    }
    for (int64_t j = start[i]; j < end[i]; ++j) {
      p[j] /= sum;
      for (int64_t e = 0; e < n.values; ++e) {
        const int64_t of_key = place(j) * n.values + e, of_query = row * n.values + e;
        ey[of_query] += p[j] * v[of_key];
        ev[of_key] += p[j] * dy[of_query];
        dp[j] += dy[of_query] * v[of_key];
      }
      mean += p[j] * dp[j];
    }
    for (int64_t j = start[i]; j < end[i]; ++j)
      for (int64_t e = 0; e < n.width; ++e) {
        const double ds = double(scale) * p[j] * (dp[j] - mean);
        eq[row * n.width + e] += ds * k[place(j) * n.width + e];
        ek[place(j) * n.width + e] += ds * q[row * n.width + e];
      }
  }
  if (n.queries == 1) expect("attention decode", alone, ey, 1, 2);
  if (n.queries == 1 && exact() && memcmp(alone.p(), y.p(), size_t(ys) * sizeof(T))) {
    ++failures;
    std::printf("FAILED %s: attention decode: bits differ from a prompt's\n", where);
  }
  expect("attention y", y, ey, 1, 2), expect("attention dq", dq, eq, 1, 2);
  expect("attention dk", dk, ek, 1, 2), expect("attention dv", dv, ev, 1, 2);
}

template <class T>
void routing(int64_t experts, int64_t groups) {
  const int64_t tokens = 3, top_k = 2, kept = groups > 1 ? 2 : 1;
  Buffer<float> x(tokens * experts), bias(experts), w(tokens * top_k), s(tokens * top_k);
  Buffer<float> biased(tokens * experts), sums(tokens * 2 * groups), g(tokens * top_k);
  Buffer<float> dx(tokens * experts);
  std::vector<int64_t> chosen(tokens * top_k), places(tokens * groups);
  for (float& each : dx.at) each = 0;
  const Buffer<float> logits = x;
  kernels<T>().route_choose({x.p(), bias.p(), chosen.data(), w.p(), s.p(), biased.p(), sums.p(),
                             places.data(), experts, top_k, groups, kept, 1.5f, true},
                            0, tokens);
  kernels<T>().route_backward({g.p(), s.p(), chosen.data(), dx.p(), experts, top_k, 1.5f, true}, 0,
                              tokens);
  Doubles ew, ex(tokens * experts);
  for (int64_t n = 0; n < tokens; ++n) {
    double score[2], total = 0, mean = 0;
    for (int64_t j = 0; j < top_k; ++j) {
      score[j] = 1 / (1 + std::exp(-double(logits[n * experts + chosen[n * top_k + j]])));
      total += score[j];
    }
    for (int64_t j = 0; j < top_k; ++j) {
      ew.push_back(1.5 * score[j] / total);
      mean += 1.5 * g[n * top_k + j] * score[j] / total;
    }
    for (int64_t j = 0; j < top_k; ++j)
      ex[n * experts + chosen[n * top_k + j]] =
          (1.5 * g[n * top_k + j] - mean) / total * score[j] * (1 - score[j]);
  }
  expect("route weights", w, ew, 1, 2), expect("route dlogits", dx, ex, 1, 2);
}

template <class T>
void weighted(int64_t d) {
  const std::vector<int64_t> back = {2, 0, 3, 1};
  Buffer<T> rows(4 * d), y(2 * d), dy(2 * d), drows(4 * d);
  Buffer<float> w(4), dw(4);
  kernels<T>().weighted_rows({rows.p(), back.data(), w.p(), y.p(), d, 2}, 0, 2);
  kernels<T>().weighted_rows_backward(
      {dy.p(), rows.p(), back.data(), w.p(), drows.p(), dw.p(), d, 2}, 0, 2);
  Doubles ey(2 * d), er(4 * d), ew(4);
  for (int64_t j = 0; j < 4; ++j)
    for (int64_t i = 0; i < d; ++i) {
      ey[j / 2 * d + i] += w[j] * rows[back[j] * d + i];
      er[back[j] * d + i] = w[j] * dy[j / 2 * d + i];
      ew[j] += double(dy[j / 2 * d + i]) * rows[back[j] * d + i];
    }
  expect("weighted rows", y, ey), expect("weighted drows", drows, er);
  expect("weighted dweights", dw, ew, 1, 2);
}

template <class T>
void optimizer(int64_t n) {
  Buffer<T> g(n), copy(n);
  Buffer<float> p(n), m(n), v(n);
  for (float& x : v.at) x = std::fabs(x);
  Doubles ep, em, ev;
  double square = 0, sums[2];
  for (int64_t i = 0; i < n; ++i) {
    const double d = 0.5 * g[i];
    em.push_back(0.9 * m[i] + 0.1 * d), ev.push_back(0.95 * v[i] + 0.05 * d * d);
    ep.push_back(p[i] * 0.99 - 1e-3 * (em[i] / 0.5) / (std::sqrt(ev[i] / 0.25) + 1e-8));
    square += g[i] * g[i];
  }
  kernels<T>().squares({g.p(), sums, n, (n + 1) / 2}, 0, n > 1 ? 2 : 1);
  kernels<T>().adamw_update({p.p(), m.p(), v.p(), g.p(), copy.p(), 0.5f, 0.9f, 0.1f, 0.95f, 0.05f,
                             1e-8f, 1e-3f, 0.99f, 0.5f, 0.25f},
                            0, n);
  expect("adamw p", p, ep), expect("adamw m", m, em), expect("adamw v", v, ev);
  expect("adamw copy", copy, ep);
  Buffer<float> norm(1);
  norm.at[0] = float(sums[0] + (n > 1 ? sums[1] : 0));
  expect("squares", norm, {square});
}

double half(uint16_t h) {  // of a positive normal number
  return std::ldexp(1024 + (h & 1023), (h >> 10) - 25);
}

template <class T>
void quantized(int bits, int64_t group, bool rounded, int64_t rows, int64_t d, int64_t f) {
  const Kernels<T>& k = kernels<T>();
  const int64_t groups = group ? d / group : 1, padded = (d + 127) / 128 * 128;
  const int64_t lanes = padded / (bits == 4 ? 8 : 4);
  Buffer<T> x(rows * d), b(f), y(rows * f), w(f * d), xr(rows * d);
  std::vector<int8_t> weight(size_t(f * d * bits / 8)), codes(size_t(rows * padded));
  std::vector<uint16_t> scale(size_t(f * groups));
  for (int8_t& c : weight) c = int8_t(int(uniform() * 64));
  for (uint16_t& s : scale) s = uint16_t(0x2000 + int(uniform() * 512 + 1024));
  Buffer<float> values(rows * padded), steps(rows * lanes);
  std::vector<int32_t> excess(size_t(rows * lanes));
  int8_t* of_codes = rounded ? codes.data() : nullptr;
  k.quantized_input({x.p(), values.p(), of_codes, steps.p(), excess.data(), d, padded, bits}, 0,
                    rows);
  const Codes c{weight.data(), scale.data(), d, groups, bits};
  k.quantized_product(
      {c, b.p(), values.p(), of_codes, steps.p(), excess.data(), y.p(), rows, f, padded}, 0, f);
  k.dequantize({c, w.p()}, 0, f);
  k.round_activations({x.p(), xr.p(), d}, 0, rows);
  Doubles ew, ex, ey;
  for (int64_t i = 0; i < f * d; ++i) {
    const int byte = weight[size_t(i * bits / 8)];
    const int code = bits == 8 ? byte : i % 2 ? int8_t(uint8_t(byte) << 4) >> 4 : byte >> 4;
    ew.push_back(code * half(scale[size_t(i / d * groups + i % d / (d / groups))]));
  }
  for (int64_t i = 0; i < rows * d; ++i) {
    float top = 0;
    const int64_t first = i - i % d % 32;
    for (int64_t j = first; j < first + 32 && j / d == i / d; ++j)
      top = std::fmax(top, std::fabs(float(x[j])));
    const float step = top / 127;
    ex.push_back(std::nearbyint(float(x[i]) / step) * double(step));
  }
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < f; ++i) {
      double s = b[i];
      for (int64_t j = 0; j < d; ++j)
        s += (rounded ? ex[size_t(n * d + j)] : x[n * d + j]) * ew[size_t(i * d + j)];
      ey.push_back(s);
    }
  expect("dequantize", w, ew), expect("round_activations", xr, ex);
  expect(rounded ? "quantized_product rounded" : "quantized_product", y, ey);
}

template <class T>
void linear(int64_t rows, int64_t d, int64_t f) {
  Buffer<T> narrow(rows * d), w(f * d), b(f), y(rows * f);
  Buffer<float> x(rows * d);
  for (int64_t i = 0; i < rows * d; ++i) x.at[size_t(i)] = float(narrow[i]);
  kernels<T>().linear_few({x.p(), narrow.p(), w.p(), b.p(), y.p(), rows, d, f}, 0, f);
  Doubles want;
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t i = 0; i < f; ++i) {
      double s = b[i];
      for (int64_t j = 0; j < d; ++j) s += x[n * d + j] * w[i * d + j];
      want.push_back(s);
    }
  expect("linear_few", y, want, std::sqrt(double(d)) * 8);
}

// The product of many rows, and the bits of linear_few.
template <class T>
void exact_linear(int64_t rows, int64_t d, int64_t f, int64_t parts, bool transposed) {
  const Kernels<T>& k = kernels<T>();
  Buffer<T> x(rows * d), w(f * d), b(f), y(rows * f), few(rows * f);
  Buffer<float> wide(rows * d), laid_out(exact_groups(rows) * exact_group * exact_depth(d));
  for (int64_t i = 0; i < rows * d; ++i) wide.at[size_t(i)] = float(x[i]);
  Buffer<T> turned(f * d);  // [D, F]
  for (int64_t i = 0; i < f * d; ++i) turned.at[size_t(i % d * f + i / d)] = w.at[size_t(i)];
  const T* weight = transposed ? turned.p() : w.p();
  k.exact_rows({x.p(), d, 1, laid_out.p(), rows, d}, 0, exact_groups(rows));
  k.exact_product({laid_out.p(), weight, transposed ? 1 : d, transposed ? f : 1, b.p(), y.p(), rows,
                   f, d, parts},
                  0, (f + exact_panel - 1) / exact_panel * parts);
  k.linear_few({wide.p(), x.p(), w.p(), b.p(), few.p(), rows, d, f}, 0, f);
  Doubles want;
  for (int64_t i = 0; i < rows * f; ++i) want.push_back(few[i]);
  expect("exact product", y, want);
  if (memcmp(y.p(), few.p(), size_t(rows * f) * sizeof(T)) == 0) return;
  ++failures;
  std::printf("FAILED %s: rows %d, depth %d: bits differ from linear_few's\n", where, int(rows),
              int(d));
}

double silu(double x) { return x / (1 + std::exp(-x)); }
double erf_gelu(double x) { return x / 2 * (1 + std::erf(x / std::sqrt(2))); }
double tanh_gelu(double x) {
  return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

template <class T>
void all() {
  const Kernels<T>& k = kernels<T>();
  for (int64_t d : {1, 2, 31, 33, 517})
    for (int which = 0; which < 4; ++which) norm<T>(which & 1, which & 2, 9, d);
  for (int64_t f : {1, 16, 37}) {
    activation<T>("gelu", k.gelu_forward, k.gelu_backward, tanh_gelu, -1, 3, f);
    activation<T>("geglu", k.geglu_forward, k.geglu_backward, erf_gelu, 1, 3, f);
    activation<T>("swiglu", k.swiglu_forward, k.swiglu_backward, silu, 0, 3, f);
    embedding<T>(f);
    weighted<T>(f);
  }
  for (bool interleaved : {false, true})
    for (int64_t sections : {1, 2})
      for (int64_t pairs : {1, 5, 16, 19}) rope<T>(interleaved, sections, pairs, pairs % 3);
  for (int64_t vocab : {1, 5, 64, 517}) cross_entropy<T>(5, vocab);
  sharp_cross_entropy<T>();
  routing<T>(8, 1), routing<T>(37, 1), routing<T>(36, 4);
  for (Sizes n : {Sizes{1, 1, 1, 1, 1, 1},
                  {5, 5, 2, 2, 3, 3},
                  {49, 49, 2, 1, 16, 16},
                  {97, 131, 2, 1, 33, 33},
                  {1, 130, 4, 2, 64, 64},
                  {1, 300, 7, 1, 33, 33},
                  {48, 64, 1, 1, 64, 64},
                  {5, 7, 2, 1, 9, 21},
                  {1, 9, 4, 1, 36, 32}})
    attention<T>(n);
  for (int64_t n : {1, 15, 16, 1037}) optimizer<T>(n);
  for (int64_t n : {1, 3, 6}) linear<T>(n, 517, 7);
  if (exact()) {
    for (int64_t d : {1, 16, 517})
      for (bool transposed : {false, true}) exact_linear<T>(15, d, 67, 1 + transposed, transposed);
    exact_linear<T>(15, 4112, 67, 1, true);  // a panel that outgrows the cache
  }
  for (bool rounded : {false, true})
    for (int bits : {4, 8}) {
      for (int64_t d : {2, 34, 96, 328}) quantized<T>(bits, 0, rounded, 5, d, 7);
      for (int64_t group : {32, 128}) quantized<T>(bits, group, rounded, 5, 384, 7);
      quantized<T>(bits, 32, rounded, 1, 96, 4);
    }
}

}  // namespace

// Tests the instruction sets named, by default all that this CPU has. The last of them must be the
// one that is chosen at first.
int main(int count, char** names) {
  std::vector<std::string> wanted(names + 1, names + count);
  for (int i = 0; count == 1 && i < num_isas; ++i)
    if (available(Isa(i))) wanted.push_back(isa_names[i]);
  if (wanted.back() != isa_names[int(active_isa())]) {
    std::printf("FAILED: chosen at first: %s\n", isa_names[int(active_isa())]);
    return 1;
  }
  uint64_t first_bits = 0;
  for (const std::string& name : wanted) {
    int i = 0;
    while (i < num_isas && name != isa_names[i]) ++i;
    if (i == num_isas || !available(Isa(i))) {
      std::printf("FAILED: this CPU does not have %s\n", name.c_str());
      return 1;
    }
    activate(Isa(i));
    for (bool on : {false, true}) {
      set_exact(on);
      state = 1;
      const std::string kind = on ? name + " exact" : name;
      const std::string of_float = kind + " float32", of_bf16 = kind + " bfloat16";
      where = of_float.c_str();
      all<float>();
      where = of_bf16.c_str();
      all<bf16>();
    }
    std::printf("%s: done, exact results %016llx\n", name.c_str(), (unsigned long long)exact_bits);
    if (name != wanted.front() && exact_bits != first_bits) {
      ++failures;
      std::printf("FAILED %s: exact results differ from those of %s\n", name.c_str(),
                  wanted.front().c_str());
    }
    first_bits = exact_bits;
    exact_bits = 0;
  }
  return failures ? 1 : 0;
}
