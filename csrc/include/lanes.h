// The lanes of every CPU kernel's vectors: W floats. The compiler flags of a file set NATIVE, the
// floats in one of the machine's vectors: 16 with AVX-512, 8 with AVX2, else 4, which any 64-bit
// machine has. W is as many, except in the exact kernels (GLM_EXACT, docs/exact.md): theirs is 16
// on every machine, so that their sums have one order everywhere. The products with codes keep the
// machine's vectors, whose lanes they take for some of 16 (GLM_CODES, quant.cpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "bf16.h"

#ifndef GLM_ISA
#error "compile with -DGLM_ISA= one of the names in GLM_ISAS (kernels.h)"
#endif

// The instruction set `scalar` uses the compiler's portable vectors alone, whatever the machine.
#define GLM_PORTABLE_scalar 1
#define GLM_PORTABLE_scalar_exact 1
#define GLM_JOINED(a, b) a##b
#define GLM_PORTABLE_OF(isa) GLM_JOINED(GLM_PORTABLE_, isa)
#if defined(__aarch64__) && !GLM_PORTABLE_OF(GLM_ISA)
#define GLM_ARM 1
#endif

namespace glm::GLM_ISA {

#if defined(__AVX512F__)
constexpr int NATIVE = 16;
#elif defined(__AVX2__)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif

#if defined(GLM_EXACT)
constexpr bool EXACT = true;
#else
constexpr bool EXACT = false;
#endif
#if defined(GLM_EXACT) && !defined(GLM_CODES)
constexpr int W = 16;
#if !defined(__AVX512F__)
#define GLM_WIDE 1  // a vector is several of the machine's
#endif
#else
constexpr int W = NATIVE;
#endif

typedef float nf __attribute__((vector_size(NATIVE * 4)));
typedef int32_t ni __attribute__((vector_size(NATIVE * 4)));
typedef uint32_t nu __attribute__((vector_size(NATIVE * 4)));
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

#define GLM_SPACE GLM_ISA  // of functions.h
#define GLM_INLINE static inline __attribute__((always_inline))
// Before a loop over a tile's sums: GCC keeps larger tiles than AVX2's in memory otherwise.
#if defined(GLM_ARM)
#define GLM_UNROLLED _Pragma("GCC unroll 8")
#else
#define GLM_UNROLLED
#endif
// For the lambdas given to `sweep` and `sums`, so that n == W is known when they are compiled.
#define GLM_INLINED __attribute__((always_inline))

constexpr int64_t line_bytes = 64;  // of a cache

// Fetches the line that a stream of weights reaches so many bytes after p. The CPU's own
// prefetching stops at the end of a page, and keeps too little under way while the vector units are
// busy. The address may lie behind the weights: a prefetch never faults.
GLM_INLINE void fetch_ahead(const void* p, int64_t bytes = 2048) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)));
}

template <class To, class From>
GLM_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

}  // namespace glm::GLM_ISA
