// Runs a decode step of a whole model, one token for each of a few sequences: the operators'
// kernels one after another, with one team of threads from the first layer to the logits. The work
// between two products takes microseconds; calling operators would cost as much again, and the
// weights that pass through the caches evict Python's own code. Results equal the operators' bit
// for bit. Shapes: N rows, D width, H heads, K kv heads, E head dim, S keys, V vocabulary.
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <omp.h>
#include <torch/custom_class.h>

#include <atomic>
#include <limits>
#include <memory>
#include <mutex>

#include "tensor.h"

namespace glm {
namespace {

using Parts = std::vector<OptionalTensor>;

// A product y = x weight^T + bias. The weight is float, or codes with scales.
struct Product {
  Tensor weight;
  OptionalTensor scale, bias;
  int64_t bits, width, features;  // bits is 0 for a float weight
  bool rounded;
};

struct Norm {
  Tensor weight;
  OptionalTensor bias;
};

enum Products { QKV, OUT, UP, DOWN };
enum Norms { INPUT, MLP, POST_ATTENTION, POST_MLP };

struct Layer {
  std::vector<Product> product;
  std::vector<std::optional<Norm>> norm;
};

// What is the same in every layer.
struct Shape {
  int64_t heads, kv_heads, head_dim;
  double scale, eps, alpha;  // scale multiplies attention's scores
  bool deepnorm, interleaved;
  std::string activation;
};

// Scratch memory of one thread or of all, handed out front to back.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  // Calls f twice: first to measure how much its `take` calls need, then to hand the memory out.
  template <class F>
  void lay_out(F f) {
    memory_ = nullptr, used_ = 0;
    f();
    if (used_ > size_) {
      owner_.reset(new char[used_ + 63]);
      size_ = used_;
    }
    char* p = owner_.get();
    memory_ = p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64;
    used_ = 0;
    f();
  }

 private:
  std::unique_ptr<char[]> owner_;
  size_t size_ = 0, used_ = 0;
  char* memory_ = nullptr;
};

int64_t share(int64_t size, int64_t thread, int64_t threads) { return size * thread / threads; }

// Deals a product's features out to whichever thread is free, since other processes may slow a
// thread down.
class Queue {
 public:
  // Takes the next part, large ones first. Returns false when none is left.
  bool take(int64_t size, int64_t least, int64_t threads, int64_t* begin, int64_t* end) {
    constexpr int64_t together = 8;  // features: kernels work on a few at a time
    *begin = next_.load(std::memory_order_relaxed);
    do {
      if (*begin >= size) return false;
      const bool early = *begin < size * 7 / 8;
      const int64_t part = std::max(least, size * (early ? 14 : 1) / (16 * threads));
      *end = std::min(size, *begin + (part + together - 1) / together * together);
    } while (!next_.compare_exchange_weak(*begin, *end, std::memory_order_relaxed));
    return true;
  }
  void start() { next_.store(0, std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> next_{0};
};

// One call's arguments and buffers.
template <class T>
struct Call {
  const std::vector<int64_t>&tokens, &positions, &key_start, &key_end, &places;
  T* cache;  // [layers, 2, slots, K, S, E]
  int64_t layer_stride, value_stride, slot_stride, keys;
  int64_t rows;
  T *x, *qkv, *q, *attended, *delta, *up, *logits;  // shared by all threads
  float *cos, *sin;
  int32_t *first, *last;  // key_start, key_end
};

// Buffers that each thread fills for itself, which costs less than waiting for another thread.
template <class T>
struct Own {
  T *normed[2], *total[2], *branch, *inner;
  float *stats, *values, *steps;
  int8_t* codes;
  int32_t* excess;
  int turn = 0;
};

class DecodeStep : public torch::CustomClassHolder {
 public:
  DecodeStep(int64_t heads, int64_t kv_heads, int64_t head_dim, double scale, double eps,
             double alpha, bool deepnorm, bool interleaved, std::string activation)
      : shape_{heads, kv_heads, head_dim, scale, eps, alpha, deepnorm, interleaved, activation} {}

  // Adds a layer: weight, scale and bias of its four products, their bits and activation bits, and
  // weight and bias of its four norms.
  void add_layer(Parts products, std::vector<int64_t> bits, std::vector<int64_t> activation_bits,
                 Parts norms) {
    TORCH_CHECK_VALUE(products.size() == 12 && bits.size() == 4 && activation_bits.size() == 4 &&
                          norms.size() == 8,
                      "decode step: a layer has four products and four norms");
    Layer layer;
    for (size_t i = 0; i < 4; ++i) {
      layer.product.push_back(product(products, 3 * i, bits[i], activation_bits[i]));
      layer.norm.push_back(norm(norms, 2 * i));
    }
    layers_.push_back(std::move(layer));
  }

  // Sets what comes before and after the layers: the embedding [V, D] and, where the model has
  // them, two position tables [P, D] added to it; cos and sin [P, G, pairs] of every position,
  // where the model has rotary embedding; the final norm; the head.
  void set_ends(Parts embeddings, Parts angles, Parts final_norm, Parts head, int64_t bits,
                int64_t activation_bits) {
    TORCH_CHECK_VALUE(
        embeddings.size() == 3 && angles.size() == 2 && embeddings[0],
        "decode step: needs an embedding, two tables or none, and two angles or none");
    for (OptionalTensor& e : embeddings) e = contiguous(e);
    embeddings_ = std::move(embeddings);
    cos_ = contiguous(angles[0]), sin_ = contiguous(angles[1]);
    final_norm_ = norm(final_norm, 0);
    head_ = product(head, 0, bits, activation_bits);
    queues_ = std::vector<Queue>(4 * layers_.size() + 1);
  }

  // Returns float32 logits [N, V] of N tokens. positions [2 N] holds two per row; key_start,
  // key_end and places are [N]; cache [layers, 2, slots, K, S, E] is written to, slot n by row n.
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
      Call<T> c{tokens, positions, key_start, key_end, places};
      c.cache = data<T>(cache), c.layer_stride = cache.stride(0), c.value_stride = cache.stride(1);
      c.slot_stride = cache.stride(2), c.keys = cache.size(4), c.rows = n;
      c.logits = data<T>(logits);
      run(c);
    });
    return logits.to(at::kFloat);
  }

 private:
  static Product product(const Parts& parts, size_t at, int64_t bits, int64_t activation_bits) {
    TORCH_CHECK_VALUE(parts[at], "decode step: a product without a weight");
    const Tensor weight = parts[at]->contiguous();
    const int64_t width = bits ? weight.size(1) * 8 / bits : weight.size(1);
    return {weight,         contiguous(parts[at + 1]), contiguous(parts[at + 2]), bits, width,
            weight.size(0), activation_bits == 8};
  }

  static std::optional<Norm> norm(const Parts& parts, size_t at) {
    if (!parts[at]) return std::nullopt;
    return Norm{parts[at]->contiguous(), contiguous(parts[at + 1])};
  }

  void check_cache(int64_t n, const Tensor& cache) const {
    TORCH_CHECK_VALUE(head_ && !layers_.empty(), "decode step: has no layers, or no ends");
    TORCH_CHECK_VALUE(n > 0 && cache.dim() == 6 && cache.size(0) == int64_t(layers_.size()) &&
                          cache.size(1) == 2 && cache.size(2) >= n &&
                          cache.size(3) == shape_.kv_heads && cache.size(5) == shape_.head_dim &&
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
    const int64_t n = c.rows, e = shape_.head_dim, d = layers_[0].product[QKV].width;
    int64_t widest = head_->width, qkv = 0, up = 0, inner = 0;
    for (const Layer& l : layers_) {
      for (const Product& p : l.product) widest = std::max(widest, p.width);
      qkv = std::max(qkv, l.product[QKV].features), up = std::max(up, l.product[UP].features);
      inner = std::max(inner, l.product[DOWN].width);
    }
    const int64_t angles = cos_ ? cos_->size(1) * cos_->size(2) : 0;
    shared_.lay_out([&] {
      c.x = shared_.take<T>(n * d), c.cos = shared_.take<float>(n * angles);
      c.sin = shared_.take<float>(n * angles), c.first = shared_.take<int32_t>(n);
      c.last = shared_.take<int32_t>(n);
      c.qkv = shared_.take<T>(n * qkv), c.q = shared_.take<T>(n * shape_.heads * e);
      c.attended = shared_.take<T>(n * shape_.heads * e);
      c.delta = shared_.take<T>(n * d), c.up = shared_.take<T>(n * up);
    });
    const int64_t wanted = at::in_parallel_region() ? 1 : at::get_num_threads();
    if (own_.size() < size_t(wanted)) own_.resize(size_t(wanted));
    std::vector<Own<T>> own{size_t(wanted)};
    for (size_t t = 0; t < size_t(wanted); ++t)
      own_[t].lay_out([&] {
        Arena& a = own_[t];
        Own<T>& o = own[t];
        for (int i = 0; i < 2; ++i) o.normed[i] = a.take<T>(n * d), o.total[i] = a.take<T>(n * d);
        o.branch = a.take<T>(n * d), o.inner = a.take<T>(n * inner);
        o.stats = a.take<float>(2 * n), o.values = a.take<float>(n * padded(widest));
        o.steps = a.take<float>(n * padded(widest) / 4),
        o.codes = a.take<int8_t>(n * padded(widest));
        o.excess = a.take<int32_t>(n * padded(widest) / 4);
      });
    for (int64_t b = 0; b < n; ++b) begin_row(c, b, d);
    for (Queue& q : queues_) q.start();
#pragma omp parallel num_threads(int(wanted)) if (wanted > 1)
    layers(c, own[size_t(omp_get_thread_num())], omp_get_thread_num(), omp_get_num_threads());
  }

  // Fills in embedding, angles and visible keys of row b.
  template <class T>
  void begin_row(const Call<T>& c, int64_t b, int64_t d) const {
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

  static void wait() {
#pragma omp barrier
  }

  // Runs one thread's part of the step.
  template <class T>
  void layers(const Call<T>& c, Own<T>& own, int64_t t, int64_t threads) {
    const T *delta = nullptr, *residual = c.x;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& l = layers_[i];
      residual = add_norm(c, own, *l.norm[INPUT], delta, residual);
      multiply(own, l.product[QKV], queues_[4 * i + QKV], own.normed[own.turn], c.qkv, c.rows,
               threads);
      wait();
      attend(c, int64_t(i), t, threads);
      wait();
      multiply(own, l.product[OUT], queues_[4 * i + OUT], c.attended, c.delta, c.rows, threads);
      wait();
      delta = post_norm(c, own, l.norm[POST_ATTENTION]);
      residual = add_norm(c, own, *l.norm[MLP], delta, residual);
      multiply(own, l.product[UP], queues_[4 * i + UP], own.normed[own.turn], c.up, c.rows,
               threads);
      wait();
      activate(c, own, l.product[DOWN].width);
      multiply(own, l.product[DOWN], queues_[4 * i + DOWN], own.inner, c.delta, c.rows, threads);
      wait();
      delta = post_norm(c, own, l.norm[POST_MLP]);
    }
    add_norm(c, own, *final_norm_, delta, residual);
    multiply(own, *head_, queues_[4 * layers_.size()], own.normed[own.turn], c.logits, c.rows,
             threads);
  }

  // Sets own.normed[own.turn] to norm(delta + alpha residual); returns the next residual.
  template <class T>
  const T* add_norm(const Call<T>& c, Own<T>& own, const Norm& norm, const T* delta,
                    const T* residual) const {
    own.turn ^= 1;
    T* y = own.normed[own.turn];
    T* total = own.total[own.turn];
    normalise(c, own, norm, delta ? delta : residual, delta ? residual : nullptr, y, total);
    return shape_.deepnorm ? y : delta ? total : residual;
  }

  template <class T>
  const T* post_norm(const Call<T>& c, Own<T>& own, const std::optional<Norm>& norm) const {
    if (!norm) return c.delta;
    normalise<T>(c, own, *norm, c.delta, nullptr, own.branch, nullptr);
    return own.branch;
  }

  template <class T>
  void normalise(const Call<T>& c, Own<T>& own, const Norm& norm, const T* x, const T* residual,
                 T* y, T* total) const {
    const NormForward<T> a{x,
                           residual,
                           data<T>(norm.weight),
                           data<T>(norm.bias),
                           y,
                           total,
                           own.stats,
                           c.rows,
                           norm.weight.numel(),
                           float(shape_.eps),
                           float(shape_.alpha)};
    kernels<T>().norm_forward(a, 0, c.rows);
  }

  // Computes y = x weight^T + bias together with the other threads.
  template <class T>
  static void multiply(Own<T>& own, const Product& p, Queue& queue, const T* x, T* y, int64_t rows,
                       int64_t threads) {
    const Kernels<T>& k = kernels<T>();
    constexpr int64_t least_bytes = 1 << 16;
    const int64_t row_bytes = p.weight.size(1) * int64_t(p.weight.element_size());
    const int64_t least = least_bytes / std::max<int64_t>(1, row_bytes);
    int64_t begin = 0, end = 0;
    if (!p.bits) {
      for (int64_t i = 0; i < rows * p.width; ++i) own.values[i] = wide(x[i]);
      const LinearFew<T> a{own.values, x,    data<T>(p.weight), data<T>(p.bias),
                           y,          rows, p.width,           p.features};
      while (queue.take(p.features, least, threads, &begin, &end)) k.linear_few(a, begin, end);
      return;
    }
    const Codes codes{data<int8_t>(p.weight), data<uint16_t>(*p.scale), p.width,
                      p.scale->numel() / p.features, int(p.bits)};
    int8_t* of_codes = p.rounded ? own.codes : nullptr;
    const QuantizedInput<T> in{x,          own.values, of_codes,        own.steps,
                               own.excess, p.width,    padded(p.width), int(p.bits)};
    k.quantized_input(in, 0, rows);
    const QuantizedProduct<T> a{codes,      data<T>(p.bias), own.values, of_codes,
                                own.steps,  own.excess,      y,          rows,
                                p.features, padded(p.width)};
    while (queue.take(p.features, least, threads, &begin, &end)) k.quantized_product(a, begin, end);
  }

  static float narrow(float x, float) { return x; }
  static bf16 narrow(float x, bf16) { return {c10::detail::round_to_nearest_even(x)}; }
  static float wide(float x) { return x; }
  static float wide(bf16 x) { return c10::detail::f32_from_bits(x.bits); }

  template <class T>
  void activate(const Call<T>& c, Own<T>& own, int64_t width) const {
    const Kernels<T>& k = kernels<T>();
    const Activation<T> a{c.up, nullptr, own.inner, c.rows, width};
    const auto kernel = shape_.activation == "gelu"    ? k.gelu_forward
                        : shape_.activation == "geglu" ? k.geglu_forward
                                                       : k.swiglu_forward;
    kernel(a, 0, c.rows);
  }

  // Attention of this thread's kv heads: rotates queries and keys, writes keys and values to the
  // cache, attends to it.
  template <class T>
  void attend(const Call<T>& c, int64_t layer, int64_t t, int64_t threads) const {
    const Kernels<T>& k = kernels<T>();
    const int64_t h = shape_.heads, kv = shape_.kv_heads, e = shape_.head_dim, r = h / kv;
    const int64_t columns = (h + 2 * kv) * e, units = c.rows * kv;
    T *keys = c.cache + layer * c.layer_stride, *values = keys + c.value_stride;
    const T* q = cos_ ? c.q : c.qkv;
    const int64_t sections = cos_ ? cos_->size(1) : 0, pairs = cos_ ? cos_->size(2) : 0;
    const AttentionForward<T> a{{q, cos_ ? h * e : columns, 0, e},
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
                                float(shape_.scale)};
    for (int64_t u = share(units, t, threads); u < share(units, t + 1, threads); ++u) {
      const int64_t b = u / kv, g = u % kv, at = (g * c.keys + c.places[size_t(b)]) * e;
      const T *row = c.qkv + b * columns, *key = row + (h + g) * e, *value = key + kv * e;
      T* kept = keys + b * c.slot_stride + at;
      if (cos_) {
        const int64_t angles = b * sections * pairs;
        Rope<T> turn{row + g * r * e,
                     c.cos + angles,
                     c.sin + angles,
                     c.q + (b * h + g * r) * e,
                     1,
                     r,
                     e,
                     0,
                     0,
                     e,
                     sections,
                     pairs,
                     true,
                     shape_.interleaved,
                     1.0f};
        k.rope_turn(turn, 0, 1);
        turn.x = key, turn.y = kept, turn.heads = 1;
        k.rope_turn(turn, 0, 1);
      } else {
        memcpy(kept, key, size_t(e) * sizeof(T));
      }
      memcpy(values + b * c.slot_stride + at, value, size_t(e) * sizeof(T));
      k.attention_decode(a, u, u + 1);
    }
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
      .def(
          torch::init<int64_t, int64_t, int64_t, double, double, double, bool, bool, std::string>())
      .def("add_layer", &DecodeStep::add_layer)
      .def("set_ends", &DecodeStep::set_ends)
      .def("step", &DecodeStep::step);
}

}  // namespace glm
