// Activations as integers: block floating point, every number of a block in digits of base 256, one plane a digit.
//
// A block of the contraction shares a scale. A number x is scale * q with an integer q of P digits; three digits hold what
// a float32 holds of the block's largest number, two more than a bfloat16. Then a product with small integers is exact,
// and four of its terms are one instruction. Where that instruction has no room for int8 weights, two digits share a
// plane of int16.
//
// Plain data only, see products.h.
#ifndef HSAI_KERNELS_PLANES_H_
#define HSAI_KERNELS_PLANES_H_

#include <cstdint>

namespace hsai {

constexpr int kMostPlanes = 3;

// Bytes behind the digits of a row that a kernel may read: a sparse one takes 16 from any group's start on.
constexpr std::int64_t kPlanePadding = 16;

struct Planes {
  int planes;             // P, the digits of a number; 0 where kernels take the numbers themselves
  bool int8;              // dynamic int8: numbers are rounded to one digit, and that is all of a plane, or its upper byte
  bool wide;              // two digits a plane, an int16: P digits, 2 or 3, make P - 1 planes
  bool biased;            // digits are those of q + 128 * 256^(P-1), unsigned; else from -128 to 127
  int rows;               // R
  int given;              // rows that there are, of which the others are to make a multiple
  std::int64_t stride;    // bytes a row of a plane: the contraction and the padding
  std::int64_t blocks;    // blocks a row
  std::int64_t block;     // stored elements of the weight a block
  std::int64_t ahead;     // stored elements from what is read to what is asked for meanwhile: a block, or 0 in the last
  std::int64_t span;      // positions of the contraction a block
  std::int64_t padded;    // what a block takes of a row: span, or a multiple of 4; there are zeros behind its numbers
  std::int64_t shared;    // blocks that share a scale: 1, or for dynamic int8 all those of a group of the weight
  std::uint8_t* digits;   // (planes, R, stride), the least significant plane first
  std::int64_t origin;    // the position of digits[0]
  float* scale;           // (R, blocks), of the most significant digit
  std::int32_t* sum;      // (P, R, blocks): the sum of a block's digits, unless they are biased
  float* total;           // (R, blocks): the sum of a block's numbers
  const float* numbers;   // (given, D): without digits, what they would be of
};

}  // namespace hsai

#endif  // HSAI_KERNELS_PLANES_H_
