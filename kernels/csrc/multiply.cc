// See multiply.h. Compiled for the baseline instruction set: everything here is small beside reading the weight.

#include "multiply.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "bfloat16.h"
#include "buffers.h"
#include "plan.h"
#include "threads.h"

namespace hsai {
namespace {

// Most columns of a tile of few rows: long runs of the weight, while the sums of 8 rows (128 KiB) stay in the
// second-level cache.
constexpr std::int64_t kMostColumns = 4096;

// Most rows of a tile of many: what unpacking costs is small beside them, and their sums stay in that cache.
constexpr std::int64_t kMostTileRows = 512;

// Tiles start at multiples of this: whole cache lines of every format.
constexpr std::int64_t kAlignment = 64;

// Below this many stored elements a product is faster than sharing it.
constexpr std::int64_t kAlone = 1 << 14;

struct Tile {
  std::int64_t begin, length;
  std::int64_t first;      // columns before this one belong to another tile
  const Product* product;  // whose columns
};

// Adds a product's columns in tiles of whole vectors, `parts` or more. The last columns are covered by one vector more,
// which overlaps the others; where there is not even one vector, columns go singly.
void add_tiles(const Product& product, int lanes, std::int64_t parts, std::int64_t most, std::vector<Tile>& tiles) {
  const std::int64_t columns = product.weight.columns;
  if (columns < lanes) {
    tiles.push_back({0, columns, 0, &product});
    return;
  }
  const std::int64_t whole = columns / lanes * lanes;
  const auto round_up = [](std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; };
  // Tiles of equal size, as many for each thread: with three tiles for two threads one of them waits for half the time.
  const std::int64_t share = round_up(whole, parts * kAlignment) / parts;
  const std::int64_t pieces = round_up(share, std::max(most, kAlignment)) / std::max(most, kAlignment);
  const std::int64_t size = round_up(share, pieces * kAlignment) / pieces;
  for (std::int64_t begin = 0; begin < whole; begin += size) {
    tiles.push_back({begin, std::min(size, whole - begin), begin, &product});
  }
  if (whole < columns) tiles.push_back({columns - lanes, lanes, whole, &product});
}

// The tiles of all products, the longest first: at the end threads wait for each other's last. A product that is no more
// than a thread's share of all is not divided: then its rows are read from end to end, as memory gives them fastest.
std::vector<Tile> list_tiles(const Plan& plan, std::int64_t threads, std::int64_t most) {
  std::int64_t columns = 0;
  for (const Product& product : plan.products) columns += product.weight.columns;
  std::vector<Tile> tiles;
  for (const Product& product : plan.products) {
    const std::int64_t parts = (product.weight.columns * threads + columns - 1) / columns;
    add_tiles(product, plan.table->lanes, parts, most, tiles);
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.length > b.length; });
  return tiles;
}

ProductTile choose_kernel(const Products& products, Format format) {
  return format == Format::kSparseFloat32 ? products.sparse_float32 : products.sparse_bfloat16;
}

const IntegerProduct& choose_integer_kernels(const Plan& plan, Format format) {
  const Products& products = *plan.table;
  if (format == Format::kInt8) return products.int8;
  if (format == Format::kInt4) return products.int4;
  if (format == Format::kInt3) return products.int3;
  if (format == Format::kInt2) return products.int2;
  const bool eighths = plan.weight().choices == nullptr && plan.weight().pattern == 8;
  if (format == Format::kSparseInt8) return eighths ? products.sparse_int8_of_8 : products.sparse_int8;
  return eighths ? products.sparse_int4_of_8 : products.sparse_int4;
}

// Copies the tile's columns from `sums` (rows, length) to rows [row, row + rows) of the result.
void write_tile(const Tile& tile, const float* sums, const Activations& a, std::int64_t row, std::int64_t rows) {
  const std::int64_t columns = tile.product->weight.columns;
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* from = sums + r * tile.length + (tile.first - tile.begin);
    const float* end = sums + (r + 1) * tile.length;
    const std::int64_t to = (row + r) * columns + tile.first;
    if (a.bfloat16) {
      std::transform(from, end, static_cast<std::uint16_t*>(tile.product->out) + to, narrow);
    } else {
      std::copy(from, end, static_cast<float*>(tile.product->out) + to);
    }
  }
}

void multiply_few(Format format, const Plan& plan, const Activations& a, std::int64_t threads,
                  const Schedule& schedule) {
  const std::vector<Tile> tiles = list_tiles(plan, threads, kMostColumns);
  // Not filled: the kernels do that, each its own part.
  const std::int64_t stride = plan.rows * tiles.front().length + kAlignment;  // none is longer; no line is of two
  const std::unique_ptr<float[]> sums(new float[tiles.size() * static_cast<std::size_t>(stride)]);
  const ProductTile floats = choose_kernel(*plan.table, format);
  const IntegerTile integers = choose_integer_kernels(plan, format).few;
  run_tiles(static_cast<std::int64_t>(tiles.size()), threads, schedule, [&](std::int64_t i) {
    const Tile& tile = tiles[static_cast<std::size_t>(i)];
    float* out = sums.get() + i * stride;
    if (plan.integer) {
      integers(tile.product->weight, plan.planes, tile.begin, tile.length, out);
    } else {
      floats(tile.product->weight, plan.x.data(), plan.rows, tile.begin, tile.length, out);
    }
    write_tile(tile, out, a, 0, a.rows);
  });
}

// A panel in a buffer, or, without one, how many floats it takes.
class PanelPlan {
 public:
  PanelPlan(const Plan& plan, std::int64_t rows) {
    const Planes& x = plan.planes;
    const Weight& weight = plan.weight();
    const bool sparse = weight.indices != nullptr, chosen = weight.choices != nullptr;
    const std::int64_t most = x.planes == 0 || chosen ? kPanelFloats : kPanelElements;
    blocks_ = std::clamp<std::int64_t>(most / x.block, 1, kPanelBlocks);
    const std::int64_t words = blocks_ * ((x.block + 3) / 4) * (x.wide ? 2 : 1) * kPanelColumns;
    add(sums_, rows * kPanelColumns);
    add(words_, words);
    add(places_, sparse ? words : 0);
    add(floats_, x.planes == 0 ? blocks_ * x.block * kPanelColumns : 0);
    add(excess_, blocks_ * kPanelColumns);
    add(scale_, blocks_ * kPanelColumns);
    add(offset_, weight.minimum != nullptr ? blocks_ * kPanelColumns : 0);
    has_offset_ = weight.minimum != nullptr;
    if (!chosen) return;
    chosen_stride_ = ((blocks_ * x.span / weight.pattern * 4 + kChosenPadding + 63) / 64 | 1) * 64;
    add(chosen_, x.planes * rows * chosen_stride_ / 4);
  }

  std::int64_t size() const { return size_; }

  float* place_sums(float* buffer) const { return buffer + sums_; }

  Panel place(float* buffer) const {
    Panel panel = {};
    panel.blocks = blocks_;
    panel.words = reinterpret_cast<std::uint32_t*>(buffer + words_);
    panel.places = reinterpret_cast<std::uint32_t*>(buffer + places_);
    panel.floats = buffer + floats_;
    panel.excess = reinterpret_cast<std::int32_t*>(buffer + excess_);
    panel.scale = buffer + scale_;
    panel.offset = has_offset_ ? buffer + offset_ : nullptr;
    panel.chosen = reinterpret_cast<std::uint8_t*>(buffer + chosen_);
    panel.chosen_stride = chosen_stride_;
    return panel;
  }

 private:
  void add(std::int64_t& at, std::int64_t count) {
    at = size_;
    size_ += (count + 15) / 16 * 16;
  }

  std::int64_t blocks_, size_ = 0, chosen_stride_ = 0;
  std::int64_t sums_ = 0, words_ = 0, places_ = 0, floats_ = 0, excess_ = 0, scale_ = 0, offset_ = 0, chosen_ = 0;
  bool has_offset_ = false;
};

void multiply_many(Format format, const Plan& plan, const Activations& a, std::int64_t threads,
                   const Schedule& schedule) {
  const std::vector<Tile> tiles = list_tiles(plan, threads, kPanelColumns);
  const std::int64_t pieces = (plan.rows + kMostTileRows - 1) / kMostTileRows;
  const std::int64_t rows = (plan.rows + pieces * kRowsAtOnce - 1) / (pieces * kRowsAtOnce) * kRowsAtOnce;
  const PanelPlan panel(plan, rows);
  const std::int64_t count = static_cast<std::int64_t>(tiles.size()) * pieces;
  Buffers buffers(std::min(threads, count), panel.size());
  const ManyTile multiply = choose_integer_kernels(plan, format).many;
  run_tiles(count, threads, schedule, [&](std::int64_t i) {
    const Tile& tile = tiles[static_cast<std::size_t>(i / pieces)];
    const std::int64_t row = i % pieces * rows, there = std::min(rows, plan.rows - row);
    float* const buffer = buffers.take();
    float* const sums = panel.place_sums(buffer);
    multiply(tile.product->weight, plan.planes, panel.place(buffer), tile.begin, tile.length, static_cast<int>(row),
             static_cast<int>(there), sums);
    write_tile(tile, sums, a, row, std::min(there, a.rows - row));
    buffers.give(buffer);
  });
}

}  // namespace

bool is_integer(Format format) {
  return format != Format::kSparseFloat32 && format != Format::kSparseBfloat16;
}

bool are_alike(const Weight& one, const Weight& other) {
  return one.dense == other.dense && one.stored == other.stored && one.group == other.group &&
         one.pattern == other.pattern && one.zero == other.zero && one.scale_type == other.scale_type &&
         (one.choices == nullptr) == (other.choices == nullptr) && (one.minimum == nullptr) == (other.minimum == nullptr);
}

void multiply_packed(Format format, const std::vector<Product>& products, const Activations& activations,
                     std::int64_t threads, const Schedule& schedule) {
  const auto is_narrow = [](const Product& product) { return product.weight.columns < current_products().lanes; };
  if (products.size() > 1 && std::any_of(products.begin(), products.end(), is_narrow)) {  // these want another table
    for (const Product& product : products) multiply_packed(format, {product}, activations, threads, schedule);
    return;
  }
  std::int64_t columns = 0;
  for (const Product& product : products) columns += product.weight.columns;
  Plan plan = plan_products(format, products, activations);
  if (plan.weight().stored * columns * activations.rows < kAlone || threads < 1) threads = 1;
  run_tiles(activations.rows, plan.many ? threads : 1, schedule,
            [&](std::int64_t row) { fill_row(plan, activations, row); });
  (plan.many ? multiply_many : multiply_few)(format, plan, activations, threads, schedule);
}

}  // namespace hsai
