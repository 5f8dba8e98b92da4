// Runs a decode step of a whole model, one token for each of a few sequences: the operators'
// kernels one after another, with one team of threads from the first layer to the logits. The work
// between two products takes microseconds; calling operators would cost as much again, and the
// weights that pass through the caches evict Python's own code. Results equal the operators' bit
// for bit. Shapes as in decode_parts.h; V vocabulary, P positions, G position rows.
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/custom_class.h>

#include <limits>
#include <mutex>

#include "decode_thread.h"

namespace glm {
namespace {

class DecodeStep : public torch::CustomClassHolder {
 public:
  DecodeStep(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t key_dim, double alpha,
             bool deepnorm, bool interleaved, std::string activation)
      : shape_{heads,      kv_heads, head_dim, key_dim, alpha, deepnorm, interleaved,
               activation, 0,        1,        1,       1.0,   false} {}

  // Sets how the routers of sparse layers choose.
  void set_routing(int64_t top_k, int64_t groups, int64_t top_groups, double scale,
                   bool normalize) {
    shape_.top_k = top_k, shape_.groups = groups, shape_.top_groups = top_groups;
    shape_.expert_scale = scale, shape_.normalize = normalize;
  }

  // Adds a layer: weight, scale and bias of its products, their bits and activation bits; weight
  // and bias of its norms, and what they add to a variance; the factor of the attention's scores.
  void add_layer(Parts products, std::vector<int64_t> bits, std::vector<int64_t> activation_bits,
                 Parts norms, std::vector<double> eps, double scale) {
    TORCH_CHECK_VALUE(products.size() == 3 * NUM_PRODUCTS && bits.size() == NUM_PRODUCTS &&
                          activation_bits.size() == NUM_PRODUCTS && norms.size() == 2 * NUM_NORMS &&
                          eps.size() == NUM_NORMS,
                      "decode step: a layer has ", int(NUM_PRODUCTS), " products and ",
                      int(NUM_NORMS), " norms, absent ones included");
    Layer layer;
    for (size_t i = 0; i < NUM_PRODUCTS; ++i)
      layer.product.push_back(product(products, 3 * i, bits[i], activation_bits[i]));
    for (size_t i = 0; i < NUM_NORMS; ++i) layer.norm.push_back(norm(norms, 2 * i, eps[i]));
    layer.scale = scale;
    const auto& p = layer.product;
    const auto has = [&](Products i) { return p[i].has_value(); };
    const bool attends = layer.latent() ? has(Q_B) && has(TO_LATENT) && has(FROM_LATENT) &&
                                              layer.norm[KV_A_NORM].has_value()
                                        : has(QKV);
    const bool feeds = layer.sparse()
                           ? has(EXPERTS_UP) && has(EXPERTS_DOWN) && p[ROUTER]->bias.has_value()
                           : has(UP);
    TORCH_CHECK_VALUE(attends && has(OUT) && feeds && has(UP) == has(DOWN) && layer.norm[INPUT] &&
                          layer.norm[MLP] && has(Q_A) == layer.norm[Q_A_NORM].has_value(),
                      "decode step: layer ", layers_.size(), " lacks a product or a norm");
    layers_.push_back(std::move(layer));
  }

  // Sets what comes before and after the layers: the embedding [V, D] and, where the model has
  // them, two position tables [P, D] added to it; cos and sin [P, G, pairs] of every position,
  // where the model has rotary embedding; the final norm; the head.
  void set_ends(Parts embeddings, Parts angles, Parts final_norm, double eps, Parts head,
                int64_t bits, int64_t activation_bits) {
    TORCH_CHECK_VALUE(
        embeddings.size() == 3 && angles.size() == 2 && embeddings[0],
        "decode step: needs an embedding, two tables or none, and two angles or none");
    for (OptionalTensor& e : embeddings) e = contiguous(e);
    embeddings_ = std::move(embeddings);
    cos_ = contiguous(angles[0]), sin_ = contiguous(angles[1]);
    final_norm_ = norm(final_norm, 0, eps);
    head_ = product(head, 0, bits, activation_bits);
    queues_ = std::vector<Queue>(NUM_PRODUCTS * layers_.size() + 1);
  }

  // Returns float32 logits [N, V] of N tokens. positions [2 N] holds two per row; key_start,
  // key_end and places are [N]; the cache [layers, 2, slots, K, S, E], or of latents
  // [layers, 1, slots, 1, S, C + R], is written to, slot n by row n.
  Tensor step(std::vector<int64_t> tokens, std::vector<int64_t> positions,
              std::vector<int64_t> key_start, std::vector<int64_t> key_end,
              std::vector<int64_t> places, const Tensor& cache) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t n = int64_t(tokens.size());
    check_cache(n, cache);
    TORCH_CHECK_VALUE(positions.size() == 2 * tokens.size() && key_start.size() == tokens.size() &&
                          key_end.size() == tokens.size() && places.size() == tokens.size(),
                      "decode step: ", n,
                      " tokens need as many places, key_start and key_end, and two "
                      "positions each");
    check_all(tokens, embeddings_[0]->size(0), "decode step: token");
    check_all(places, cache.size(4), "decode step: place");
    check_all(key_start, cache.size(4) + 1, "decode step: key_start");
    check_all(key_end, cache.size(4) + 1, "decode step: key_end");
    check_all(positions, num_positions(), "decode step: position");
    Tensor logits = at::empty({n, head_->features}, cache.options());
    by_dtype(cache, [&](auto zero) {
      using T = decltype(zero);
      Call<T> c{tokens, positions, key_start, key_end, places, cos_, sin_};
      c.cache = data<T>(cache), c.layer_stride = cache.stride(0), c.value_stride = cache.stride(1);
      c.slot_stride = cache.stride(2), c.keys = cache.size(4), c.rows = n;
      c.logits = data<T>(logits);
      run(c);
    });
    return logits.to(at::kFloat);
  }

 private:
  static std::optional<Product> product(const Parts& parts, size_t at, int64_t bits,
                                        int64_t activation_bits) {
    if (!parts[at]) return std::nullopt;
    const Tensor weight = parts[at]->contiguous();
    const int64_t width = bits ? weight.size(-1) * 8 / bits : weight.size(-1);
    const int64_t matrices = weight.dim() == 3 ? weight.size(0) : 1;
    return Product{weight,
                   contiguous(parts[at + 1]),
                   contiguous(parts[at + 2]),
                   bits,
                   width,
                   weight.size(-2),
                   matrices,
                   activation_bits == 8};
  }

  static std::optional<Norm> norm(const Parts& parts, size_t at, double eps) {
    if (!parts[at]) return std::nullopt;
    return Norm{parts[at]->contiguous(), contiguous(parts[at + 1]), eps};
  }

  void check_cache(int64_t n, const Tensor& cache) const {
    TORCH_CHECK_VALUE(head_ && final_norm_ && !layers_.empty(),
                      "decode step: has no layers, or no ends");
    TORCH_CHECK_VALUE(n > 0 && cache.dim() == 6 && cache.size(0) >= int64_t(layers_.size()) &&
                          cache.size(1) == (layers_[0].latent() ? 1 : 2) && cache.size(2) >= n &&
                          cache.size(3) == shape_.kv_heads && cache.size(5) == shape_.key_dim &&
                          cache.is_contiguous() &&
                          cache.scalar_type() == embeddings_[0]->scalar_type(),
                      "decode step: ", n, " tokens do not fit a cache ", cache.sizes());
  }

  static void check_all(const std::vector<int64_t>& values, int64_t size, const char* what) {
    for (size_t i = 0; i < values.size(); ++i)
      TORCH_CHECK_INDEX(0 <= values[i] && values[i] < size, what, " ", values[i], " of row ", i,
                        ": must lie in [0, ", size, ")");
  }

  int64_t num_positions() const {
    const OptionalTensor& table = cos_ ? cos_ : embeddings_[1];
    return table ? table->size(0) : std::numeric_limits<int64_t>::max();
  }

  template <class T>
  void run(Call<T>& c) {
    lay_out_shared(c);
    const int64_t wanted = at::in_parallel_region() ? 1 : at::get_num_threads();
    if (own_.size() < size_t(wanted)) own_.resize(size_t(wanted));
    std::vector<Own<T>> own{size_t(wanted)};
    for (size_t t = 0; t < size_t(wanted); ++t) lay_out_own(own_[t], own[t], c.rows);
    for (int64_t b = 0; b < c.rows; ++b) begin_row(c, b);
    for (Queue& q : queues_) q.start();
#pragma omp parallel num_threads(int(wanted)) if (wanted > 1)
    {
      const int number = omp_get_thread_num();
      Thread<T> thread(shape_, c, own[size_t(number)], number, omp_get_num_threads());
      for (size_t i = 0; i < layers_.size(); ++i)
        thread.layer(layers_[i], int64_t(i), &queues_[NUM_PRODUCTS * i]);
      thread.finish(*final_norm_, *head_, queues_.back());
    }
  }

  // The most numbers that products i of all layers take, or make, for a row.
  int64_t most(Products i, int64_t Product::* size) const {
    int64_t found = 0;
    for (const Layer& l : layers_)
      if (l.product[i]) found = std::max(found, *l.product[i].*size);
    return found;
  }

  template <class T>
  void lay_out_shared(Call<T>& c) {
    const int64_t n = c.rows, m = n * shape_.top_k, d = embeddings_[0]->size(1);
    const int64_t angles = cos_ ? cos_->size(1) * cos_->size(2) : 0;
    const auto made = [&](Products i) { return most(i, &Product::features); };
    shared_.lay_out([&] {
      c.x = shared_.take<T>(n * d), c.delta = shared_.take<T>(n * d);
      c.cos = shared_.take<float>(n * angles), c.sin = shared_.take<float>(n * angles);
      c.first = shared_.take<int32_t>(n), c.last = shared_.take<int32_t>(n);
      c.qkv = shared_.take<T>(n * made(QKV));
      c.q = shared_.take<T>(n * shape_.heads * shape_.head_dim);
      c.q_a = shared_.take<T>(n * made(Q_A)), c.kv_a = shared_.take<T>(n * made(KV_A));
      c.attended = shared_.take<T>(n * most(OUT, &Product::width));
      c.up = shared_.take<T>(n * made(UP)), c.router = shared_.take<float>(n * made(ROUTER));
      c.experts_up = shared_.take<T>(m * made(EXPERTS_UP));
      c.experts_down = shared_.take<T>(m * made(EXPERTS_DOWN));
    });
  }

  template <class T>
  void lay_out_own(Arena& a, Own<T>& o, int64_t n) const {
    const int64_t m = n * shape_.top_k, d = embeddings_[0]->size(1), heads = shape_.heads;
    const auto taken = [&](Products i) { return most(i, &Product::width); };
    int64_t widest = n * padded(head_->width);
    for (int i = 0; i < NUM_PRODUCTS; ++i)
      widest = std::max(widest, (i < EXPERTS_UP ? n : m) * padded(taken(Products(i))));
    const int64_t latent = taken(FROM_LATENT), experts = most(ROUTER, &Product::features);
    const int64_t inner = std::max(n * taken(DOWN), m * taken(EXPERTS_DOWN));
    const int64_t head_in =
        std::max(n * std::max(latent, taken(TO_LATENT)), heads * shape_.head_dim);
    const int64_t values = most(FROM_LATENT, &Product::features);
    a.lay_out([&] {
      for (int i = 0; i < 2; ++i) o.normed[i] = a.take<T>(n * d), o.total[i] = a.take<T>(n * d);
      o.branch = a.take<T>(n * d), o.inner = a.take<T>(inner);
      o.rows = a.take<T>(n * std::max(d, taken(Q_B))), o.expert_rows = a.take<T>(m * d);
      o.queries = a.take<T>(latent ? n * heads * shape_.key_dim : 0);
      o.summed = a.take<T>(n * heads * latent), o.head_in = a.take<T>(head_in);
      o.head_out = a.take<T>(n * std::max(latent, values));
      o.stats = a.take<float>(2 * std::max(n, heads)), o.values = a.take<float>(widest);
      o.steps = a.take<float>(widest / 4), o.codes = a.take<int8_t>(widest);
      o.excess = a.take<int32_t>(widest / 4);
      o.scores = a.take<float>(n * experts), o.biased = a.take<float>(n * experts);
      o.weights = a.take<float>(m), o.chosen_scores = a.take<float>(m);
      o.group_scores = a.take<float>(2 * n * shape_.groups);
      o.group_places = a.take<int64_t>(n * shape_.groups);
      o.experts = a.take<int64_t>(m), o.back = a.take<int64_t>(m);
    });
  }

  // Fills in embedding, angles and visible keys of row b.
  template <class T>
  void begin_row(const Call<T>& c, int64_t b) const {
    const int64_t d = embeddings_[0]->size(1);
    T* x = c.x + b * d;
    memcpy(x, data<T>(embeddings_[0]) + c.tokens[size_t(b)] * d, size_t(d) * sizeof(T));
    for (int64_t row = 0; row < 2; ++row)
      if (const OptionalTensor& table = embeddings_[size_t(row) + 1]) {
        const T* added = data<T>(table) + c.positions[size_t(2 * b + row)] * d;
        for (int64_t i = 0; i < d; ++i) x[i] = narrow(wide(x[i]) + wide(added[i]), T{});
      }
    for (int64_t g = 0; cos_ && g < cos_->size(1); ++g) {
      const int64_t sections = cos_->size(1), pairs = cos_->size(2);
      const int64_t from = (c.positions[size_t(2 * b + g)] * sections + g) * pairs;
      memcpy(c.cos + (b * sections + g) * pairs, data<float>(cos_) + from, size_t(pairs) * 4);
      memcpy(c.sin + (b * sections + g) * pairs, data<float>(sin_) + from, size_t(pairs) * 4);
    }
    c.first[b] = int32_t(c.key_start[size_t(b)]), c.last[b] = int32_t(c.key_end[size_t(b)]);
  }

  Shape shape_;
  std::vector<Layer> layers_;
  Parts embeddings_;
  OptionalTensor cos_, sin_;
  std::optional<Norm> final_norm_;
  std::optional<Product> head_;
  std::mutex mutex_;  // guards the arenas
  Arena shared_;
  std::vector<Arena> own_;
  std::vector<Queue> queues_;  // one per product
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.class_<DecodeStep>("DecodeStep")
      .def(torch::init<int64_t, int64_t, int64_t, int64_t, double, bool, bool, std::string>())
      .def("set_routing", &DecodeStep::set_routing)
      .def("add_layer", &DecodeStep::add_layer)
      .def("set_ends", &DecodeStep::set_ends)
      .def("step", &DecodeStep::step);
}

}  // namespace glm
