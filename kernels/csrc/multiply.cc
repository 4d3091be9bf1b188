// See multiply.h. Compiled for the baseline instruction set: everything here is small beside reading the weight.

#include "multiply.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "threads.h"

namespace hsai {
namespace {

// Most columns of a tile: long runs of the weight, while the sums of 8 rows (64 KiB) stay in the second-level cache.
constexpr std::int64_t kMostColumns = 2048;

// Tiles start at multiples of this: whole cache lines of every format.
constexpr std::int64_t kAlignment = 64;

// Below this many stored elements a product is faster than waking a thread.
constexpr std::int64_t kAlone = 1 << 16;

float widen(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// To bfloat16, to nearest, ties to even; a NaN stays one.
std::uint16_t narrow(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The row counts that kernels are compiled for; a product of 3 rows computes a fourth of zeros.
int round_rows(std::int64_t rows) { return rows <= 2 ? static_cast<int>(rows) : rows <= 4 ? 4 : 8; }

std::vector<float> widen_activations(const Activations& a, std::int64_t dense, int padded_rows) {
  std::vector<float> x(static_cast<std::size_t>(padded_rows * dense), 0.0f);
  const std::int64_t count = a.rows * dense;
  if (a.bfloat16) {
    std::transform(static_cast<const std::uint16_t*>(a.x), static_cast<const std::uint16_t*>(a.x) + count, x.begin(),
                   widen);
  } else {
    std::copy_n(static_cast<const float*>(a.x), count, x.begin());
  }
  return x;
}

// Int4 of products.cc wants element d times 2^(-8 * (d % 4)), and behind all rows, for each row and word of 8 elements,
// 8 times their sum: what storing value + 8 adds.
void prepare_int4(std::vector<float>& x) {
  const std::size_t count = x.size();
  x.reserve(count + count / 8);
  for (std::size_t word = 0; word < count; word += 8) {
    float sum = 0;
    for (std::size_t e = 0; e < 8; ++e) sum += x[word + e];
    x.push_back(8 * sum);
    for (std::size_t e = 0; e < 8; ++e) x[word + e] /= static_cast<float>(1 << (8 * (e % 4)));
  }
}

// Where every stored element's group of 4 starts.
std::vector<std::int32_t> list_quads(const Weight& weight) {
  const std::int64_t kept = weight.stored / (weight.dense / 4);
  std::vector<std::int32_t> quads(static_cast<std::size_t>(weight.stored));
  for (std::int64_t c = 0; c < weight.stored; ++c) {
    quads[static_cast<std::size_t>(c)] = static_cast<std::int32_t>(c / kept * 4);
  }
  return quads;
}

struct Tile {
  std::int64_t begin, length;
  std::int64_t first;  // columns before this one belong to another tile
};

// Columns in tiles of whole vectors, enough of them for every thread. The last columns are covered by one vector more,
// which overlaps the others; where there is not even one vector, columns go singly.
std::vector<Tile> list_tiles(std::int64_t columns, int lanes, std::int64_t threads) {
  if (columns < lanes) return {{0, columns, 0}};
  std::vector<Tile> tiles;
  const std::int64_t whole = columns / lanes * lanes;
  const std::int64_t share = (whole / threads / kAlignment + 1) * kAlignment;
  const std::int64_t size = std::min(kMostColumns, share);
  for (std::int64_t begin = 0; begin < whole; begin += size) {
    tiles.push_back({begin, std::min(size, whole - begin), begin});
  }
  if (whole < columns) tiles.push_back({columns - lanes, lanes, whole});
  return tiles;
}

ProductTile choose_kernel(const Products& products, Format format) {
  switch (format) {
    case Format::kInt8:
      return products.int8;
    case Format::kInt4:
      return products.int4;
    case Format::kSparseFloat32:
      return products.sparse_float32;
    case Format::kSparseBfloat16:
      return products.sparse_bfloat16;
    case Format::kSparseInt4:
      break;
  }
  return products.sparse_int4;
}

// Copies the tile's columns from `sums` (rows, length) to the result.
void write_tile(const Tile& tile, const float* sums, const Activations& a, std::int64_t columns) {
  for (std::int64_t row = 0; row < a.rows; ++row) {
    const float* from = sums + row * tile.length + (tile.first - tile.begin);
    const float* end = sums + (row + 1) * tile.length;
    const std::int64_t to = row * columns + tile.first;
    if (a.bfloat16) {
      std::transform(from, end, static_cast<std::uint16_t*>(a.out) + to, narrow);
    } else {
      std::copy(from, end, static_cast<float*>(a.out) + to);
    }
  }
}

}  // namespace

void multiply_packed(Format format, const Weight& weight, const Activations& activations, std::int64_t threads,
                     const Schedule& schedule) {
  const Products& products = current_products();
  const ProductTile kernel = choose_kernel(products, format);
  const int rows = round_rows(activations.rows);
  std::vector<float> x = widen_activations(activations, weight.dense, rows);
  if (format == Format::kInt4) prepare_int4(x);

  Weight prepared = weight;
  std::vector<std::int32_t> quads;
  if (weight.indices != nullptr) {
    quads = list_quads(weight);
    prepared.quads = quads.data();
  }

  if (weight.stored * weight.columns < kAlone || threads < 1) threads = 1;
  const std::vector<Tile> tiles = list_tiles(weight.columns, products.lanes, threads);
  std::vector<std::vector<float>> sums;
  sums.reserve(tiles.size());
  for (const Tile& tile : tiles) sums.emplace_back(static_cast<std::size_t>(rows * tile.length));

  run_tiles(static_cast<std::int64_t>(tiles.size()), threads, schedule, [&](std::int64_t i) {
    const Tile& tile = tiles[static_cast<std::size_t>(i)];
    float* out = sums[static_cast<std::size_t>(i)].data();
    kernel(prepared, x.data(), rows, tile.begin, tile.length, out);
    write_tile(tile, out, activations, weight.columns);
  });
}

}  // namespace hsai
