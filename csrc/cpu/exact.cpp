// Matrix products whose sums have an order that depends on the depth alone (docs/exact.md): element
// k belongs to lane k % 16, each lane is one chain of fused multiply-adds, and the lanes are added
// up by halves. That is what linear_few does along a row; here the lanes come one after another,
// and a vector holds columns. Shapes: N rows, F columns, D depth.
#include <cstdlib>
#include <new>
#include <utility>

#include "kernels.h"
#include "transpose.h"
#include "vec.h"

namespace glm::GLM_ISA {

namespace {

constexpr int64_t LANES = exact_lanes, PANEL = exact_panel;
// A register tile: ROWS x COLUMNS vectors of sums.
constexpr int COLUMNS = 2, ROWS = NATIVE == 8 ? 6 : 12;
constexpr int64_t STRIP = COLUMNS * NATIVE;  // columns of a tile
static_assert(exact_group % ROWS == 0 && PANEL % STRIP == 0);
// Of this much of the depth a strip stays in the first-level cache, and so many rows in the second.
constexpr int64_t DEPTH_BLOCK = (16 << 10) / (STRIP * int64_t(sizeof(float))), ROWS_AT_A_TIME = 132;
static_assert(ROWS_AT_A_TIME % ROWS == 0);

// The order in which lanes come: neighbours in it are the lanes that are added to each other first.
constexpr int64_t lane_at(int64_t i) {
  return (i & 1) * 8 + (i >> 1 & 1) * 4 + (i >> 2 & 1) * 2 + (i >> 3);
}

constexpr int64_t LINE = 8 * exact_group;  // the most rows or columns that are laid out together
static_assert(LINE >= PANEL);

// Fetches what lies so many bytes behind p. It may lie behind the matrix: a prefetch never faults.
GLM_INLINE void fetch(const void* p, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(p) + uintptr_t(bytes)), 0, 2);
}

// Lays `count` rows or columns out for the tiles: out [count / WIDTH][lane][depth / 16][WIDTH],
// floats, zero where there is nothing. across and along: strides of the rows and of the depth.
template <int64_t WIDTH, class T>
void lay_out(const T* x, int64_t across, int64_t along, int64_t count, int64_t depth, float* out) {
  const int64_t steps = exact_depth(depth) / LANES, group = steps * LANES * WIDTH;
  constexpr int64_t size = sizeof(T);
  const auto at = [&](int64_t k) GLM_INLINED {
    return out + (lane_at(k % LANES) * steps + k / LANES) * WIDTH;
  };
  if (across == 1) {
    // lane by lane: what one pass writes lies together
    const int64_t groups = (count + WIDTH - 1) / WIDTH;
    alignas(64) float line[LINE + WIDTH] = {};
    for (int64_t lane = 0; lane < LANES; ++lane)
      for (int64_t k = lane; k < steps * LANES; k += LANES) {
        if (k < depth)
          sweep(count, [&](int64_t i, int64_t n) GLM_INLINED {
            if (i * size % line_bytes == 0) fetch(x + k * along + i, 4 * LANES * along * size);
            give(line + i, take(x + k * along + i, n), n);
          });
        else
          memset(line, 0, sizeof line);
        float* to = at(k);
        for (int64_t i = 0; i < groups; ++i, to += group)
          memcpy(to, line + i * WIDTH, WIDTH * sizeof(float));
      }
    return;
  }
  constexpr int64_t squares = (WIDTH + SIDE - 1) / SIDE;
  alignas(64) float block[squares * SIDE][LANES] = {};
  for (int64_t i = 0; i < count; i += WIDTH, out += group)
    for (int64_t k = 0; k < depth; k += LANES) {
      const int64_t height = depth - k < LANES ? depth - k : LANES;
      const int64_t columns = count - i < WIDTH ? count - i : WIDTH;
      if (height < LANES || columns < WIDTH) memset(block, 0, sizeof block);
      for (int64_t c = 0; c < columns; ++c) {
        const T* from = x + (i + c) * across + k * along;
        if (k * size % line_bytes == 0) fetch(from, WIDTH * across * size);
        if (along == 1)
          give(block[c], take(from, height), height);
        else
          for (int64_t j = 0; j < height; ++j) block[c][j] = get(from + j * along);
      }
      for (int64_t j = 0; j < LANES; j += SIDE)
        for (int64_t c = 0; c < squares; ++c) {
          const auto to = [&](int64_t l) GLM_INLINED { return at(k + j + l) + c * SIDE; };
          const float* square = block[c * SIDE] + j;
          constexpr int64_t rest = WIDTH % SIDE;
          if (rest && c + 1 == squares)
            transpose(square, LANES, rest, to);
          else
            transpose(square, LANES, SIDE, to);
        }
    }
}

// Floats that are aligned for vectors.
class Floats {
 public:
  explicit Floats(int64_t size)
      : values_(static_cast<float*>(aligned_alloc(64, size_t(size / 16 + 1) * 64))) {
    if (!values_) throw std::bad_alloc();
  }
  ~Floats() { free(values_); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  operator float*() const { return values_; }

 private:
  float* values_;
};

// A part of the depth: `count` steps from `begin` on of each of `lanes` lanes from `lane` on, in
// the order in which they come.
struct Part {
  int64_t lane, lanes, begin, count;
};

// Calls f(m, c) for every vector of a tile; the indices are constants, which lets compilers keep
// the tile in registers.
template <int M, class F, int... I>
GLM_INLINE void each(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I / COLUMNS>(), std::integral_constant<int, I % COLUMNS>()), ...);
}
template <int M, class F>
GLM_INLINE void each(const F& f) {
  each<M>(f, std::make_integer_sequence<int, M * COLUMNS>());
}

// Sums that wait for others lie in levels: number i of 16, in the order in which they come, in the
// one that is the number of i's bits. The last one's end in level 0. A chain that is not at its end
// waits in its lane's level, too.
constexpr int64_t LEVELS = 5;
constexpr int64_t level_of(int64_t i) { return (i & 1) + (i >> 1 & 1) + (i >> 2 & 1) + (i >> 3); }

// Computes a part of the chains of a tile. Sums of other parts: kept [LEVELS][M][STRIP], strides of
// `level` and STRIP.
template <int M>
void tile(const float* a, const float* b, int64_t steps, const Part& part, float* kept,
          int64_t level) {
  alignas(64) float own[LEVELS * M * STRIP];
  const int64_t number = part.lane / part.lanes;
  float* const outer = kept + level_of(number) * level;
  for (int64_t i = 0; i < part.lanes; ++i) {
    const int64_t from = (part.lane + i) * steps + part.begin;
    const float *x = a + from * ROWS, *y = b + from * STRIP;
    const auto at = [&](int m, int c) GLM_INLINED { return m * STRIP + c * NATIVE; };
    nf sums[M][COLUMNS];
    each<M>([&](auto m, auto c) GLM_INLINED { sums[m][c] = native(0.0f); });
    if (part.begin)
      each<M>([&](auto m, auto c) GLM_INLINED { sums[m][c] = load<nf>(outer + at(m, c)); });
    for (int64_t k = 0; k < part.count; ++k) {
      nf column[COLUMNS], value{};
      for (int c = 0; c < COLUMNS; ++c) column[c] = load<nf>(y + k * STRIP + c * NATIVE);
      each<M>([&](auto m, auto c) GLM_INLINED {
        if (c == 0) value = native(x[k * ROWS + m]);
        sums[m][c] = fma(value, column[c], sums[m][c]);
      });
    }
    float* place = outer;
    // adds the sums that wait for those of this number
    const auto join = [&](int64_t bits, int64_t apart) GLM_INLINED {
      for (; bits & 1; bits >>= 1) {
        place -= apart;
        each<M>([&](auto m, auto c) GLM_INLINED { sums[m][c] += load<nf>(place + at(m, c)); });
      }
    };
    if (part.begin + part.count == steps) {
      place = own + level_of(i) * M * STRIP;
      join(i, M * STRIP);
      if (i + 1 == part.lanes) {
        place = outer;
        join(number, level);
      }
    }
    each<M>([&](auto m, auto c) GLM_INLINED { store(place + at(m, c), sums[m][c]); });
  }
}

// Writes M rows of y from sums [M, STRIP].
template <int M, class T>
void finish(const ExactProduct<T>& a, int64_t n, int64_t first, const float* sums) {
  const int64_t columns = a.columns - first < STRIP ? a.columns - first : STRIP;
  for (int m = 0; m < M; ++m)
    sweep(columns, [&](int64_t c, int64_t count) GLM_INLINED {
      const vf bias = a.bias ? take(a.bias + first + c, count) : all(0.0f);
      give(a.y + (n + m) * a.columns + first + c, take(sums + m * STRIP + c, count) + bias, count);
    });
}

template <int M>
struct Number {
  static constexpr int value = M;
};

// Calls run(Number<count>()) for a count of at most M.
template <int M, class Run>
void with_number(int64_t count, const Run& run) {
  if (count == M) return run(Number<M>());
  if constexpr (M > 1) with_number<M - 1>(count, run);
}

// Calls run(part) for the parts of the depth, in order.
template <class Run>
void in_parts(int64_t steps, const Run& run) {
  if (steps > DEPTH_BLOCK) {
    for (int64_t lane = 0; lane < LANES; ++lane)
      for (int64_t k = 0; k < steps; k += DEPTH_BLOCK)
        run(Part{lane, 1, k, steps - k < DEPTH_BLOCK ? steps - k : DEPTH_BLOCK});
    return;
  }
  int64_t lanes = LANES;
  while (lanes > 1 && lanes * steps > DEPTH_BLOCK) lanes /= 2;
  for (int64_t lane = 0; lane < LANES; lane += lanes) run(Part{lane, lanes, 0, steps});
}

struct Scratch {
  Floats panel, kept;  // a panel laid out; [PANEL / STRIP][LEVELS][ROWS_AT_A_TIME][STRIP]
};

template <class T>
void unit(const ExactProduct<T>& a, const Scratch& scratch, int64_t first, int64_t part) {
  const int64_t left = a.columns - first, columns = left < PANEL ? left : PANEL;
  const int64_t depth = exact_depth(a.depth), steps = depth / LANES;
  lay_out<STRIP>(a.b + first * a.column, a.column, a.step, columns, a.depth, scratch.panel);
  const int64_t groups = exact_groups(a.rows), last = groups * (part + 1) / a.parts * exact_group;
  const int64_t begin = groups * part / a.parts * exact_group, end = last < a.rows ? last : a.rows;
  constexpr int64_t level = ROWS_AT_A_TIME * STRIP;
  for (int64_t n = begin; n < end; n += ROWS_AT_A_TIME) {
    const int64_t rest = end - n, rows = rest < ROWS_AT_A_TIME ? rest : ROWS_AT_A_TIME;
    in_parts(steps, [&](const Part& p) {
      const bool is_last = p.lane + p.lanes == LANES && p.begin + p.count == steps;
      for (int64_t strip = 0; strip < columns; strip += STRIP)
        for (int64_t row = 0; row < rows; row += ROWS)
          with_number<ROWS>(rows - row < ROWS ? rows - row : ROWS, [&](auto number) {
            constexpr int M = number.value;
            float* kept = scratch.kept + strip * LEVELS * ROWS_AT_A_TIME + row * STRIP;
            for (int m = 0; is_last && m < M; ++m)  // to be written
              __builtin_prefetch(a.y + (n + row + m) * a.columns + first + strip, 1);
            tile<M>(a.a + (n + row) * depth, scratch.panel + strip * depth, steps, p, kept, level);
            if (is_last) finish<M>(a, n + row, first + strip, kept);
          });
    });
  }
}

}  // namespace

template <class T>
void exact_rows(const ExactRows<T>& a, int64_t begin, int64_t end) {
  const int64_t last = end * exact_group < a.rows ? end * exact_group : a.rows;
  for (int64_t n = begin * exact_group; n < last; n += LINE)
    lay_out<ROWS>(a.x + n * a.row, a.row, a.step, last - n < LINE ? last - n : LINE, a.depth,
                  a.out + n * exact_depth(a.depth));
}

template <class T>
void exact_product(const ExactProduct<T>& a, int64_t begin, int64_t end) {
  const Scratch scratch{Floats(exact_depth(a.depth) * PANEL),
                        Floats(LEVELS * ROWS_AT_A_TIME * PANEL)};
  for (int64_t i = begin; i < end; ++i) unit(a, scratch, i / a.parts * PANEL, i % a.parts);
}

GLM_INSTANTIATE(exact_rows, ExactRows)
GLM_INSTANTIATE(exact_product, ExactProduct)

}  // namespace glm::GLM_ISA
