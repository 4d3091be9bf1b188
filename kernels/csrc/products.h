// Products with packed weights: the interface between the FFI handlers and the kernels.
//
// products.cc is compiled once for every instruction set; each compilation exports one `Products` table, and
// select.cc picks the best that this machine runs. This header holds plain data only: no inline function may be
// shared between compilations for different instruction sets, or the linker might keep the wrong copy.
//
// Dimensions: R rows, D dense contraction, C stored (kept) elements a column, F columns.
#ifndef HSAI_KERNELS_PRODUCTS_H_
#define HSAI_KERNELS_PRODUCTS_H_

#include <cstdint>

#include "attention_tile.h"
#include "panels.h"
#include "planes.h"

namespace hsai {

constexpr int kMaxRows = 8;                // of a floating product
constexpr int kMaxIntegerRows = 1 << 16;  // of an integer one

constexpr int kBlockColumns = 16;         // V of a V:N:M weight is a multiple: the columns of the widest vector

enum class ScaleType { kNone, kFloat32, kBfloat16, kFloat16 };

// Where 4 consecutive kept elements of an N:4 or N:8 weight look for their activations.
struct Slot {
  std::int32_t first;      // position, of those that a column may keep, where the group of the first of them begins
  std::int32_t next;       // where the 16 positions begin that elements 2 and 3 see, counted from `first`: 16 for 1:8
  std::uint32_t offsets;   // byte j: the begin of the group of element j in the 16 that it sees; at most 12
};

// A packed weight; every array is row-major with F columns. Layouts are those of packing.py and the reference.py files.
struct Weight {
  const void* values;         // int8 (C, F), float or bfloat16 (C, F), words of codes (C * bits / 32, F)
  const std::uint32_t* indices;  // (C/16, F) for N:4 weights, (3*C/32, F) for N:8 ones, else null
  const void* scale;          // (C/group, F), null for kNone
  const void* minimum;        // as scale, of dense codes of 4 bits: what code 0 stands for; else null
  ScaleType scale_type;
  const std::int32_t* quads;  // N:4 floats: for each stored element, the dense position where its group of 4 starts
  const Slot* slots;          // N:4 and N:8 codes: for every 4 stored elements
  std::int32_t slot_span;     // digits that a slot sees at most: 8, 16, or 32 for those of `next`
  const std::uint32_t* choices;  // V:N:M: (D/32, F/V), bit i of word j for position 32 * j + i; else null
  std::int64_t width;         // V, a multiple of kBlockColumns
  std::int64_t pattern;       // M, of which a block of V columns may keep 4; without choices 4 or 8
  std::int64_t dense;         // D
  std::int64_t stored;        // C; D for dense formats
  std::int64_t group;         // stored elements that share a scale
  std::int32_t zero;          // of words of dense codes: twice the code that stands for zero, 0 with a minimum
  std::int64_t columns;       // F
};

// Writes out[r * length + i] = sum over the contraction of x[r] times column begin + i, for r < rows.
// x is float (rows, D), rows is 1, 2, 4 or 8. length is a multiple of `lanes`, or anything in the baseline's table, which
// then computes columns singly.
using ProductTile = void (*)(const Weight& weight, const float* x, int rows, std::int64_t begin, std::int64_t length,
                             float* out);

// The same for activations in planes, any number of rows.
using IntegerTile = void (*)(const Weight& weight, const Planes& x, std::int64_t begin, std::int64_t length,
                             float* out);

// Columns [begin, begin + length) times rows [row, row + rows), multiples of kRowsAtOnce, to `out` (rows, length).
using ManyTile = void (*)(const Weight& weight, const Planes& x, const Panel& panel, std::int64_t begin,
                          std::int64_t length, int row, int rows, float* out);

struct IntegerProduct {
  IntegerTile few;
  ManyTile many;  // for length of whole vectors only
};

struct Products {
  const char* name;
  int lanes;       // columns a vector register holds; weights of fewer go to the baseline's table
  int most_block;  // most stored elements of a block of activations
  bool biased;     // whether N:4 and N:8 codes take biased digits; those of dense weights never are
  bool wide;       // whether int8 weights take planes of two digits
  ProductTile sparse_float32;
  ProductTile sparse_bfloat16;
  IntegerProduct int8;
  IntegerProduct int4;
  IntegerProduct int3;
  IntegerProduct int2;
  IntegerProduct sparse_int4;
  IntegerProduct sparse_int4_of_8;
  IntegerProduct sparse_int8;
  IntegerProduct sparse_int8_of_8;
  // Fills digits, scale and sum of row `row` from x (blocks * span numbers).
  void (*fill_planes)(const Planes& planes, int row, const float* x);
  AttendTile attend;
};

extern const Products kBaselineProducts;
#if defined(__x86_64__)
extern const Products kAvx2Products;
extern const Products kAvxVnniProducts;
extern const Products kAvx512Products;
#elif defined(__aarch64__)
extern const Products kDotprodProducts;
extern const Products kI8mmProducts;
#endif

// The table in use: the fastest that this machine runs, unless use_products chose another.
const Products& current_products();

// Switches to the table of that name; false if there is none, or this machine does not run it. For tests and benchmarks.
bool use_products(const char* name);

}  // namespace hsai

#endif  // HSAI_KERNELS_PRODUCTS_H_
