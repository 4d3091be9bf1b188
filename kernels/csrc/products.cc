// The kernels of products.h: lanes are columns, activations are broadcast. many_rows.h has those of many rows; of few,
// a tile of columns is walked in blocks of few stored elements: within a block the sums stay in registers, and between
// blocks they rest, scaled, in the tile's output buffer, which fits a near cache. So the weight is read in runs of the
// tile's width, few enough at a time for the prefetcher, each byte of it once, whatever the number of rows.
//
// Compiled once an instruction set with HSAI_PRODUCTS (the table's symbol) and HSAI_PRODUCTS_NAME.

#include "products.h"

namespace hsai {
namespace {

// Whether this compilation has kernels for single columns; weights of fewer than a vector come to the baseline alone.
// Told by the table's name: with sanitizers, GCC takes no comparison of addresses for a constant.
#define HSAI_SINGLY_kBaselineProducts 1
#define HSAI_JOIN(left, right) left##right
#define HSAI_IS_SINGLY(table) HSAI_JOIN(HSAI_SINGLY_, table)
#if HSAI_IS_SINGLY(HSAI_PRODUCTS)
constexpr bool kSingly = true;
#else
constexpr bool kSingly = false;
#endif

}  // namespace
}  // namespace hsai

#include "attend_tile.h"
#include "fill_planes.h"
#include "float_products.h"
#include "int8_codes.h"
#include "integer_products.h"
#include "many_rows.h"
#include "sparse_codes.h"
#include "three_bit_codes.h"

namespace hsai {

const Products HSAI_PRODUCTS = {
    HSAI_PRODUCTS_NAME,
    kLanes,
    4 * kMostDots,
    kBiasedDigits,
    kWideDigits,
    multiply<SparseFloat<0>>,
    multiply<SparseFloat<1>>,
    {multiply_integer<Int8Codes>, multiply_many<Int8Codes>},
    {multiply_integer<Codes<4>>, multiply_many<Codes<4>>},
    {multiply_integer<ThreeBitCodes>, multiply_many<ThreeBitCodes>},
    {multiply_integer<Codes<2>>, multiply_many<Codes<2>>},
    {multiply_integer<SparseCodes<NibbleValues, 4>>, multiply_many<SparseCodes<NibbleValues, 4>>},
    {multiply_integer<SparseCodes<NibbleValues, 8>>, multiply_many<SparseCodes<NibbleValues, 8>>},
    {multiply_integer<SparseCodes<ByteValues, 4>>, multiply_many<SparseCodes<ByteValues, 4>>},
    {multiply_integer<SparseCodes<ByteValues, 8>>, multiply_many<SparseCodes<ByteValues, 8>>},
    fill_planes,
    attend_tile,
};

}  // namespace hsai
