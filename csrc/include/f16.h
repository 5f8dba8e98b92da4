#pragma once

#include <cstdint>

namespace glm {

// An IEEE half in memory.
struct f16 {
  uint16_t bits;
};

}  // namespace glm
