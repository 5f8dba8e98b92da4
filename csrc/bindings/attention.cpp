// Bindings of attention, which keeps only q, k and v for backward.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "tensor.h"

namespace glm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using AttentionSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                  const Tensor&, double);
using AttentionBackwardSignature = Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, double);

// Returns x with a contiguous last dimension. The kernels read rows in place, for example in a
// fused projection.
Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

template <class T>
Heads<T> heads(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// The least units of work to divide among threads: where batch and heads give fewer, queries are
// divided too. A constant, so that results do not depend on the number of threads.
constexpr int64_t enough_units = 32;

// Into how many shares the queries of a lone key head are divided where there is one token, so that
// all threads have work: latent attention has 20 queries a key. A share reads the keys for itself.
// The bits of a query do not depend on the others of its share.
int64_t shares_of_a_head(int64_t batch, int64_t queries, int64_t kv_heads, int64_t num_heads) {
  if (queries > 1 || kv_heads > 1) return 1;
  const int64_t rows = std::max<int64_t>(1, batch);
  int64_t shares = std::min<int64_t>(num_heads, (at::get_num_threads() + rows - 1) / rows);
  while (num_heads % shares) ++shares;
  return shares;
}

Tensor attention_forward(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                         const Tensor& key_start_, const Tensor& key_end_, double scale) {
  check_attention(q_, k_, v_, key_start_, key_end_);
  const Tensor q = with_contiguous_rows(q_), k = with_contiguous_rows(k_),
               v = with_contiguous_rows(v_);
  const Tensor key_start = key_start_.contiguous(), key_end = key_end_.contiguous();
  const int64_t batch = q.size(0), queries = q.size(1), num_heads = q.size(2), width = q.size(3),
                values = v.size(3);
  const int64_t kv_heads = k.size(2) * shares_of_a_head(batch, queries, k.size(2), num_heads);
  const int64_t units = batch * kv_heads, tiles = (queries + attention_tile - 1) / attention_tile;
  const int64_t parts = std::min(tiles, (enough_units + units - 1) / std::max<int64_t>(1, units));
  Tensor y = at::empty({batch, queries, num_heads, values}, q.options());
  by_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    Heads<T> keys = heads<T>(k), of_values = heads<T>(v);
    if (kv_heads > k.size(2)) keys.head = of_values.head = 0;
    const AttentionForward<T> a{heads<T>(q),
                                keys,
                                of_values,
                                data<int32_t>(key_start),
                                data<int32_t>(key_end),
                                data<T>(y),
                                queries,
                                k.size(1),
                                num_heads,
                                kv_heads,
                                width,
                                values,
                                parts,
                                float(scale)};
    parallel(units * parts, attention_tile * k.size(1) * width, [&](int64_t i, int64_t j) {
      queries == 1 ? kernels<T>().attention_decode(a, i, j)
                   : kernels<T>().attention_forward(a, i, j);
    });
  });
  return y;
}

Three attention_backward(const Tensor& dy_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                         const Tensor& key_start_, const Tensor& key_end_, double scale) {
  const Tensor dy = with_contiguous_rows(dy_), q = with_contiguous_rows(q_),
               k = with_contiguous_rows(k_), v = with_contiguous_rows(v_);
  const Tensor key_start = key_start_.contiguous(), key_end = key_end_.contiguous();
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
         dv = at::empty(v.sizes(), v.options());
  by_dtype(q, [&](auto zero) {
    using T = decltype(zero);
    const AttentionBackward<T> a{heads<T>(dy),
                                 heads<T>(q),
                                 heads<T>(k),
                                 heads<T>(v),
                                 data<int32_t>(key_start),
                                 data<int32_t>(key_end),
                                 data<T>(dq),
                                 data<T>(dk),
                                 data<T>(dv),
                                 q.size(1),
                                 k.size(1),
                                 q.size(2),
                                 k.size(2),
                                 q.size(3),
                                 v.size(3),
                                 float(scale)};
    parallel(k.size(0) * k.size(2), q.size(1) * k.size(1) * q.size(3),
             [&](int64_t i, int64_t j) { kernels<T>().attention_backward(a, i, j); });
  });
  return {dq, dk, dv};
}

Tensor call_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_start,
                      const Tensor& key_end, double scale) {
  static const auto forward = op<AttentionSignature>("glm_core::attention_forward");
  return forward.call(q, k, v, key_start, key_end, scale);
}

struct AttentionGrad : torch::autograd::Function<AttentionGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& key_start, const Tensor& key_end, double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor y = call_attention(q, k, v, key_start, key_end, scale);
    ctx->save_for_backward({q, k, v, key_start, key_end});
    ctx->saved_data["scale"] = scale;
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto back = op<AttentionBackwardSignature>("glm_core::attention_backward");
    const variable_list s = ctx->get_saved_variables();
    auto [dq, dk, dv] =
        back.call(grads[0], s[0], s[1], s[2], s[3], s[4], ctx->saved_data["scale"].toDouble());
    return {dq, dk, dv, Tensor(), Tensor(), Tensor()};
  }
};

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_start,
                 const Tensor& key_end, double scale) {
  if (wants_gradient(q, k, v)) return AttentionGrad::apply(q, k, v, key_start, key_end, scale);
  return call_attention(q, k, v, key_start, key_end, scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor key_start, Tensor key_end, float scale) -> "
      "Tensor",
      attention);
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor key_start, Tensor key_end, "
      "float scale) -> Tensor");
  m.def(
      "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor key_start, "
      "Tensor key_end, float scale) -> (Tensor dq, Tensor dk, Tensor dv)");
}

TORCH_LIBRARY_IMPL(glm_core, CPU, m) {
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
}

}  // namespace glm
