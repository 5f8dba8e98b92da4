#pragma once

#include <cstdint>

namespace glm {

// A bfloat16 in memory: the upper half of a float.
struct bf16 {
  uint16_t bits;
};

}  // namespace glm
