// Product of few rows with a weight. Reading the weight takes the time, so it is read once. Shapes:
// N rows, D in, F features out.
#include "kernels.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

// Four streams of weights are read faster than two.
constexpr int FEATURES = 4, ROWS = 4;
// Short vectors need more sums under way to hide the latency of fma: each result has two, by turns.
constexpr int SUMS = W == 4 && REGISTERS == 32 ? 2 : 1;

// Loads 2 W bf16, of which the first n come from memory.
GLM_INLINE vi pairs(const bf16* p, int64_t n) {
  if (n == 2 * W) return load_words(p);
  bf16 part[2 * W] = {};
  memcpy(part, p, size_t(n) * sizeof *p);
  return load_words(part);
}

// part += weights times inputs i to i + n, n <= step. PAIRS: the instruction set adds two products
// of bf16 at a time, in float32.
template <bool PAIRS, int R, int M, class T>
GLM_INLINE void add(vf (&part)[R][M], const LinearFew<T>& a, const T* const (&w)[R], int64_t row,
                    int64_t i, int64_t n) {
  if constexpr (PAIRS) {
    vi x[M];
    for (int m = 0; m < M; ++m) x[m] = pairs(a.narrow + (row + m) * a.width + i, n);
    for (int r = 0; r < R; ++r) {
      const vi v = pairs(w[r] + i, n);
      for (int m = 0; m < M; ++m) part[r][m] = add_pairs(part[r][m], v, x[m]);
    }
  } else {
    vf x[M];
    for (int m = 0; m < M; ++m) x[m] = take(a.x + (row + m) * a.width + i, n);
    for (int r = 0; r < R; ++r) {
      const vf v = take(w[r] + i, n);
      for (int m = 0; m < M; ++m) part[r][m] = fma(v, x[m], part[r][m]);
    }
  }
}

#if defined(GLM_WIDE)
// Sums weights times inputs in one chain for each lane, by the machine's own vectors: GCC keeps
// longer ones in memory.
template <int R, int M, class T>
GLM_INLINE void add_all(Parts (&total)[R][M], const LinearFew<T>& a, const T* const (&w)[R],
                        int64_t row) {
  for (auto& feature : total)
    for (Parts& sums : feature)
      for (nf& sum : sums.part) sum = native(0.0f);
  const auto add_part = [&](int p, int64_t i, int64_t n) GLM_INLINED {
    for (int r = 0; r < R; ++r) {
      const nf v = part_of(w[r] + i, n);
      for (int m = 0; m < M; ++m) {
        nf& sum = total[r][m].part[p];
        sum = fma(v, part_of(a.x + (row + m) * a.width + i, n), sum);
      }
    }
  };
  int64_t i = 0;
  for (; i + W <= a.width; i += W) {
    if (i % int64_t(line_bytes / sizeof(T)) == 0)
      for (int r = 0; r < R; ++r) fetch_ahead(w[r] + i);
    for (int p = 0; p < W / NATIVE; ++p) add_part(p, i + p * NATIVE, NATIVE);
  }
  for (int p = 0; i < a.width; ++p, i += NATIVE)
    add_part(p, i, a.width - i < NATIVE ? a.width - i : NATIVE);
}
#endif

// R features f, f + apart, ..., and rows n to n + M. The order in which a result is summed depends
// on neither.
template <bool PAIRS, int R, int M, class T>
void tile(const LinearFew<T>& a, int64_t f, int64_t apart, int64_t n) {
  const T* w[R];
  for (int r = 0; r < R; ++r) w[r] = a.weight + (f + r * apart) * a.width;
#if defined(GLM_WIDE)
  Parts total[R][M];
  add_all(total, a, w, n);
#else
  constexpr int64_t step = PAIRS ? 2 * W : W;
  // a block is summed by itself, so that rounding errors stay small; exact: one chain in each lane
  constexpr int64_t block = EXACT ? int64_t(1) << 40 : 32 * SUMS * step;
  vf total[R][M] = {};
  for (int64_t begin = 0; begin < a.width; begin += block) {
    const int64_t end = begin + block < a.width ? begin + block : a.width;
    vf part[R][M] = {}, odd[R][M] = {};
    int64_t i = begin;
    for (; i + SUMS * step <= end; i += SUMS * step) {
      if (i % int64_t(line_bytes / sizeof(T)) == 0)
        for (int r = 0; r < R; ++r) fetch_ahead(w[r] + i);
      add<PAIRS>(part, a, w, n, i, step);
      if constexpr (SUMS == 2) add<PAIRS>(odd, a, w, n, i + step, step);
    }
    for (; SUMS == 2 && i + step <= end; i += step) add<PAIRS>(part, a, w, n, i, step);
    if (i < end) add<PAIRS>(part, a, w, n, i, end - i);
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        total[r][m] =
            EXACT ? part[r][m] : total[r][m] + (SUMS == 2 ? part[r][m] + odd[r][m] : part[r][m]);
  }
#endif
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      const int64_t at = f + r * apart;
      put(a.y + (n + m) * a.features + at, sum(total[r][m]) + (a.bias ? get(a.bias + at) : 0.0f));
    }
}

template <bool PAIRS, int R, class T>
void rows(const LinearFew<T>& a, int64_t f, int64_t apart) {
  int64_t n = 0;
  for (; n + ROWS <= a.rows; n += ROWS) tile<PAIRS, R, ROWS>(a, f, apart, n);
  switch (a.rows - n) {
    case 3:
      return tile<PAIRS, R, 3>(a, f, apart, n);
    case 2:
      return tile<PAIRS, R, 2>(a, f, apart, n);
    case 1:
      return tile<PAIRS, R, 1>(a, f, apart, n);
  }
}

template <bool PAIRS, int R, class T>
void features(const LinearFew<T>& a, int64_t begin, int64_t end) {
  // features lie far apart, so that each is a long stream that the CPU prefetches by itself
  const int64_t apart = (end - begin) / R;
  for (int64_t i = 0; i < apart; ++i) rows<PAIRS, R>(a, begin + i, apart);
  for (int64_t f = begin + R * apart; f < end; ++f) rows<PAIRS, 1>(a, f, 1);
}

template <bool PAIRS, class T>
void fitting(const LinearFew<T>& a, int64_t begin, int64_t end) {
  constexpr bool many_registers = REGISTERS == 32 && SUMS == 1 && W == NATIVE;
  if (!many_registers && a.rows > 2) return features<PAIRS, 2>(a, begin, end);  // sums fit them
  features<PAIRS, FEATURES>(a, begin, end);
}

}  // namespace

template <class T>
void linear_few(const LinearFew<T>& a, int64_t begin, int64_t end) {
  if constexpr (pair_products && sizeof(T) == sizeof(bf16))
    if (has_pair_products()) return fitting<true>(a, begin, end);
  fitting<false>(a, begin, end);
}

GLM_INSTANTIATE(linear_few, LinearFew)

}  // namespace glm::GLM_ISA
