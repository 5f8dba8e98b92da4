// One thread's part of a decode step; shapes as in decode_parts.h.
#pragma once

#include <c10/util/BFloat16.h>

#include "decode_parts.h"

namespace glm {

inline float narrow(float x, float) { return x; }
inline bf16 narrow(float x, bf16) { return {c10::detail::round_to_nearest_even(x)}; }
inline float wide(float x) { return x; }
inline float wide(bf16 x) { return c10::detail::f32_from_bits(x.bits); }

// Kernels of all layers in a row, in step with the other threads of the team.
template <class T>
class Thread {
 public:
  Thread(const Shape& shape, const Call<T>& call, Own<T>& own, int64_t number, int64_t threads)
      : shape_(shape), c(call), own(own), t_(number), threads_(threads) {}

  // Runs one layer and sets the stream to what goes into the next. `queues` has one queue for each
  // of the layer's products.
  void layer(const Layer& l, int64_t number, Queue* queues) {
    residual_ = add_norm(*l.norm[INPUT]);
    if (l.latent())
      attend_to_latents(l, number, queues);
    else
      attend(l, number, queues);
    multiply(*l.product[OUT], queues[OUT], c.attended, c.delta);
    wait();
    delta_ = post_norm(l.norm[POST_ATTENTION], c.delta);
    residual_ = add_norm(*l.norm[MLP]);
    const T* y = l.sparse() ? experts(l, queues) : mlp(l, queues);
    delta_ = post_norm(l.norm[POST_MLP], y);
  }

  void finish(const Norm& final_norm, const Product& head, Queue& queue) {
    add_norm(final_norm);
    multiply(head, queue, normed(), c.logits);
  }

 private:
  static void wait() {
#pragma omp barrier
  }

  const T* normed() const { return own.normed[own.turn]; }

  // Sets `normed` to norm(delta + alpha residual); returns the next residual.
  const T* add_norm(const Norm& norm) {
    own.turn ^= 1;
    T *y = own.normed[own.turn], *total = own.total[own.turn];
    normalise(norm, c.rows, delta_ ? delta_ : residual_, delta_ ? residual_ : nullptr, y, total);
    return shape_.deepnorm ? y : delta_ ? total : residual_;
  }

  const T* post_norm(const std::optional<Norm>& norm, const T* x) const {
    if (!norm) return x;
    normalise(*norm, c.rows, x, nullptr, own.branch, nullptr);
    return own.branch;
  }

  void normalise(const Norm& norm, int64_t rows, const T* x, const T* residual, T* y,
                 T* total) const {
    const NormForward<T> a{x,
                           residual,
                           data<T>(norm.weight),
                           data<T>(norm.bias),
                           y,
                           total,
                           own.stats,
                           rows,
                           norm.weight.numel(),
                           float(norm.eps),
                           float(shape_.alpha)};
    kernels<T>().norm_forward(a, 0, rows);
  }

  // Products ---------------------------------------------------------------------------

  // Computes y = x weight^T + bias together with the other threads.
  void multiply(const Product& p, Queue& queue, const T* x, T* y) {
    multiply(p, queue, x, c.rows, {{0, 0, c.rows}}, y);
  }

  // The same with groups of rows, each times a matrix of its own.
  void multiply(const Product& p, Queue& queue, const T* x, int64_t rows,
                const std::vector<Group>& groups, T* y) {
    prepare(p, x, rows);
    const int64_t all = int64_t(groups.size()) * p.features;
    int64_t begin = 0, end = 0;
    while (queue.take(all, least(p), threads_, &begin, &end))
      for (int64_t next; begin < end; begin = next) {
        const int64_t group = begin / p.features, first = group * p.features;
        next = std::min(end, first + p.features);
        multiply(p, groups[size_t(group)], x, y, begin - first, next - first);
      }
  }

  // The fewest features that are worth taking from a queue.
  static int64_t least(const Product& p) {
    constexpr int64_t bytes = 1 << 16;
    const int64_t of_row = p.weight.size(-1) * int64_t(p.weight.element_size());
    return bytes / std::max<int64_t>(1, of_row);
  }

  // Fills the thread's buffers with x [rows, width] as the kernels take it.
  void prepare(const Product& p, const T* x, int64_t rows) const {
    if (!p.bits) {
      for (int64_t i = 0; i < rows * p.width; ++i) own.values[i] = wide(x[i]);
      return;
    }
    const QuantizedInput<T> in{x,
                               own.values,
                               p.rounded ? own.codes : nullptr,
                               own.steps,
                               own.excess,
                               p.width,
                               padded(p.width),
                               int(p.bits)};
    kernels<T>().quantized_input(in, 0, rows);
  }

  // Computes features [begin, end) of y's rows of the group, from the prepared x.
  void multiply(const Product& p, const Group& g, const T* x, T* y_, int64_t begin,
                int64_t end) const {
    T *y = y_ + g.first * p.features, *bias = data<T>(p.bias);
    const int64_t weights = g.matrix * p.features * p.weight.size(-1);
    if (!p.bits) {
      const int64_t from = g.first * p.width;
      const LinearFew<T> a{
          own.values + from, x + from,  data<T>(p.weight) + weights, bias, y, g.rows,
          p.width,           p.features};
      return kernels<T>().linear_few(a, begin, end);
    }
    const int64_t places = padded(p.width), lanes = places / (p.bits == 4 ? 8 : 4);
    const int64_t scales = p.scale->numel() / (p.matrices * p.features);
    const Codes codes{data<int8_t>(p.weight) + weights,
                      data<uint16_t>(*p.scale) + g.matrix * p.features * scales, p.width, scales,
                      int(p.bits)};
    const QuantizedProduct<T> a{codes,
                                bias,
                                own.values + g.first * places,
                                p.rounded ? own.codes + g.first * places : nullptr,
                                own.steps + g.first * lanes,
                                own.excess + g.first * lanes,
                                y,
                                g.rows,
                                p.features,
                                places};
    kernels<T>().quantized_product(a, begin, end);
  }

  // Attention --------------------------------------------------------------------------

  // Turns heads [heads, pitch] of row b by its position; y [heads, width] is contiguous.
  void turn(int64_t b, const T* x, int64_t heads, int64_t pitch, int64_t width, T* y) const {
    const int64_t sections = c.cos_of_positions->size(1), pairs = c.cos_of_positions->size(2);
    const int64_t angles = b * sections * pairs;
    const Rope<T> a{
        x,     c.cos + angles, c.sin + angles,     y,   1, heads, width, 0, 0, pitch, sections,
        pairs, true,           shape_.interleaved, 1.0f};
    kernels<T>().rope_turn(a, 0, 1);
  }

  // Projects, then attends with this thread's kv heads: norms and rotates queries and keys, writes
  // keys and values to the cache, attends to it.
  void attend(const Layer& l, int64_t number, Queue* queues) {
    multiply(*l.product[QKV], queues[QKV], normed(), c.qkv);
    wait();
    const Kernels<T>& k = kernels<T>();
    const int64_t h = shape_.heads, kv = shape_.kv_heads, e = shape_.head_dim, r = h / kv;
    const int64_t columns = (h + 2 * kv) * e, units = c.rows * kv;
    const bool changed = c.cos_of_positions || l.norm[Q_NORM];
    T *keys = c.cache + number * c.layer_stride, *values = keys + c.value_stride;
    const AttentionForward<T> a{{changed ? c.q : c.qkv, changed ? h * e : columns, 0, e},
                                {keys, c.slot_stride, e, c.keys * e},
                                {values, c.slot_stride, e, c.keys * e},
                                c.first,
                                c.last,
                                c.attended,
                                1,
                                c.keys,
                                h,
                                kv,
                                e,
                                e,
                                1,
                                float(l.scale)};
    for (int64_t u = share(units, t_, threads_); u < share(units, t_ + 1, threads_); ++u) {
      const int64_t b = u / kv, g = u % kv, at = (g * c.keys + c.places[size_t(b)]) * e;
      const T *row = c.qkv + b * columns, *key = row + (h + g) * e, *value = key + kv * e;
      if (changed) place(l.norm[Q_NORM], b, row + g * r * e, r, c.q + (b * h + g * r) * e);
      place(l.norm[K_NORM], b, key, 1, keys + b * c.slot_stride + at);
      memcpy(values + b * c.slot_stride + at, value, size_t(e) * sizeof(T));
      k.attention_decode(a, u, u + 1);
    }
    wait();
  }

  // Writes heads [heads, E] of row b to y, normed and rotated where the model does so.
  void place(const std::optional<Norm>& norm, int64_t b, const T* x, int64_t heads, T* y) const {
    const int64_t e = shape_.head_dim;
    if (norm) {
      T* normed = c.cos_of_positions ? own.head_in : y;
      normalise(*norm, heads, x, nullptr, normed, nullptr);
      x = normed;
    }
    if (c.cos_of_positions)
      turn(b, x, heads, e, e, y);
    else if (!norm)
      memcpy(y, x, size_t(heads * e) * sizeof(T));
  }

  // The same in latent attention, whose heads share one latent a token.
  void attend_to_latents(const Layer& l, int64_t number, Queue* queues) {
    const auto& p = l.product;
    const T* x = normed();
    multiply(*p[KV_A], queues[KV_A], x, c.kv_a);
    if (p[Q_A]) {
      multiply(*p[Q_A], queues[Q_A], x, c.q_a);
      wait();
      normalise(*l.norm[Q_A_NORM], c.rows, c.q_a, nullptr, own.rows, nullptr);
      x = own.rows;
    }
    multiply(*p[Q_B], queues[Q_B], x, c.q);
    if (!p[Q_A]) wait();
    keep_latents(l, number);
    wait();
    const int64_t first = share(shape_.heads, t_, threads_);
    if (const int64_t heads = share(shape_.heads, t_ + 1, threads_) - first)
      attend_with_heads(l, number, first, heads);
    wait();
  }

  // Writes the latents and rotated keys of this thread's rows to the cache.
  void keep_latents(const Layer& l, int64_t number) const {
    const int64_t width = shape_.key_dim, latent = l.norm[KV_A_NORM]->weight.numel();
    const int64_t turned = width - latent;
    for (int64_t b = share(c.rows, t_, threads_); b < share(c.rows, t_ + 1, threads_); ++b) {
      T* kept = c.cache + number * c.layer_stride + b * c.slot_stride + c.places[size_t(b)] * width;
      const T* row = c.kv_a + b * width;
      normalise(*l.norm[KV_A_NORM], 1, row, nullptr, kept, nullptr);
      turn(b, row + latent, 1, turned, turned, kept + latent);
    }
  }

  // Attends with heads [first, first + heads) of all rows.
  void attend_with_heads(const Layer& l, int64_t number, int64_t first, int64_t heads) const {
    const Product &to = *l.product[TO_LATENT], &from = *l.product[FROM_LATENT];
    const int64_t e = shape_.head_dim, plain = to.width, latent = to.features;
    const int64_t width = shape_.key_dim, n = c.rows;
    for (int64_t h = 0; h < heads; ++h) {
      const T* q = c.q + (first + h) * e;  // of row 0
      T* out = own.queries + h * width;
      by_head(to, first + h, q, shape_.heads * e, out, heads * width);
      for (int64_t b = 0; b < n; ++b)
        turn(b, q + b * shape_.heads * e + plain, 1, width - latent, width - latent,
             out + b * heads * width + latent);
    }
    const T* keys = c.cache + number * c.layer_stride;
    const Heads<T> cached{keys, c.slot_stride, width, 0};
    const AttentionForward<T> a{{own.queries, heads * width, 0, width},
                                cached,
                                cached,
                                c.first,
                                c.last,
                                own.summed,
                                1,
                                c.keys,
                                heads,
                                1,
                                width,
                                latent,
                                1,
                                float(l.scale)};
    kernels<T>().attention_decode(a, 0, n);
    const int64_t values = from.features, all = shape_.heads * values;
    for (int64_t h = 0; h < heads; ++h)
      by_head(from, first + h, own.summed + h * latent, heads * latent,
              c.attended + (first + h) * values, all);
  }

  // Multiplies x of one head by the head's own matrix; x and y are all rows' parts, so far apart.
  void by_head(const Product& p, int64_t head, const T* x, int64_t x_pitch, T* y,
               int64_t y_pitch) const {
    const int64_t n = c.rows;
    for (int64_t b = 0; b < n; ++b)
      memcpy(own.head_in + b * p.width, x + b * x_pitch, size_t(p.width) * sizeof(T));
    prepare(p, own.head_in, n);
    multiply(p, Group{head, 0, n}, own.head_in, own.head_out, 0, p.features);
    for (int64_t b = 0; b < n; ++b)
      memcpy(y + b * y_pitch, own.head_out + b * p.features, size_t(p.features) * sizeof(T));
  }

  // Feed-forward parts -----------------------------------------------------------------

  // Returns inner = activation(up), where the thread keeps it.
  const T* activated(const T* up, int64_t rows, int64_t width) const {
    const Kernels<T>& k = kernels<T>();
    const Activation<T> a{up, nullptr, own.inner, rows, width};
    const auto kernel = shape_.activation == "gelu"    ? k.gelu_forward
                        : shape_.activation == "geglu" ? k.geglu_forward
                                                       : k.swiglu_forward;
    kernel(a, 0, rows);
    return own.inner;
  }

  const T* mlp(const Layer& l, Queue* queues) {
    const Product &up = *l.product[UP], &down = *l.product[DOWN];
    multiply(up, queues[UP], normed(), c.up);
    wait();
    multiply(down, queues[DOWN], activated(c.up, c.rows, down.width), c.delta);
    wait();
    return c.delta;
  }

  // The chosen experts' weighted sum, and the shared experts.
  const T* experts(const Layer& l, Queue* queues) {
    const Product &up = *l.product[EXPERTS_UP], &down = *l.product[EXPERTS_DOWN];
    const int64_t n = c.rows, d = up.width, m = n * shape_.top_k;
    const bool shared = l.product[UP].has_value();
    score(*l.product[ROUTER], queues[ROUTER]);
    if (shared) multiply(*l.product[UP], queues[UP], normed(), c.up);
    wait();
    choose(*l.product[ROUTER]);
    for (int64_t i = 0; i < m; ++i)
      memcpy(own.expert_rows + own.back[i] * d, normed() + i / shape_.top_k * d,
             size_t(d) * sizeof(T));
    multiply(up, queues[EXPERTS_UP], own.expert_rows, m, own.groups, c.experts_up);
    wait();
    const T* inner = activated(c.experts_up, m, down.width);
    multiply(down, queues[EXPERTS_DOWN], inner, m, own.groups, c.experts_down);
    if (shared) {
      const Product& last = *l.product[DOWN];
      multiply(last, queues[DOWN], activated(c.up, n, last.width), c.delta);
    }
    wait();
    T* y = own.rows;
    const WeightedRows<T> a{c.experts_down, own.back, own.weights, y, d, shape_.top_k};
    kernels<T>().weighted_rows(a, 0, n);
    for (int64_t i = 0; shared && i < n * d; ++i) y[i] = narrow(wide(y[i]) + wide(c.delta[i]), T{});
    return y;
  }

  // Computes the router's logits [N, X] together with the other threads, in float32.
  void score(const Product& p, Queue& queue) const {
    for (int64_t i = 0; i < c.rows * p.width; ++i) own.values[i] = wide(normed()[i]);
    const LinearFew<float> a{own.values, own.values, data<float>(p.weight),
                             nullptr,    c.router,   c.rows,
                             p.width,    p.features};
    int64_t begin = 0, end = 0;
    while (queue.take(p.features, least(p), threads_, &begin, &end))
      kernels<float>().linear_few(a, begin, end);
  }

  // Chooses each row's experts. Sets back[n, j], the place of choice j of row n among all rows
  // sorted by expert, and the groups of rows of one expert.
  void choose(const Product& p) {
    const int64_t n = c.rows, x = p.features, m = n * shape_.top_k;
    memcpy(own.scores, c.router, size_t(n * x) * sizeof(float));
    const Route<float> a{own.scores,
                         data<float>(*p.bias),
                         own.experts,
                         own.weights,
                         own.chosen_scores,
                         own.biased,
                         own.group_scores,
                         own.group_places,
                         x,
                         shape_.top_k,
                         shape_.groups,
                         shape_.top_groups,
                         float(shape_.expert_scale),
                         shape_.normalize};
    kernels<float>().route_choose(a, 0, n);
    own.groups.clear();
    for (int64_t e = 0, at = 0; at < m; ++e) {
      const int64_t first = at;
      for (int64_t i = 0; i < m; ++i)
        if (own.experts[i] == e) own.back[i] = at++;
      if (at > first) own.groups.push_back({e, first, at - first});
    }
  }

  const Shape& shape_;
  const Call<T>& c;
  Own<T>& own;
  const int64_t t_, threads_;
  const T *delta_ = nullptr, *residual_ = c.x;
};

}  // namespace glm
