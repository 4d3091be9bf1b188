// Products of many rows: a piece of a weight is unpacked once, into a panel that stays in a near cache while all rows
// are multiplied by it. For few rows unpacking on the way costs less (integer_products.h).
//
// A tile of columns is cut into runs of neighbouring vectors, as many as a kernel has sums for. The words of a run
// stand side by side, those of its next four elements behind them.
//
// Plain data only, see products.h.
#ifndef HSAI_KERNELS_PANELS_H_
#define HSAI_KERNELS_PANELS_H_

#include <cstdint>

namespace hsai {

constexpr std::int64_t kPanelColumns = 128;   // most columns of a panel
constexpr std::int64_t kPanelElements = 512;  // most stored elements of a column of it, or one block of activations
constexpr std::int64_t kPanelFloats = 256;    // the same, where they are unpacked to floats, or digits are gathered
constexpr std::int64_t kPanelBlocks = 64;     // most blocks of activations that these are
constexpr int kRowsAtOnce = 4;                // rows that are multiplied together

// Bytes behind the digits that were chosen for a row which kernels may read or write.
constexpr std::int64_t kChosenPadding = 24;

// Where there are no instructions for products of bytes, activations of more than a digit are multiplied as the floats
// that they are; panels then hold floats.
struct Panel {
  std::int64_t blocks;    // blocks of activations that it holds at most
  std::uint32_t* words;   // of four signed elements each, or of two if planes are wide
  std::uint32_t* places;  // sparse: of each element, where in its table its digit stands
  float* floats;          // the elements as floats, with their scales
  std::int32_t* excess;   // for each block and column what makes up for the bias of digits, in the top plane's sum
  float* scale;           // for each block and column
  float* offset;          // for each block and column what a number adds that is not of its code; null without minima
  std::uint8_t* chosen;   // V:N:M: the digits that a block of columns may pick from, (planes, rows, chosen_stride)
  std::int64_t chosen_stride;
};

}  // namespace hsai

#endif  // HSAI_KERNELS_PANELS_H_
