// Bindings of gelu, geglu, swiglu, rope and embedding.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "tensor.h"

namespace glm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

enum Kind : int64_t { gelu, geglu, swiglu };

template <class T>
void run_activation(int64_t kind, const Activation<T>& a) {
  const Kernels<T>& k = kernels<T>();
  auto kernel = a.dy ? (kind == gelu    ? k.gelu_backward
                        : kind == geglu ? k.geglu_backward
                                        : k.swiglu_backward)
                     : (kind == gelu    ? k.gelu_forward
                        : kind == geglu ? k.geglu_forward
                                        : k.swiglu_forward);
  parallel(a.rows, a.width, [&](int64_t i, int64_t j) { kernel(a, i, j); });
}

Tensor activation_forward(const Tensor& x_, int64_t kind) {
  const Tensor x = x_.contiguous();
  const int64_t gates = kind == gelu ? 1 : 2;
  TORCH_CHECK_VALUE(x.size(-1) % gates == 0, "last dimension ", x.size(-1),
                    ": must be even, both halves of a gated activation");
  auto shape = x.sizes().vec();
  shape.back() /= gates;
  Tensor y = at::empty(shape, x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    run_activation<T>(kind, {data<T>(x), nullptr, data<T>(y), num_rows(y), y.size(-1)});
  });
  return y;
}

Tensor activation_backward(const Tensor& dy_, const Tensor& x_, int64_t kind) {
  const Tensor dy = dy_.contiguous(), x = x_.contiguous();
  Tensor dx = at::empty_like(x);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    run_activation<T>(kind, {data<T>(x), data<T>(dy), data<T>(dx), num_rows(dy), dy.size(-1)});
  });
  return dx;
}

Tensor call_activation(const Tensor& x, int64_t kind) {
  static const auto forward = op<Tensor(const Tensor&, int64_t)>("glm_core::activation_forward");
  return forward.call(x, kind);
}

struct ActivationGrad : torch::autograd::Function<ActivationGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, int64_t kind) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x});
    ctx->saved_data["kind"] = kind;
    return call_activation(x, kind);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto back =
        op<Tensor(const Tensor&, const Tensor&, int64_t)>("glm_core::activation_backward");
    const int64_t kind = ctx->saved_data["kind"].toInt();
    return {back.call(grads[0], ctx->get_saved_variables()[0], kind), Tensor()};
  }
};

template <Kind kind>
Tensor activation(const Tensor& x) {
  return wants_gradient(x) ? ActivationGrad::apply(x, int64_t(kind)) : call_activation(x, kind);
}

using RopeSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, bool, bool);

Tensor rope_turn(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, bool interleaved,
                 bool back) {
  const Tensor x = x_.size(-1) == 1 || x_.stride(-1) == 1 ? x_ : x_.contiguous();
  const Tensor cos = cos_.contiguous(), sin = sin_.contiguous();
  TORCH_CHECK_VALUE(x.dim() == 4 && cos.dim() == 4 && cos.sizes() == sin.sizes() &&
                        (cos.size(0) == 1 || cos.size(0) == x.size(0)) &&
                        cos.size(1) == x.size(1) && 2 * cos.size(2) * cos.size(3) <= x.size(3),
                    "rope: x [B, L, H, E] needs cos and sin [B or 1, L, G, P] with 2GP <= E; "
                    "received x ",
                    x.sizes(), ", cos ", cos.sizes(), ", sin ", sin.sizes());
  Tensor y = at::empty(x.sizes(), x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Rope<T> a{data<T>(x),       data<float>(cos), data<float>(sin),   data<T>(y),
                    x.size(1),        x.size(2),        x.size(3),          x.stride(0),
                    x.stride(1),      x.stride(2),      cos.size(2),        cos.size(3),
                    cos.size(0) == 1, interleaved,      back ? -1.0f : 1.0f};
    parallel(x.size(0) * x.size(1), x.size(2) * x.size(3),
             [&](int64_t i, int64_t j) { kernels<T>().rope_turn(a, i, j); });
  });
  return y;
}

Tensor call_rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                 bool back) {
  static const auto turn = op<RopeSignature>("glm_core::rope_turn");
  return turn.call(x, cos, sin, interleaved, back);
}

struct RopeGrad : torch::autograd::Function<RopeGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin,
                        bool interleaved) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["interleaved"] = interleaved;
    return call_rope(x, cos, sin, interleaved, false);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool interleaved = ctx->saved_data["interleaved"].toBool();
    return {call_rope(grads[0], saved[0], saved[1], interleaved, true), Tensor(), Tensor(),
            Tensor()};
  }
};

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return wants_gradient(x) ? RopeGrad::apply(x, cos, sin, interleaved)
                           : call_rope(x, cos, sin, interleaved, false);
}

Tensor embedding_forward(const Tensor& ids_, const Tensor& weight_) {
  const Tensor ids = ids_.contiguous();
  const Tensor weight =
      weight_.size(1) == 1 || weight_.stride(1) == 1 ? weight_ : weight_.contiguous();
  check_indices(ids, weight.size(0), "embedding: id");
  auto shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  Tensor y = at::empty(shape, weight.options());
  by_dtype(weight, [&](auto zero) {
    using T = decltype(zero);
    const EmbeddingForward<T> a{data<int64_t>(ids), data<T>(weight), data<T>(y), weight.size(1),
                                weight.stride(0)};
    parallel(ids.numel(), weight.size(1),
             [&](int64_t i, int64_t j) { kernels<T>().embedding_forward(a, i, j); });
  });
  return y;
}

Tensor embedding_backward(const Tensor& dy_, const Tensor& ids_, int64_t vocab, double shrink) {
  const Tensor dy = dy_.contiguous(), ids = ids_.contiguous();
  const int64_t width = dy.size(-1), count = ids.numel(), *id = data<int64_t>(ids);
  std::vector<int64_t> starts(vocab + 1), order(count);  // counting sort, stable
  for (int64_t n = 0; n < count; ++n) ++starts[id[n] + 1];
  for (int64_t v = 0; v < vocab; ++v) starts[v + 1] += starts[v];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t n = 0; n < count; ++n) order[next[id[n]]++] = n;
  Tensor dweight = at::empty({vocab, width}, dy.options());
  by_dtype(dy, [&](auto zero) {
    using T = decltype(zero);
    const EmbeddingBackward<T> a{data<T>(dy),      order.data(), starts.data(),
                                 data<T>(dweight), width,        float(shrink)};
    parallel(vocab, width, [&](int64_t i, int64_t j) { kernels<T>().embedding_backward(a, i, j); });
  });
  return dweight;
}

Tensor call_embedding(const Tensor& ids, const Tensor& weight) {
  static const auto forward =
      op<Tensor(const Tensor&, const Tensor&)>("glm_core::embedding_forward");
  return forward.call(ids, weight);
}

struct EmbeddingGrad : torch::autograd::Function<EmbeddingGrad> {
  static Tensor forward(AutogradContext* ctx, const Tensor& ids, const Tensor& weight,
                        double shrink) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({ids});
    ctx->saved_data["vocab"] = weight.sym_size(0);
    ctx->saved_data["shrink"] = shrink;
    return call_embedding(ids, weight);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto back = op<Tensor(const Tensor&, const Tensor&, c10::SymInt, double)>(
        "glm_core::embedding_backward");
    const Tensor ids = ctx->get_saved_variables()[0];
    const double shrink = ctx->saved_data["shrink"].toDouble();
    return {Tensor(), back.call(grads[0], ids, ctx->saved_data["vocab"].toSymInt(), shrink),
            Tensor()};
  }
};

Tensor embedding(const Tensor& ids, const Tensor& weight, double shrink) {
  return wants_gradient(weight) ? EmbeddingGrad::apply(ids, weight, shrink)
                                : call_embedding(ids, weight);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(glm_core, m) {
  m.def("gelu(Tensor x) -> Tensor", activation<gelu>);
  m.def("geglu(Tensor x) -> Tensor", activation<geglu>);
  m.def("swiglu(Tensor x) -> Tensor", activation<swiglu>);
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", rope);
  m.def("embedding(Tensor ids, Tensor weight, float shrink) -> Tensor", embedding);
  m.def("activation_forward(Tensor x, int kind) -> Tensor");
  m.def("activation_backward(Tensor dy, Tensor x, int kind) -> Tensor");
  m.def("rope_turn(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool back) -> Tensor");
  m.def("embedding_forward(Tensor ids, Tensor weight) -> Tensor");
  m.def("embedding_backward(Tensor dy, Tensor ids, SymInt vocab, float shrink) -> Tensor");
}

TORCH_LIBRARY_IMPL(glm_core, CPU, m) {
  m.impl("activation_forward", activation_forward);
  m.impl("activation_backward", activation_backward);
  m.impl("rope_turn", rope_turn);
  m.impl("embedding_forward", embedding_forward);
  m.impl("embedding_backward", embedding_backward);
}

}  // namespace glm
