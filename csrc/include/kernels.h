// The CPU kernels as the bindings see them: plain pointers, sizes and a range of rows (or chunks);
// one table of functions per instruction set. T is float or bf16; statistics are always float.
// A range may be computed by any thread: results do not depend on how a range is cut.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace glm {

// Shapes: N rows, D width. stats: 1 / std per row, and for layer norm N means after them.
template <class T>
struct NormForward {
  const T *x, *residual, *weight, *bias;  // residual null: no addition; bias null: RMS norm
  T *y, *total;                           // total = x + alpha * residual, where residual is given
  float* stats;
  int64_t rows, width;
  float eps, alpha;
};

// `total` is what was normalised, `dtotal` (may be null) the gradient of its second use.
// dweight and dbias are partial sums, [chunks, D] float; chunk c holds rows c * chunk_rows ... .
template <class T>
struct NormBackward {
  const T *dy, *dtotal, *total, *weight;
  const float* stats;
  T *dx, *dresidual;       // dresidual null: not wanted
  float *dweight, *dbias;  // dbias null: RMS norm
  int64_t rows, width, chunk_rows;
  float alpha;
};

// out[d] = sum over chunks of partial[c, d], in order.
template <class T>
struct SumChunks {
  const float* partial;
  T* out;
  int64_t chunks, width;
};

// y [N, F]. Forward: x [N, F] or, gated, [N, 2F]. Backward: y is the gradient of x, like x.
template <class T>
struct Activation {
  const T *x, *dy;  // dy null in the forward
  T* y;
  int64_t rows, width;  // N, F
};

// x [B, L, H, E] with any strides but a contiguous last dimension; y contiguous. Angles
// [B or 1, L, G, P]; sign -1 turns back. Rows are the B * L positions.
template <class T>
struct Rope {
  const T* x;
  const float *cos, *sin;
  T* y;
  int64_t length, heads, width, stride_b, stride_l, stride_h, sections, pairs;
  bool shared, interleaved;  // shared: one set of angles for all B
  float sign;
};

template <class T>
struct EmbeddingForward {
  const int64_t* ids;
  const T* weight;
  T* y;
  int64_t width, row_stride;  // of the table
};

// order: positions sorted by id; those of id v are order[starts[v] ... starts[v + 1]).
template <class T>
struct EmbeddingBackward {
  const T* dy;
  const int64_t *order, *starts;
  T* dweight;
  int64_t width;
  float shrink;
};

template <class T>
struct Squares {
  const T* x;
  double* sums;  // one per chunk of `chunk` elements
  int64_t size, chunk;
};

// One tensor's update; names as in the op adamw. decay = 1 - lr * weight_decay.
template <class T>
struct AdamW {
  float *param, *exp_avg, *exp_avg_sq;
  const T* grad;
  T* copy;  // may be null
  float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, lr, decay;
  float correction1, correction2;
};

// logits [N, V]: with `gradient`, overwritten by weight * (softmax - one-hot), rounded once.
// loss[n] = weight[n] * (logsumexp - logit of the label).
template <class T>
struct CrossEntropy {
  T* logits;
  const int64_t* labels;
  const float* token_weight;
  float* loss;
  int64_t vocab;
  bool gradient;
};

// A [B, L, H, E] tensor with any strides but a contiguous last dimension.
template <class T>
struct Heads {
  const T* p;
  int64_t batch, row, head;
  const T* at(int64_t b, int64_t l, int64_t h) const { return p + b * batch + l * row + h * head; }
};

// Queries of a head that are worked on at a time.
constexpr int64_t attention_tile = 48;

// q, y [B, L, H, E], k, v [B, S, K, E], key_start, key_end [B, L]; y contiguous. The queries are
// cut into `parts` parts of whole tiles, each of which lays out the keys for itself. The decode
// kernel takes queries = 1 and parts = 1.
template <class T>
struct AttentionForward {
  Heads<T> q, k, v;
  const int32_t *key_start, *key_end;
  T* y;
  int64_t queries, keys, heads, kv_heads, width, parts;  // L, S, H, K, E
  float scale;
};

// dq, dk, dv contiguous, shaped like q, k, v.
template <class T>
struct AttentionBackward {
  Heads<T> dy, q, k, v;
  const int32_t *key_start, *key_end;
  T *dq, *dk, *dv;
  int64_t queries, keys, heads, kv_heads, width;
  float scale;
};

// y [N, F] = x weight^T + bias for few rows;  x [N, D], weight [F, D]; `narrow` is x in T. Works on
// features.
template <class T>
struct LinearFew {
  const float* x;
  const T* narrow;
  const T *weight, *bias;  // bias null: none
  T* y;
  int64_t rows, width, features;
};

// How quantised weights lie in memory: int8 codes [F, D], or 4-bit ones [F, D / 2], the even
// element in the high nibble; scale float16 [F, groups].
struct Codes {
  const int8_t* weight;
  const uint16_t* scale;
  int64_t width, groups;
  int bits;
};

constexpr int64_t rounded_block = 32;  // inputs that share a step where activations are rounded
constexpr int64_t input_padding = 128;

// Rows of x [N, D] as quantized_product reads them, each padded with zeros to a multiple of
// input_padding. Either `values`, or with codes given, x as int8 codes: a step, and what the
// products' unsigned weights add too much, for every 8 (of 4 bits) or 4 (of 8 bits) inputs.
template <class T>
struct QuantizedInput {
  const T* x;
  float* values;
  int8_t* codes;
  float* steps;
  int32_t* excess;
  int64_t width, padded;
  int bits;
};

// y [N, F] from what quantized_input made with the same instruction set. Works on features.
template <class T>
struct QuantizedProduct {
  Codes w;
  const T* bias;  // null: none
  const float* values;
  const int8_t* codes;
  const float* steps;
  const int32_t* excess;
  T* y;
  int64_t rows, features, padded;
};

// w [F, D] from its codes. Works on features.
template <class T>
struct Dequantize {
  Codes codes;
  T* w;
};

// y [N, D]: x rounded to int8 codes times the step of its block. Works on rows.
template <class T>
struct RoundActivations {
  const T* x;
  T* y;
  int64_t width;
};

// Every kernel and its arguments. All are called as name(arguments, begin, end).
#define GLM_KERNELS(K)                     \
  K(norm_forward, NormForward)             \
  K(norm_backward, NormBackward)           \
  K(sum_chunks, SumChunks)                 \
  K(gelu_forward, Activation)              \
  K(gelu_backward, Activation)             \
  K(geglu_forward, Activation)             \
  K(geglu_backward, Activation)            \
  K(swiglu_forward, Activation)            \
  K(swiglu_backward, Activation)           \
  K(rope_turn, Rope)                       \
  K(embedding_forward, EmbeddingForward)   \
  K(embedding_backward, EmbeddingBackward) \
  K(attention_forward, AttentionForward)   \
  K(attention_decode, AttentionForward)    \
  K(attention_backward, AttentionBackward) \
  K(cross_entropy, CrossEntropy)           \
  K(linear_few, LinearFew)                 \
  K(quantized_input, QuantizedInput)       \
  K(quantized_product, QuantizedProduct)   \
  K(dequantize, Dequantize)                \
  K(round_activations, RoundActivations)   \
  K(squares, Squares)                      \
  K(adamw_update, AdamW)

template <class T>
struct Kernels {
#define GLM_POINTER(name, Args) void (*name)(const Args<T>&, int64_t begin, int64_t end);
  GLM_KERNELS(GLM_POINTER)
#undef GLM_POINTER
};

#ifdef GLM_ISA
namespace GLM_ISA {
#define GLM_DECLARE(name, Args) \
  template <class T>            \
  void name(const Args<T>&, int64_t begin, int64_t end);
GLM_KERNELS(GLM_DECLARE)
#undef GLM_DECLARE
#define GLM_INSTANTIATE(name, Args)                                \
  template void name<float>(const Args<float>&, int64_t, int64_t); \
  template void name<bf16>(const Args<bf16>&, int64_t, int64_t);
}  // namespace GLM_ISA
#endif

enum class Isa { scalar, avx2, avx512 };
constexpr const char* isa_names[] = {"scalar", "avx2", "avx512"};
constexpr int num_isas = 3;

// Compiled in, and this CPU has it?
bool available(Isa isa);

// Whose kernels `kernels` returns; at first the best available. Not to be called while kernels run.
Isa active_isa();
void activate(Isa isa);

template <class T>
const Kernels<T>& kernels();

}  // namespace glm
