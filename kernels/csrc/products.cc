// The kernels of products.h: lanes are columns, activations are broadcast.
//
// A tile of columns is walked in blocks of few stored elements: within a block the sums stay in registers, and between
// blocks they rest, scaled, in the tile's output buffer, which fits a near cache. So the weight is read in runs of the
// tile's width, few enough at a time for the prefetcher, each byte of it once, whatever the number of rows.
//
// Compiled once an instruction set with HSAI_PRODUCTS (the table's symbol) and HSAI_PRODUCTS_NAME.

#include "products.h"

namespace hsai {
namespace {

constexpr bool is_baseline(const Products* table) { return table == &kBaselineProducts; }

// Whether this compilation has kernels for single columns; weights of fewer than a vector come to the baseline alone.
constexpr bool kSingly = is_baseline(&HSAI_PRODUCTS);

}  // namespace
}  // namespace hsai

#include "attend_tile.h"
#include "fill_planes.h"
#include "float_products.h"
#include "int8_codes.h"
#include "integer_products.h"

namespace hsai {

const Products HSAI_PRODUCTS = {
    HSAI_PRODUCTS_NAME,
    kLanes,
    4 * kMostDots,
    kBiasedDigits,
    kWideDigits,
    multiply<SparseFloat<0>>,
    multiply<SparseFloat<1>>,
    multiply_integer<Int8Codes>,
    multiply_integer<Codes<4>>,
    multiply_integer<Codes<2>>,
    multiply_integer<SparseCodes<4>>,
    multiply_integer<SparseCodes<8>>,
    fill_planes,
    attend_tile,
};

}  // namespace hsai
