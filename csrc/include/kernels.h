// Declares the CPU kernels: they take plain pointers, sizes and a range of rows (or chunks). Each
// instruction set has its own table of functions. T is float or bf16; statistics are always float.
// Any thread may compute any range: results do not depend on how the rows are divided.
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

// x [B, L, H, E] with any strides but a contiguous last dimension; y contiguous.
// Angles [B or 1, L, G, P]; sign -1 rotates back. Rows are the B * L positions.
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

// order: positions sorted by id; those of id v lie at starts[v] to starts[v + 1] - 1 in it.
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

// Update of one tensor; names as in the op adamw. decay = 1 - lr * weight_decay.
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

// How many queries of a head are worked on at a time.
constexpr int64_t attention_tile = 48;

// q [B, L, H, E], k [B, S, K, E], v [B, S, K, C], y [B, L, H, C], key_start, key_end [B, L]; y
// contiguous; `values` is C. The queries are divided into `parts` parts of whole tiles; each part
// lays out the keys for itself. The decode kernel takes queries = 1 and parts = 1.
template <class T>
struct AttentionForward {
  Heads<T> q, k, v;
  const int32_t *key_start, *key_end;
  T* y;
  int64_t queries, keys, heads, kv_heads, width, values, parts;  // L, S, H, K, E, C
  float scale;
};

// dq, dk, dv contiguous, shaped like q, k, v.
template <class T>
struct AttentionBackward {
  Heads<T> dy, q, k, v;
  const int32_t *key_start, *key_end;
  T *dq, *dk, *dv;
  int64_t queries, keys, heads, kv_heads, width, values;
  float scale;
};

// y [N, F] = x weight^T + bias for few rows;  x [N, D], weight [F, D]; `narrow` is x in T. The
// range is one of features.
template <class T>
struct LinearFew {
  const float* x;
  const T* narrow;
  const T *weight, *bias;  // bias null: none
  T* y;
  int64_t rows, width, features;
};

// Rows x [N, D] of any strides, laid out for exact_product: float, sorted by the lane that sums
// them, padded with zeros: [tiles of rows, lanes, exact_depth(D) / lanes, rows of a tile]. The
// range is one of groups, which are whole tiles.
template <class T>
struct ExactRows {
  const T* x;
  int64_t row, step;  // strides of N and D
  float* out;
  int64_t rows, depth;
};

constexpr int64_t exact_lanes = 16, exact_panel = 64, exact_group = 12;

constexpr int64_t exact_groups(int64_t rows) { return (rows + exact_group - 1) / exact_group; }

// D, a multiple of the lanes.
constexpr int64_t exact_depth(int64_t depth) {
  return (depth + exact_lanes - 1) / exact_lanes * exact_lanes;
}

// y [N, F] = a b^T + bias, contiguous: the lanes' sums of D, added up as `sum` adds lanes. `a` is
// the result of exact_rows. b [F, D] has any strides. The columns are divided into panels, the rows
// into `parts`; units: panels * parts.
template <class T>
struct ExactProduct {
  const float* a;
  const T* b;
  int64_t column, step;  // strides of F and D
  const T* bias;         // null: none
  T* y;
  int64_t rows, columns, depth, parts;
};

// Quantised weights in memory: int8 codes [F, D], or 4-bit codes [F, D / 2] with the even element
// in the high nibble; scale is float16 [F, groups].
struct Codes {
  const int8_t* weight;
  const uint16_t* scale;
  int64_t width, groups;
  int bits;
};

constexpr int64_t rounded_block = 32;  // inputs that share a step where activations are rounded
constexpr int64_t input_padding = 128;

// Rearranges rows of x [N, D] for quantized_product and pads each with zeros to a multiple of
// input_padding. Without `codes` it writes `values`. With `codes` it writes int8 codes and, for
// every 8 inputs (4-bit weights) or 4 inputs (8-bit weights), a step and the excess that the
// products' unsigned weights add.
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

// y [N, F] from the output of quantized_input with the same instruction set. The range is one of
// features.
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

// w [F, D] from its codes. The range is one of features.
template <class T>
struct Dequantize {
  Codes codes;
  T* w;
};

// y [N, D]: x rounded to int8 codes, times the step of its block. The range is one of rows.
template <class T>
struct RoundActivations {
  const T* x;
  T* y;
  int64_t width;
};

// The router's choice. logits [N, X], which become scores; bias [X] -> experts, weights and the
// chosen's scores [N, T]. Scratch: biased [N, X], group_scores [N, 2 G], group_places [N, G].
template <class T>
struct Route {
  float* logits;
  const float* bias;
  int64_t* experts;
  float *weights, *scores, *biased, *group_scores;
  int64_t* group_places;
  int64_t num_experts, top_k, groups, top_groups;
  float scale;
  bool normalize;
};

// dlogits [N, X], which must be zero before: the gradient through the weights of the chosen.
template <class T>
struct RouteBackward {
  const float *dweights, *scores;
  const int64_t* experts;
  float* dlogits;
  int64_t num_experts, top_k;
  float scale;
  bool normalize;
};

// y [N, D]: the sum over j of weights[n, j] rows[back[n, j]], in float and in this order.
template <class T>
struct WeightedRows {
  const T* rows;
  const int64_t* back;
  const float* weights;
  T* y;
  int64_t width, top_k;
};

// With i = back[n, j]: drows[i] = weights[n, j] dy[n], and dweights[n, j] is dy[n] times rows[i].
template <class T>
struct WeightedRowsBackward {
  const T *dy, *rows;
  const int64_t* back;
  const float* weights;
  T* drows;
  float* dweights;
  int64_t width, top_k;
};

// Every kernel and its arguments. All are called as name(arguments, begin, end). First those whose
// vectors have W lanes; then the product with codes, whose exact form AVX-512's fast one is; then
// those that sum no floats, which the exact tables share with the fast ones; then those that only
// the exact tables have.
#define GLM_LANE_KERNELS(K)                       \
  K(norm_forward, NormForward)                    \
  K(norm_backward, NormBackward)                  \
  K(sum_chunks, SumChunks)                        \
  K(gelu_forward, Activation)                     \
  K(gelu_backward, Activation)                    \
  K(geglu_forward, Activation)                    \
  K(geglu_backward, Activation)                   \
  K(swiglu_forward, Activation)                   \
  K(swiglu_backward, Activation)                  \
  K(rope_turn, Rope)                              \
  K(embedding_forward, EmbeddingForward)          \
  K(embedding_backward, EmbeddingBackward)        \
  K(attention_forward, AttentionForward)          \
  K(attention_decode, AttentionForward)           \
  K(attention_backward, AttentionBackward)        \
  K(cross_entropy, CrossEntropy)                  \
  K(linear_few, LinearFew)                        \
  K(route_choose, Route)                          \
  K(route_backward, RouteBackward)                \
  K(weighted_rows, WeightedRows)                  \
  K(weighted_rows_backward, WeightedRowsBackward) \
  K(squares, Squares)                             \
  K(adamw_update, AdamW)
#define GLM_CODE_PRODUCTS(K) K(quantized_product, QuantizedProduct)
#define GLM_CODE_KERNELS(K)          \
  K(quantized_input, QuantizedInput) \
  K(dequantize, Dequantize)          \
  K(round_activations, RoundActivations)
#define GLM_EXACT_KERNELS(K) \
  K(exact_rows, ExactRows)   \
  K(exact_product, ExactProduct)
#define GLM_KERNELS(K) \
  GLM_LANE_KERNELS(K)  \
  GLM_CODE_PRODUCTS(K) \
  GLM_CODE_KERNELS(K)  \
  GLM_EXACT_KERNELS(K)

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
#define GLM_INSTANTIATE(name, Args)                                \
  template void name<float>(const Args<float>&, int64_t, int64_t); \
  template void name<bf16>(const Args<bf16>&, int64_t, int64_t);
}  // namespace GLM_ISA
#endif

// The instruction sets that the kernels are compiled for, the best last; setup.py has their flags.
#if defined(__x86_64__)
#define GLM_ISAS(K) K(scalar) K(avx2) K(avx512)
#elif defined(__aarch64__)
#define GLM_ISAS(K) K(scalar) K(neon) K(dotprod) K(i8mm)
#else
#define GLM_ISAS(K) K(scalar)
#endif

#define GLM_NAME(isa) isa,
enum class Isa { GLM_ISAS(GLM_NAME) };
#undef GLM_NAME
#define GLM_NAME(isa) #isa,
constexpr const char* isa_names[] = {GLM_ISAS(GLM_NAME)};
#undef GLM_NAME
constexpr int num_isas = sizeof(isa_names) / sizeof(*isa_names);

// Whether this CPU has the instruction set.
bool available(Isa isa);

// The instruction set whose kernels `kernels` returns, at first the best available one. Not to be
// called while kernels run.
Isa active_isa();
void activate(Isa isa);

// Whether `kernels` returns the exact ones (docs/exact.md): every sum has an order that depends on
// the length of the sum alone. At first it does not.
bool exact();
void set_exact(bool on);

template <class T>
const Kernels<T>& kernels();

}  // namespace glm
