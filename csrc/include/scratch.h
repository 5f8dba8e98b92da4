// Memory for one unit's work.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifndef GLM_ISA
#error "compile with -DGLM_ISA=scalar, avx2 or avx512"
#endif

namespace glm::GLM_ISA {

static inline int64_t padded(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Words for one unit's work, in the largest vector's alignment. (No std::vector here: its
// instantiations would be shared between instruction sets.)
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : words_(static_cast<float*>(aligned_alloc(64, size_t(padded(size + 256, 16)) * 4))) {
    if (!words_) throw std::bad_alloc();
  }
  ~Scratch() { free(words_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void clear() { used_ = 0; }
  float* take(int64_t size) {
    float* p = words_ + used_;
    used_ += padded(size, 16);
    return p;
  }

 private:
  float* words_;
  int64_t used_ = 0;
};

}  // namespace glm::GLM_ISA
