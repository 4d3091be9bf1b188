// bfloat16 and float, one number at a time. For sources that are compiled for the baseline instruction set only.
#ifndef HSAI_KERNELS_BFLOAT16_H_
#define HSAI_KERNELS_BFLOAT16_H_

#include <cstdint>
#include <cstring>

namespace hsai {

inline float widen(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// To bfloat16, to nearest, ties to even; a NaN stays one.
inline std::uint16_t narrow(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace hsai

#endif  // HSAI_KERNELS_BFLOAT16_H_
