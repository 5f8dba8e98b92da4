// What a decode step works on: a model's parts, and the memory of a call. Shapes: N rows, D width,
// H heads, K kv heads, E head dim, S keys, X experts, T experts of a row, M = N T; of latent
// attention C latent, R rotated dimensions, U value head dim.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "tensor.h"

namespace glm {

using Parts = std::vector<OptionalTensor>;

// A product y = x weight^T + bias. The weight [matrices, features, width] is float, or codes with
// scales. Of a router, the bias is no summand, but corrects the choice.
struct Product {
  Tensor weight;
  OptionalTensor scale, bias;
  int64_t bits, width, features, matrices;  // bits is 0 for a float weight
  bool rounded;
};

struct Norm {
  Tensor weight;
  OptionalTensor bias;
  double eps;
};

// The order in which Python hands a layer's parts over; absent ones are null. UP and DOWN are those
// of a dense layer, or of a sparse layer's shared experts.
enum Products {
  QKV,
  OUT,
  UP,
  DOWN,
  Q_A,
  Q_B,
  KV_A,
  TO_LATENT,
  FROM_LATENT,
  ROUTER,
  EXPERTS_UP,
  EXPERTS_DOWN,
  NUM_PRODUCTS
};
enum Norms { INPUT, MLP, POST_ATTENTION, POST_MLP, Q_NORM, K_NORM, Q_A_NORM, KV_A_NORM, NUM_NORMS };

struct Layer {
  std::vector<std::optional<Product>> product;
  std::vector<std::optional<Norm>> norm;
  double scale;  // of the attention's scores
  bool latent() const { return product[KV_A].has_value(); }
  bool sparse() const { return product[ROUTER].has_value(); }
};

// What is the same in every layer. Heads of the cache: `kv_heads`, of width `key_dim`.
struct Shape {
  int64_t heads, kv_heads, head_dim, key_dim;
  double alpha;
  bool deepnorm, interleaved;
  std::string activation;
  int64_t top_k, groups, top_groups;  // of the router
  double expert_scale;
  bool normalize;
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

inline int64_t share(int64_t size, int64_t thread, int64_t threads) {
  return size * thread / threads;
}

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

// Rows `first` and on of an input, which one matrix of a product multiplies.
struct Group {
  int64_t matrix, first, rows;
};

// One call's arguments and buffers.
template <class T>
struct Call {
  const std::vector<int64_t>&tokens, &positions, &key_start, &key_end, &places;
  const OptionalTensor &cos_of_positions, &sin_of_positions;
  T* cache;  // [layers, 2, slots, K, S, E], or [layers, 1, slots, 1, S, C + R]
  int64_t layer_stride, value_stride, slot_stride, keys;
  int64_t rows;
  // shared by all threads: a result of a product each, but x, q (rotated) and attended
  T *x, *qkv, *q, *q_a, *kv_a, *attended, *delta, *up, *experts_up, *experts_down, *logits;
  float *router, *cos, *sin;
  int32_t *first, *last;  // key_start, key_end
};

// Buffers that each thread fills for itself, which costs less than waiting for another thread.
template <class T>
struct Own {
  T *normed[2], *total[2], *branch, *inner;
  T *rows, *expert_rows, *summed, *head_in, *head_out, *queries;
  float *stats, *values, *steps;
  int8_t* codes;
  int32_t* excess;
  // of the router: scores, then those with the bias [N, X]; the chosen experts and their weights
  float *scores, *biased, *weights, *chosen_scores, *group_scores;
  int64_t *experts, *group_places, *back;
  std::vector<Group> groups;
  int turn = 0;
};

}  // namespace glm
