// Declares the GPU kernels: they take the CPU kernels' arguments, work on whole problems instead of
// ranges, and are queued on a stream. T is float, bf16 or f16; statistics are always float.
// Pointers are device pointers. Results do not depend on the order in which blocks or threads run.
#pragma once

#include <cstdint>

#include "bf16.h"
#include "f16.h"
#include "kernels.h"

namespace glm::gpu {

// cudaStream_t or hipStream_t.
using Stream = void*;

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An index out of range ends the kernel, on a device by a trap.
template <class T>
struct Lookup {
  EmbeddingForward<T> table;
  int64_t count, vocab;  // ids, rows of the table
};

template <class T>
struct Losses {
  CrossEntropy<T> of;
  int64_t rows;
};

template <class T>
struct TableGradient {
  EmbeddingBackward<T> of;  // order and starts lie on the device
  int64_t vocab;
};

template <class T>
struct Turn {
  Rope<T> of;
  int64_t batch;
};

// How many tensors of a list one launch works on: as many as fit into a kernel's arguments.
constexpr int batch_size = 48;

// sums[t * blocks + b]: sum of squares of block b's share of tensor t.
template <class T>
struct SquaresBatch {
  const T* x[batch_size];
  int64_t size[batch_size];
  double* sums;
  int tensors, blocks;
};

// Bytes of memory of the current device; 0 on a CPU.
int64_t device_memory();

// Blocks per tensor that SquaresBatch and AdamWBatch are launched with for a largest tensor.
int blocks_for(int64_t largest);

// Scalars as in AdamW; grad_scale lies on the device.
template <class T>
struct AdamWBatch {
  float *param[batch_size], *exp_avg[batch_size], *exp_avg_sq[batch_size];
  const T* grad[batch_size];
  T* copy[batch_size];  // each may be null
  int64_t size[batch_size];
  const float* grad_scale;
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, lr, decay, correction1, correction2;
  int tensors, blocks;
};

// A quantised weight: codes [F, D * bits / 8], scale [F, G] in float16 or float32, the other null.
struct Codes {
  const int8_t* codes;
  const f16* scale16;
  const float* scale32;
  int64_t width, outputs, groups;  // D, F, G
  int bits;
};

// y = x w^T + bias, summed in float; x may be float where y is not. bias may be null.
template <class X, class T>
struct QuantizedRows {
  const X* x;
  Codes w;
  const T* bias;
  T* y;
  int64_t rows;
};

enum class Kind { gelu, geglu, swiglu };

// Exact kernels (docs/exact.md) compute in float32, and take float or bf16. They are kernels of
// their own where the fast ones sum in another order.

// Matrices of any strides: one for each member (a head) of each unit.
template <class T>
struct Operand {
  T* p;
  int64_t unit, member, row, step;
};

// y[m][n] = sum over k of a[m][k] b[n][k]: the sums of `outer` members, from the first of a unit or
// from each, in one chain.
template <class A, class B, class Y>
struct Products {
  Operand<A> a;
  Operand<B> b;
  Operand<Y> y;
  const Y* bias;         // null: none. [columns]
  const float* factors;  // null: none. [units, members, rows]
  float factor;          // of all rows, where there are no factors
  int64_t rows, columns, depth, outer, members, units;
};

// A few kv heads of one batch element, `members` heads each. Scratch: scores and, backward, dscores
// [units, members, L, S], forward shares [units, members, L]. key_start and key_end: [L].
template <class T>
struct ExactAttention {
  Operand<T> q, k, v, y, dy, dq, dk, dv;  // y forward, dy to dv backward
  const int32_t *key_start, *key_end;
  float *scores, *dscores, *shares;
  int64_t queries, keys, width, values, members, units;  // L, S, E, C, H / K
  float scale;
};

// sums[first[t] + s]: sum of squares of the elements from s * exact_stretch on of tensor t.
constexpr int64_t exact_stretch = 16384;
template <class T>
struct ExactSquares {
  const T* x[batch_size];
  int64_t size[batch_size], first[batch_size];
  double* sums;
  int tensors;
};

template <class T>
void norm_forward(const NormForward<T>&, Stream);
// Fills dx and dresidual, and the partial sums of dweight and dbias.
template <class T>
void norm_backward(const NormBackward<T>&, Stream);
template <class T>
void sum_chunks(const SumChunks<T>&, Stream);
template <class T>
void activation(const Activation<T>&, Kind, Stream);  // backward where dy is given
template <class T>
void exact_activation(const Activation<T>&, Kind, Stream);
template <class T>
void rope_turn(const Turn<T>&, Stream);
template <class T>
void embedding_forward(const Lookup<T>&, Stream);
template <class T>
void embedding_backward(const TableGradient<T>&, Stream);
template <class T>
void cross_entropy(const Losses<T>&, Stream);
template <class T>
void squares(const SquaresBatch<T>&, Stream);
// out = sqrt(sum of sums), float.
void root_of_sum(const double* sums, int64_t count, float* out, Stream);
template <class T>
void adamw_update(const AdamWBatch<T>&, Stream);
template <class X, class T>
void quantized_rows(const QuantizedRows<X, T>&, Stream);
// The same for up to 64 rows on tensor cores. Returns whether they take it: groups of a multiple of
// 512 bits, widths that can be read 16 bytes at a time, NVIDIA; nothing is queued otherwise.
template <class T>
bool quantized_tiles(const QuantizedRows<T, T>&, Stream);
// The same product where the codes are a weight in T: groups = 1, bits = 16, no scale. Returns
// whether it can be read 16 bytes at a time; nothing is queued otherwise.
template <class T>
bool half_rows(const QuantizedRows<T, T>&, Stream);
// The weight [F, D] in T.
template <class T>
void dequantize(const Codes&, T* out, Stream);
// x [rows, width] rounded to int8 steps of every 32 inputs, in float.
template <class T>
void round_activations(const T* x, float* out, int64_t rows, int64_t width, Stream);

template <class T>
void exact_norm_forward(const NormForward<T>&, Stream);
template <class T>
void exact_norm_backward(const NormBackward<T>&, Stream);
template <class T>
void exact_cross_entropy(const Losses<T>&, Stream);
// out = sum of x in double, in order.
void exact_sum(const float* x, int64_t count, float* out, Stream);
template <class T>
void exact_squares(const ExactSquares<T>&, Stream);
// out = sqrt(sum of sums), in order.
void exact_root_of_sum(const double* sums, int64_t count, float* out, Stream);
// In each of 16 lanes one chain of fma, lanes by halves, plus bias.
template <class T>
void exact_product(const Products<T, T, T>&, Stream);
// One chain of fma, times a factor; a or y is float.
template <class A, class B, class Y>
void exact_chains(const Products<A, B, Y>&, Stream);
template <class T>
void exact_attention_forward(const ExactAttention<T>&, Stream);
template <class T>
void exact_attention_backward(const ExactAttention<T>&, Stream);
// For `tokens` tokens; dlogits must be zero before.
void exact_choose(const Route<float>&, int64_t tokens, Stream);
void exact_choose_backward(const RouteBackward<float>&, int64_t tokens, Stream);
template <class T>
void exact_weighted_rows(const WeightedRows<T>&, int64_t tokens, Stream);
template <class T>
void exact_weighted_rows_backward(const WeightedRowsBackward<T>&, int64_t tokens, Stream);

#define GLM_GPU_INSTANTIATE(name, Args)                  \
  template void name<float>(const Args<float>&, Stream); \
  template void name<bf16>(const Args<bf16>&, Stream);   \
  template void name<f16>(const Args<f16>&, Stream);
#define GLM_GPU_INSTANTIATE_EXACT(name, Args)            \
  template void name<float>(const Args<float>&, Stream); \
  template void name<bf16>(const Args<bf16>&, Stream);

}  // namespace glm::gpu
